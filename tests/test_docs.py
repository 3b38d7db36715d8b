"""Pages name only files, modules and make targets that exist, and the site has everything that is public."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

from .test_structure import files, imports

ROOT = Path(__file__).parents[1]
PAGES = ["CONTRIBUTING.md", "docs/architecture.md", "docs/adding_a_framework.md"]
pages = pytest.mark.parametrize("page", PAGES)
ALL = ["README.md", "CONTRIBUTING.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md")))]


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def anchors(path: Path) -> set[str]:
    """Of the headings of a page, as the repository's host and the site make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ALL)
def test_links_lead_somewhere_and_say_where(page: str) -> None:
    """Anchors too; and where the text of a link is a path, it is that of the file."""
    prose = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.M | re.S)
    for text, target, anchor in re.findall(r"(?<![\w`])\[([^\]]+)\]\(([^)#\s]*)(?:#([^)\s]+))?\)", prose):
        if not target.startswith(("http", "mailto")):
            file = ((ROOT / page).parent / target).resolve() if target else ROOT / page
            assert file.exists(), f"{page} links to {target}"
            assert not anchor or anchor in anchors(file), f"{page} links to {target}#{anchor}"
            if "/" in text and " " not in text:
                named = {(base / text.strip("`")).resolve() for base in (ROOT, (ROOT / page).parent)}
                assert named & {file, file.parent}, f"{page} calls {target} {text}"


def errors() -> dict[str, tuple[str, ...]]:
    """{class: what it derives from} of every error of ours, in all modules."""
    found: dict[str, tuple[str, ...]] = {"DQAError": ("Exception",)}
    classes = [
        node
        for path in files().values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    for _ in classes:  # bases may stand in other files
        for node in classes:
            bases = tuple(ast.unparse(base) for base in node.bases)
            if found.keys() & set(bases):
                found[node.name] = bases
    return {name: bases for name, bases in found.items() if name != "DQAError"}


def test_every_error_has_a_way_out() -> None:
    """One row each, with the classes that it derives from, when it comes and what to do."""
    rows = re.findall(r"^\| `(\w+)`[^|]*\| ([^|]*) \| ([^|]+) \| ([^|]*) \|$", text_of("docs/errors.md"), re.M)
    own = {"DQAError", "StorageError"}  # the page says them once
    said = {name: set(bases.split(", ")) - own for name, bases, _, _ in rows}
    assert said == {name: set(bases) - own for name, bases in errors().items()}
    assert len(rows) == len(said)
    assert all(when.strip() and out.strip() for _, _, when, out in rows)


def test_the_reference_has_every_public_module() -> None:
    """Every package with `__all__` but the first, whose names come from modules that are named too."""
    named = set(re.findall(r"^::: (\S+)$", "\n".join(text_of(page) for page in ALL if "/api/" in page), re.M))
    assert named <= files().keys(), named - files().keys()
    packages = {name for name, path in files().items() if path.name == "__init__.py" and "__all__" in path.read_text()}
    public = packages - {"dqa_plugins"}
    assert public <= named, public - named


@pages
def test_paths_exist(page: str) -> None:
    """`tests/core/test_grid.py`, `adapters/`, in code or in a link's text."""
    roots = "|".join(re.escape(path.name) for path in ROOT.iterdir() if path.is_dir() and path.name != ".git")
    for path in re.findall(rf"(?<![\w./-])((?:{roots})/[\w./-]*)", text_of(page)):
        assert (ROOT / path.rstrip(".")).exists(), f"{page} names {path}"


@pages
def test_modules_and_names_exist(page: str) -> None:
    """`dqa_plugins.grid.Grid` or `graph.names.SiteNames`: a module and, behind it, an attribute."""
    prefixes = "dqa_plugins|graph|host|qpp|storage|ranking|export"
    for name in sorted(set(re.findall(rf"`((?:{prefixes})(?:\.\w+)+)[`(]", text_of(page)))):
        if name.endswith(".py"):
            continue
        parts, found = name.removeprefix("dqa_plugins.").split("."), None
        for count in range(len(parts), -1, -1):
            try:
                found = importlib.import_module(".".join(["dqa_plugins", *parts[:count]]))
            except ModuleNotFoundError as error:
                if not str(error.name).startswith("dqa_plugins"):
                    pytest.skip(f"{error.name} is not installed")
                continue
            for attribute in parts[count:]:
                assert hasattr(found, attribute), f"{page} names {name}"
                found = getattr(found, attribute)
            break


@pages
def test_classes_have_what_is_said_of_them(page: str) -> None:
    """`Grid.tie_distance`."""
    known = {
        node.name: {ast.unparse(n.target) for n in node.body if isinstance(n, ast.AnnAssign)}
        | {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
        for path in files().values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    for kind, name in re.findall(r"`([A-Z]\w+)\.(\w+)[`(]", text_of(page)):
        if kind in known:
            assert name in known[kind], f"{page} names {kind}.{name}"


def drawn() -> tuple[dict[str, str], set[tuple[str, str]]]:
    """Of the diagram in the architecture: {node: file or folder}, and the arrows between them."""
    diagram = re.search(r"```mermaid\n(.*?)```", text_of("docs/architecture.md"), re.DOTALL)
    assert diagram
    labels = dict(re.findall(r"(\w+)\[\"([\w./]+):", diagram[1]))
    arrows = re.findall(r"^\s*(\w+)(?:\[.*?\])? --> (\w+)", diagram[1], re.MULTILINE)
    return labels, {(labels[a], labels[b]) for a, b in arrows}


def imported() -> set[tuple[str, str]]:
    """(file or folder that imports, file or folder imported), as the diagram calls them."""

    def part(name: str) -> str:
        first = name.split(".")[1]
        return f"{first}.py" if (ROOT / "dqa_plugins" / f"{first}.py").exists() else f"{first}/"

    known = files()
    pairs = {(name, other) for name, path in known.items() for other in imports(name, path, set(known))}
    inner = {(a, b) for a, b in pairs if a.count(".") and b.startswith("dqa_plugins.")}
    return {(part(a), part(b)) for a, b in inner if part(a) != part(b)}


def test_the_diagram_is_what_the_code_imports() -> None:
    """Every arrow is an import; between folders every import is an arrow."""
    labels, arrows = drawn()
    for name in labels.values():
        assert (ROOT / "dqa_plugins" / name).exists(), name
    assert arrows <= imported(), arrows - imported()
    between = {(a, b) for a, b in imported() if a.endswith("/") and b.endswith("/")}
    assert between <= arrows, between - arrows


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
