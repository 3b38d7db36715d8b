"""What every exporter writes: a file that appears whole or not at all, and what is in it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from dqa_plugins.errors import ExportFailed


def target(path: str | os.PathLike[str]) -> Path:
    """The file that a path stands for, behind symbolic links.

    Raises:
        ExportFailed: its folder does not exist, or something other than a regular file is there.
    """
    try:
        file = Path(path).resolve()
    except (OSError, RuntimeError) as error:
        raise ExportFailed(f"{path}: {error}") from error
    if not file.parent.is_dir():
        raise ExportFailed(f"{path}: the folder {file.parent} does not exist.")
    if file.exists() and not file.is_file():
        raise ExportFailed(f"{path} is no regular file; give a path that is free, or a file to replace.")
    return file


def move(folder: str, file: Path) -> None:
    """Move what was written in a new folder beside `file` into place, `file` itself last.

    Raises:
        ExportFailed: a file that does not belong to `file` is in the place of one beside it (external data).
    """
    parts = sorted(Path(folder).iterdir(), key=lambda part: part.name == file.name)
    known = file.read_bytes() if file.exists() and len(parts) > 1 else b""
    for part in parts[:-1]:
        if file.with_name(part.name).exists() and part.name.encode() not in known:
            raise ExportFailed(f"{file.with_name(part.name)} is in the way: it holds no data of {file.name}.")
    for part in parts:
        os.replace(part, file.with_name(part.name))


def in_one_sentence(error: BaseException) -> str:
    """The root cause of an exporter's error: its class and the first line of its message."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('. ')}" if lines else type(error).__name__


class ExportedFile(type(Path())):  # type: ignore[misc]
    """The path of a file, and what became of each quantizer and each quantized weight in it.

    Attributes:
        sites: {site: form of the activation}, such as "uint8", "int4 per channel" or "float: outliers stay in float".
        weights: {name of the parameter: form}.
    """

    sites: Mapping[str, str] = {}
    weights: Mapping[str, str] = {}
