"""A short run of every class of the adversarial suite, and that the suite finds what it is for."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import strategies as st

from dqa_plugins.errors import InvalidMethod
from tests.torture import engine
from tests.torture.engine import Count, run_class, run_classes
from tests.torture.registry import CaseClass, load

QUICK = [name for name, found in load().items() if not found.slow]
SLOW = [name for name, found in load().items() if found.slow and not name.startswith("2^24")]


@pytest.mark.parametrize("name", QUICK)
def test_no_defect(name: str) -> None:
    """About 30 seconds in all; `make torture` takes longer looks, with other seeds."""
    found, count = load()[name], Count()
    run_class(found, count, 3 if name in ("networks", "threads of torch", "fork and spawn") else 20, number=7)
    assert not count.defect, f"{count.defect}\nfrom tests.torture.registry import replay\n{count.reproducer}"
    assert count.cases


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_no_defect_in_slow_classes(name: str) -> None:
    """Two cases of each: that they still run."""
    found, count = load()[name], Count()
    run_class(found, count, 2, number=7)
    assert not count.defect, f"{count.defect}\nfrom tests.torture.registry import replay\n{count.reproducer}"


def test_a_dear_class_gets_its_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the time, and not of the cases: first until it has enough of them, then as much as a cheap one."""
    monkeypatch.setattr(engine, "FLOOR", 20)
    cheap = CaseClass("cheap", st.integers(), lambda _: None, names=())
    dear = CaseClass("dear", st.integers(), lambda _: time.sleep(0.01), names=())
    counts = run_classes([cheap, dear], 2.0, number=3)
    assert counts["dear"].cases >= 20
    assert counts["dear"].seconds > 0.3 * counts["cheap"].seconds
    assert counts["cheap"].seconds > 0.1 * counts["dear"].seconds
    assert counts["cheap"].cases > 3 * counts["dear"].cases


def check(case: int) -> None:
    """One number in ten is wrong, one is refused, one is an error of somebody else."""
    if case % 10 == 7:
        raise InvalidMethod("the number 7 cannot be; give another one, as the manual says.")
    if case == 58:
        raise InvalidMethod("no.")
    assert case != 44, "44 is wrong"
    if case > 60:
        raise KeyError(case)


@pytest.mark.parametrize(
    ("numbers", "text", "smallest"),
    [
        (st.integers(0, 43), "", ""),
        (st.integers(40, 50), "wrong result: 44 is wrong", "44"),
        (st.integers(50, 60), "does not explain itself", "58"),
        (st.integers(60, 999), "an error of somebody else, KeyError", "61"),
    ],
)
def test_defects_are_found_and_shrunk(numbers: st.SearchStrategy[int], text: str, smallest: str) -> None:
    count = Count()
    run_class(CaseClass("numbers", numbers, check, names=()), count, 200, number=0)
    assert text in count.defect
    assert bool(count.defect) == bool(text)
    assert count.reproducer == (f"replay('numbers', {smallest})" if smallest else "")
    if not text:
        assert count.refused == 4
        assert count.cases == 44


def test_the_command_line() -> None:
    command = [sys.executable, "-m", "tests.torture", "--seconds", "1", "--class", "objects", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True)
    found = json.loads(done.stdout)
    assert found["defects"] == 0
    assert found["classes"]["objects"]["cases"] == found["cases"] > 0
