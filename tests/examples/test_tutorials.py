"""Every tutorial runs as it stands, and prints what the page says."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from tests.examples.tutorials import FOLDER, PAGES, execute, run, start

for package in ("sklearn", "torchao", "brevitas", "nncf", "transformers", "openvino", "onnxscript"):
    pytest.importorskip(package)

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
_SHARE = re.compile(r"([\d.]+) ?%")
_begun: dict[str, dict[str, Any]] = {}  # {code that pages go on from: what it leaves}, trained once per process


def begin(code: str) -> dict[str, Any]:
    """The namespace that a page begins in."""
    if code not in _begun:
        _begun[code] = {"__name__": "tutorial"}
        execute(code, _begun[code], "start")
    networks = {"model", "language_model"} & _begun[code].keys()
    return _begun[code] | {name: copy.deepcopy(_begun[code][name]) for name in networks}


def compare(said: str, printed: str) -> None:
    """The same words, and figures within 6 percentage points: they differ by machine, columns with them."""
    words = [" ".join(_NUMBER.sub("N", text).split()) for text in (said, printed)]
    assert words[0] == words[1], f"the page says\n{said}\nand the code prints\n{printed}"
    lines = [line for text in (said, printed) for line in [_SHARE.findall(text)]]
    for ours, theirs in zip(*lines, strict=True):
        assert abs(float(ours) - float(theirs)) <= 6, f"the page says {ours} %, the code prints {theirs} %"


@pytest.mark.slow
@pytest.mark.xdist_group("tutorials")
@pytest.mark.filterwarnings("ignore")  # of the hosts; the next line comes later and goes first
@pytest.mark.filterwarnings("error::dqa_plugins.errors.DQAWarning")
@pytest.mark.parametrize("name", PAGES)
def test_a_tutorial(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = FOLDER / f"{name}.md"
    monkeypatch.chdir(tmp_path)
    met: list[str] = []

    def check(said: str, printed: str) -> None:
        compare(said, printed)
        met.append(said)

    run(page, begin(start(page)), check)
    assert met, f"{page.name} shows no output"


def test_a_page_that_says_something_else_fails() -> None:
    compare("float 95.5 %, 3 sites\n", "float 94.1 %, 12 sites\n")
    for said in ("float 75.5 %, 3 sites\n", "float 95.5 %, 3 layers\n"):
        with pytest.raises(AssertionError):
            compare(said, "float 95.5 %, 3 sites\n")
