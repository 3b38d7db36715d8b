"""Pages with figures in them: what stands between two markers is rendered from a JSON of docs/results.

    <!--= NAME ARGUMENT ... -->text<!--/-->

NAME is a function that `block` registered; its arguments are split as in a shell. Text on the marker's line is
replaced in that line (a figure in a sentence or a cell); else the block stands on lines of its own, as a table does.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
MARKED = re.compile(r"(<!--= (.+?) -->)(.*?)(<!--/-->)", re.DOTALL)
BLOCKS: dict[str, Callable[..., str]] = {}


class ResultsError(ValueError):
    """A marker asks for what no JSON holds."""


def block(function: Callable[..., str]) -> Callable[..., str]:
    """Register a renderer: strings of the marker in, text out; several lines where it is a table."""
    BLOCKS[function.__name__] = function
    return function


@cache
def load(name: str) -> Any:
    """`docs/results/<name>.json`, read once.

    Raises:
        ResultsError: it is not there.
    """
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        raise ResultsError(f"{path} is not there; `make results PARTS={path.stem}` measures it.")
    return json.loads(path.read_text(encoding="utf-8"))


def find(name: str, path: str) -> Any:
    """A value of a JSON by its path.

    Args:
        name: of the JSON in docs/results, without suffix.
        path: keys and numbers with "/" between them; in a list of objects `key=value&key=value` picks the first
            that has all of these.

    Raises:
        ResultsError: the path leads nowhere; the message says where it ends.
    """
    found = load(name)
    for step in path.split("/"):
        try:
            if isinstance(found, list) and "=" in step:
                wanted = [pair.split("=", 1) for pair in step.split("&")]
                found = next(x for x in found if all(str(x.get(key)) == value for key, value in wanted))
            else:
                found = found[int(step)] if isinstance(found, list) else found[step]
        except (KeyError, IndexError, StopIteration, TypeError, ValueError):
            raise ResultsError(f"{name}.json has no {path}: {step!r} is not there") from None
    return found


@block
def value(name: str, path: str, form: str = "") -> str:
    """One value of a JSON, in a format of Python such as `.2f` or `.1%`."""
    return format(find(name, path), form)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table of Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines).replace("|  |", "| |")


def rendered(text: str, page: str = "") -> str:
    """The text with every marked figure as the JSONs have it now.

    Raises:
        ResultsError: no such block, or it has nothing to show; the message names page and marker.
    """

    def replace(match: re.Match[str]) -> str:
        start, call, old, end = match.groups()
        name, *arguments = shlex.split(call)
        try:
            found = BLOCKS[name](*arguments)
        except (KeyError, TypeError, ResultsError) as error:
            raise ResultsError(f"{page}: {call}: {type(error).__name__}: {error}") from error
        return f"{start}\n{found}\n{end}" if "\n" in old or "\n" in found else start + found + end

    return MARKED.sub(replace, text)


def pages() -> list[Path]:
    """README and the pages below docs that have markers."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path for path in found if MARKED.search(path.read_text(encoding="utf-8"))]


def differing(*, write: bool) -> list[str]:
    """Pages whose figures are not those of the JSONs.

    Args:
        write: put the JSONs' figures in.
    """
    found = []
    for path in pages():
        old = path.read_text(encoding="utf-8")
        new = rendered(old, str(path.relative_to(ROOT)))
        if new != old:
            found.append(str(path.relative_to(ROOT)))
            if write:
                path.write_text(new, encoding="utf-8")
    return found
