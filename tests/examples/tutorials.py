"""Pages of docs/tutorials as programs: their blocks run in order, and print what the page says.

    python -m tests.examples.tutorials [PAGE ...]     # write what blocks print now into the pages

A page may go on from the first block of another one, which a line **Start** links to (mkdocs shows that block there).
A block ```python title="FILE" is written to that file. A block ```text behind one is what it prints, a block ```sh
a command.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "tutorials"
PAGES = sorted(path.stem for path in FOLDER.glob("*.md") if path.stem != "index")
_START = re.compile(r"^\*\*Start\*\* .*\((\S+?)(?:#\S+)?\)", re.MULTILINE)
_BLOCK = re.compile(r"```(python|sh|text)(?: title=\"([\w.]+)\")?\n(.*?)```", re.DOTALL)

Block = tuple[str, str, str]  # language, title, content


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    return _BLOCK.findall(page.read_text(encoding="utf-8"))


def start(page: Path) -> str:
    """The code that a page goes on from; "" for none."""
    found = _START.search(page.read_text(encoding="utf-8"))
    if found is None:
        return ""
    target = (page.parent / found[1]).resolve()
    return next(code for language, _, code in blocks(target) if language == "python")


def execute(code: str, namespace: dict[str, Any], name: str) -> str:
    """What a block prints, without NNCF's progress bars; ours go to stderr."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, name, "exec"), namespace)
    return "".join(line for line in printed.getvalue().splitlines(keepends=True) if "\u2501" not in line)


def command(line: str) -> str:
    """What a command prints, with the programs of this environment."""
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = os.environ | {"PATH": os.pathsep.join(paths), "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    done = subprocess.run(["bash", "-ec", line], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{line}: {done.stdout}{done.stderr}")
    return done.stdout


def run(page: Path, namespace: dict[str, Any], met: Callable[[str, str], None]) -> None:
    """Run a page in the current folder.

    Args:
        namespace: that its `start` left.
        met: called with (what the page says, what was printed) for each block of output.
    """
    printed = ""
    for number, (language, title, content) in enumerate(blocks(page)):
        if language == "text":
            met(content, printed)
        elif title:
            Path(title).write_text(content)
        elif language == "python":
            printed = execute(content, namespace, f"{page.name}, block {number}")
        else:
            printed = command(content)


def main() -> None:
    """Write what blocks print now into pages, all or those named."""
    import tempfile

    for name in sys.argv[1:] or PAGES:
        page = FOLDER / f"{name}.md"
        text = page.read_text(encoding="utf-8")
        changes: list[tuple[str, str]] = []
        namespace: dict[str, Any] = {"__name__": "tutorial"}
        with contextlib.chdir(tempfile.mkdtemp()):
            execute(start(page), namespace, "start")
            run(page, namespace, lambda *pair, add=changes.append: add(pair))
        for said, printed in changes:
            text = text.replace(f"```text\n{said}```", f"```text\n{printed}```", 1)
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
