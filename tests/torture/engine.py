"""Runs classes for as long as it is told, each for its share of the time, and counts."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable

from .registry import CaseClass, Defect

SLICE = 1.0  # seconds that a class runs before the next one has its turn
MOST = 1000  # cases of one slice
FLOOR = 200  # cases before which a class goes before those that have them


@dataclass
class Count:
    """What happened in one class.

    Attributes:
        right: distinct cases with the right result.
        refused: distinct cases with a typed error.
        seconds: spent. turns: had. pace: seconds of a case in the last one.
        exhausted: the last turn drew no case that was not known.
        defect: the first one found, with its smallest case; "" if none was.
        reproducer: a line of Python that shows it again.
    """

    right: int = 0
    refused: int = 0
    seconds: float = 0.0
    turns: int = 0
    pace: float = 0.0
    exhausted: bool = False
    defect: str = ""
    reproducer: str = ""
    seen: set[int] = field(default_factory=set, repr=False)

    @property
    def cases(self) -> int:
        """Distinct cases."""
        return self.right + self.refused

    def as_dict(self) -> dict[str, Any]:
        """JSON-compatible."""
        found = {"cases": self.cases, "right": self.right, "refused": self.refused, "seconds": round(self.seconds, 2)}
        return found | ({"defect": self.defect, "reproducer": self.reproducer} if self.defect else {})


def run_class(found: CaseClass, count: Count, examples: int, number: int) -> None:
    """Run some examples of a class.

    Args:
        count: added to; a defect is written into it.
        examples: how many.
        number: the seed of the draws.
    """
    last: list[Any] = []

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
    )
    @seed(number)
    @given(found.strategy)
    def run(case: Any) -> None:
        last[:] = [case]
        right = found.run(case)
        key = hash(repr(case))
        if key not in count.seen:
            count.seen.add(key)
            count.right, count.refused = count.right + right, count.refused + (not right)

    start = time.perf_counter()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            run()
    except Unsatisfiable:
        pass  # few examples, and none of them could be made
    except Defect as defect:
        count.defect = str(defect)
        count.reproducer = f"replay({found.name!r}, {last[0]!r})"
    count.seconds += time.perf_counter() - start


def run_classes(classes: Iterable[CaseClass], seconds: float, number: int, *, every: bool = True) -> dict[str, Count]:
    """Run classes until the time is over; a class with a defect gets no more turns.

    The next turn is that of the class which has had the least time for its share, among those with fewer than FLOOR
    cases as long as there are any: a class whose cases take seconds gets as many of them as the time allows, and the
    cheap ones do not crowd it out.

    Args:
        seconds: in all.
        number: seed; the same seed and the same time give the same cases, as far as the machine is as fast.
        every: each class gets one turn at least, however little time there is.
    """
    classes = list(classes)
    counts = {found.name: Count() for found in classes}
    end = time.perf_counter() + seconds
    while waiting := [found for found in classes if not counts[found.name].defect]:
        found = min(waiting, key=lambda found: _turn_of(found, counts[found.name]))
        count = counts[found.name]
        if time.perf_counter() >= end and (count.turns or not every):
            break
        budget = min(SLICE, max(seconds / len(classes) / 2, 0.05)) * found.share
        # the first turn imports and compiles what a class needs: its pace says nothing
        examples = 1 if count.turns < 2 else max(1, min(MOST, int(budget / max(count.pace, 1e-4))))
        seconds_before, cases_before = count.seconds, count.cases
        run_class(found, count, examples, number * 1_000_003 + count.turns)
        count.pace = (count.seconds - seconds_before) / examples
        count.exhausted = count.turns > 2 and count.cases == cases_before
        count.turns += 1
    return counts


def _turn_of(found: CaseClass, count: Count) -> tuple[bool, bool, float]:
    """The class of the smallest one is next: those that never ran, those with few cases, those with little time."""
    return count.turns > 0, count.cases >= FLOOR or count.exhausted, count.seconds / found.share
