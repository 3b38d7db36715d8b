"""What mkdocs does to the pages: the same files are read in the repository and on the site, and none is written twice.

README, CHANGELOG and CONTRIBUTING become pages. Links that lead out of the site, to sources, become their text. Below a
line **Start** a tutorial shows the block that it goes on from; a line **See** is followed by the section it links to.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<![\w!`])\[([^\]]+)\]\(([^)#\s]*)(#[^)\s]+)?\)")
_INCLUDE = re.compile(r"^\*\*(Start|See)\*\* .*\((\S+?)#(\S+?)\).*$", re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie at the root of the repository."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The page with what it includes, and with the site's links."""
    source = next((name for name, target in PAGES.items() if target == page.file.src_uri), f"docs/{page.file.src_uri}")
    markdown = _INCLUDE.sub(lambda found: _included(source, *found.groups(), found[0]), markdown)
    parts = _FENCE.split(markdown)
    parts[::2] = [_LINK.sub(lambda found: _link(source, page.file.src_uri, files, found), part) for part in parts[::2]]
    return "".join(parts)


def _link(source: str, here: str, files: Any, found: re.Match[str]) -> str:
    """A link of a file of the repository, as one of the site, or as its text."""
    text, target, anchor = found[1], found[2], found[3] or ""
    if not target or target.startswith(("http:", "https:", "mailto:")):
        return found[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    path = PAGES.get(path, path.removeprefix("docs/"))
    file = files.get_file_from_path(path)
    if file is None:
        return text if "`" in text or " " in text else f"`{text}`"
    if text.endswith(".md"):
        text = file.content_string.splitlines()[0].removeprefix("# ")
    return f"[{text}]({posixpath.relpath(path, posixpath.dirname(here) or '.')}{anchor})"


def _included(source: str, kind: str, target: str, anchor: str, line: str) -> str:
    """The line, and behind it what it links to: the section's first block of code, or the section."""
    file = ROOT / posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    section = _section(file.read_text(encoding="utf-8"), anchor)
    if kind == "See":
        return section
    code = re.search(r"^```python\n.*?^```$", section, re.MULTILINE | re.DOTALL)
    if code is None:
        raise ValueError(f"{source}: {target}#{anchor} has no code")
    shown = "\n".join("    " + row for row in code[0].splitlines())
    return f'{line}\n\n??? example "The code that this page goes on from"\n\n{shown}'


def _section(text: str, anchor: str) -> str:
    """What stands below a heading, up to the next one of its level."""
    for found in re.finditer(r"^(#+) (.*)$", text, re.MULTILINE):
        if re.sub(r"[^\w -]", "", found[2]).lower().replace(" ", "-") == anchor:
            rest = text[found.end() :]
            end = re.search(rf"^#{{1,{len(found[1])}}} ", rest, re.MULTILINE)
            return rest[: end.start()] if end else rest
    raise ValueError(f"no heading #{anchor}")
