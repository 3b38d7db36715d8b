"""JSON files that appear whole or not at all, and are refused with one error where they are damaged."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from .errors import RankTableError


def write_json(path: str | os.PathLike[str], data: Any) -> None:
    """Write JSON through a temporary file beside `path`, so that a crash leaves the old file or the new one."""
    target = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=target.name, suffix=".tmp", dir=target.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        RankTableError: it is not JSON, or is nested too deeply to be read.
        OSError: it cannot be read.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: JSONDecodeError, UnicodeDecodeError
        raise RankTableError(
            f"{os.fspath(path)!r} is not JSON ({error}); the file is damaged or something else."
        ) from error
