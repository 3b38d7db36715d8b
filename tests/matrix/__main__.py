"""The support matrix, from the test results: `python -m tests.matrix`.

Runs tests/matrix and prints, for each adapter and method, how many cells hold; unsupported cells with their reason.
"""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from tests.matrix.rooms import METHODS, ROOMS, SOURCES

UNSUPPORTED = {
    "NoisyQuant(objective='output') in brevitas, nncf": "neither tells a quantizer which linear layer reads it; "
    "raises UnsupportedCombination",
    "IntQuantTensor of DenseSparse, NoisyQuant (brevitas return_quant_tensor=True)": "their values lie on no common "
    "integer grid; raises",
    "training (QAT) with QPP": "it is fitted once, to a network that no longer changes; raises UnsupportedCombination",
    "stored activations with QPP": "nothing tells pack what was predicted; raises UnsupportedCombination",
}


class _Collector:
    def __init__(self) -> None:
        self.cells: dict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        words = set(re.split(r"[\[\]-]", report.nodeid))
        for adapter in ROOMS:
            for source in SOURCES:
                for method in METHODS:
                    if {adapter, source, method} <= words:
                        self.cells[adapter, source, method][report.outcome] += 1


def main() -> int:
    """Run and print; the exit status is that of the tests."""
    collector = _Collector()
    status = pytest.main([str(Path(__file__).parent), "-q", "--no-header", *sys.argv[1:]], plugins=[collector])
    total = Counter[str]()
    print(f"\n| adapter | qparams | {' | '.join(METHODS)} |\n|---|---|{'---|' * len(METHODS)}")
    for adapter in ROOMS:
        for source in SOURCES:
            row = []
            for method in METHODS:
                found = collector.cells[adapter, source, method]
                total.update(found)
                row.append(f"{found['passed']} of {sum(found.values())}")
            print(f"| {adapter} | {source} | {' | '.join(row)} |")
    print(f"\n{total['passed']} of {sum(total.values())} cells hold. Not supported:")
    for what, reason in UNSUPPORTED.items():
        print(f"- {what}: {reason}.")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
