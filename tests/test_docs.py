"""Pages for contributors name only files, modules and make targets that exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ["CONTRIBUTING.md", "docs/architecture.md"]
pages = pytest.mark.parametrize("page", PAGES)


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


@pages
def test_links_lead_somewhere_and_say_where(page: str) -> None:
    """And where the text of a link is a path, it is that of the file."""
    for text, target in re.findall(r"\[([^\]]+)\]\(([^)#]+)\)", text_of(page)):
        if not target.startswith("http"):
            file = ((ROOT / page).parent / target).resolve()
            assert file.exists(), f"{page} links to {target}"
            if "/" in text:
                assert (ROOT / text).resolve() == file, f"{page} calls {target} {text}"


@pages
def test_paths_exist(page: str) -> None:
    """`tests/core/test_grid.py`, `adapters/`, in code or in a link's text."""
    roots = "|".join(re.escape(path.name) for path in ROOT.iterdir() if path.is_dir() and path.name != ".git")
    for path in re.findall(rf"(?<![\w./-])((?:{roots})/[\w./-]*)", text_of(page)):
        assert (ROOT / path.rstrip(".")).exists(), f"{page} names {path}"


@pages
def test_modules_and_names_exist(page: str) -> None:
    """`dqa_plugins.grid.Grid`: a module and, behind it, an attribute."""
    for name in sorted(set(re.findall(r"`(dqa_plugins(?:\.\w+)+)`", text_of(page)))):
        parts, found = name.split("."), None
        for count in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:count]))
            except ModuleNotFoundError as error:
                if not str(error.name).startswith("dqa_plugins"):
                    pytest.skip(f"{error.name} is not installed")
                continue
            for attribute in parts[count:]:
                assert hasattr(found, attribute), f"{page} names {name}"
                found = getattr(found, attribute)
            break
        assert found is not None, f"{page} names {name}"


def test_files_named_by_themselves_exist() -> None:
    """In the diagram of the architecture: `source.py`, `kernels/`."""
    diagram = re.search(r"```mermaid\n(.*?)```", text_of("docs/architecture.md"), re.DOTALL)
    assert diagram
    for name in re.findall(r"(?<=[\s\"])(\w+\.py|\w+/)", diagram[1]):
        assert (ROOT / "dqa_plugins" / name).exists(), name


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in (*PAGES, "README.md", ".ci/run"):
        for target in re.findall(r"(?:`|^\s*)make ([a-z-]+)", text_of(page), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page}: make {target}"


def test_quick_runs_folders_that_exist() -> None:
    paths = re.search(r"^QUICK := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert paths
    for path in paths[1].split():
        assert (ROOT / path).exists(), path


def test_the_same_checks_run_everywhere() -> None:
    """Before a commit and in hosted CI as in `make check` and .ci/run."""
    recipe = re.search(r"^check:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    before = (ROOT / ".pre-commit-config.yaml").read_text()
    for line in recipe[1].splitlines():
        command = line.strip().replace("$(BIN)", ".venv/bin").removesuffix(" .")
        assert f"entry: {command}" in before, command
    hosted = (ROOT / ".github/workflows/ci.yml").read_text()
    assert "run: .ci/run" in hosted
    assert not re.search(r"uses: \S+@(?!v\d+\.\d+\.\d+$)", hosted, re.MULTILINE)  # pinned
