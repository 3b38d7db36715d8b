"""The house: imports run one way, the core knows no host, and no file asks a method for its class."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOSTS = ("torchao", "brevitas", "nncf", "torch.ao", "transformers")
# who may know an exporter's or a report's package
BACKENDS = {"onnx", "onnxruntime", "onnxscript", "openvino", "executorch"}


def files() -> dict[str, Path]:
    """Module name -> file, of everything that is installed."""
    found = {}
    for base, prefix in ((ROOT / "dqa_plugins", "dqa_plugins"), (ROOT / "adapters", "dqa_plugins.adapters")):
        for path in sorted(base.rglob("*.py")):
            if base.name == "dqa_plugins" and "adapters" in path.relative_to(base).parts:
                continue  # the link to the other folder
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join([prefix, *(p for p in parts if p != "__init__")])] = path
    return found


def imports(name: str, path: Path, known: set[str]) -> set[str]:
    """Modules that a file imports, anywhere in it: at the top, inside functions, for type checkers only."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                start = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*start, base] if base else start)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in known else base)
    return found - {name}


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = files()
    return {name: imports(name, path, set(known)) for name, path in known.items()}


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """A circle of imports, [] if there is none."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done or name not in graph:
            return []
        for other in sorted(graph[name]):
            found = visit(other, [*way, name])
            if found:
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


def test_the_check_finds_circles() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_imports_make_no_circle(graph: dict[str, set[str]]) -> None:
    """Imports inside functions and for type checkers count."""
    found = cycle(graph)
    assert not found, " -> ".join(found)


def test_the_core_imports_no_host_and_no_room(graph: dict[str, set[str]]) -> None:
    wrong = {
        name: sorted(other for other in others if other.startswith(HOSTS) or ".adapters" in other)
        for name, others in graph.items()
        if ".adapters" not in name
    }
    assert not {name: others for name, others in wrong.items() if others}


def test_rooms_do_not_know_each_other(graph: dict[str, set[str]]) -> None:
    for name, others in graph.items():
        if name.count(".") >= 2 and ".adapters." in name:
            room = ".".join(name.split(".")[:3])
            foreign = [o for o in others if ".adapters." in o and not (o + ".").startswith(room + ".")]
            assert not foreign, f"{name} imports {foreign}"


def test_only_export_knows_backends(graph: dict[str, set[str]]) -> None:
    for name, others in graph.items():
        if ".export" not in name and ".adapters" not in name:
            known = {other.split(".")[0] for other in others} & BACKENDS
            assert not known, f"{name} imports {known}"


def test_methods_grid_functional_and_kernels_know_nobody_above_them(graph: dict[str, set[str]]) -> None:
    below = {"errors", "rounding", "grid", "functional", "method", "methods", "options", "prediction", "progress"}
    below |= {"search"}
    below |= {name.removeprefix("dqa_plugins.") for name in graph if name.startswith("dqa_plugins.kernels.")}
    for name in below:
        ours = {o for o in graph[f"dqa_plugins.{name}"] if o.startswith("dqa_plugins")}
        assert ours <= {f"dqa_plugins.{other}" for other in below}, f"{name} imports {ours}"


def test_nobody_asks_a_method_for_its_class() -> None:
    """Only the file that defines the methods may; a fifth one has to work everywhere."""
    classes = {"Direct", "DQA", "NoisyQuant", "DenseSparse"}
    for name, path in files().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                asked = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)} & classes
                assert not asked, f"{name}:{node.lineno} asks whether a method is a {asked}"


def test_no_file_is_longer_than_one_idea() -> None:
    long = {name: n for name, path in files().items() if (n := len(path.read_text().splitlines())) > 350}
    assert not long
