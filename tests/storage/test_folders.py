"""The folders of storage know only what they are for, and imports among them make no circle."""

from __future__ import annotations

import pytest

from tests.test_structure import cycle, files, imports

_ABOVE = ("dqa_plugins.quantizer", "dqa_plugins.method", "dqa_plugins.storage.model", "torch.nn")
FORBIDDEN = {  # folder: what none of its files may import
    "dqa_plugins.storage.format": (*_ABOVE, "dqa_plugins.storage.coder"),
    "dqa_plugins.storage.coder": _ABOVE,
}


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = files()
    found = {name: imports(name, path, set(known)) for name, path in known.items()}
    return {name: needed for name, needed in found.items() if name.startswith("dqa_plugins.storage")}


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_a_folder_knows_nothing_above_it(folder: str, graph: dict[str, set[str]]) -> None:
    for name, needed in graph.items():
        if name.startswith(folder):
            assert not [n for n in needed if n.startswith(FORBIDDEN[folder])], name


def test_no_circles(graph: dict[str, set[str]]) -> None:
    assert not cycle(graph)
