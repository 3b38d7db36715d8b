"""The command line, see the package."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from examples.zoo import run, table
from examples.zoo.hosts import ROOMS
from examples.zoo.networks import NETWORKS

DOCS = run.ROOT / "docs"
RESULTS = DOCS / "results" / "zoo.json"


def published() -> list[run.Cell]:
    """The cells of docs/results/zoo.json."""
    found: list[run.Cell] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    return found


def write_page(folder: Path) -> None:
    """docs/results/zoo.json of the cells in a folder, beside those that it has already, and docs/zoo.md of them."""
    by = {(cell["network"], cell["room"]): cell for cell in (*published(), *run.read(folder)) if "code" in cell}
    kept = [by[network, room] for network in NETWORKS for room in ROOMS if (network, room) in by]
    RESULTS.write_text(table.merged(kept), encoding="utf-8")
    (DOCS / "zoo.md").write_text(table.page(kept, NETWORKS), encoding="utf-8")


def in_turn(names: Iterable[str]) -> list[str]:
    """The first network of every kind, then the second, and so on: a run that is cut short has seen all kinds."""
    seen: Counter[str] = Counter()
    turns = {}
    for name in names:
        family = NETWORKS[name].family
        turns[name] = seen[family]
        seen[family] += 1
    return sorted(turns, key=turns.__getitem__)


parser = argparse.ArgumentParser(prog="python -m examples.zoo", description=__doc__)
parser.add_argument("--out", type=Path, default=Path("out/zoo"), help="folder of the cells, one JSON each")
parser.add_argument("--network", nargs="*", choices=NETWORKS, default=list(NETWORKS), metavar="NAME")
parser.add_argument("--room", nargs="*", choices=ROOMS, default=ROOMS)
parser.add_argument("--limit", type=float, default=run.LIMIT, help="seconds per cell")
parser.add_argument("--page", action="store_true", help="write docs/zoo.md of the cells that are there, run nothing")
parser.add_argument("--again", action="store_true", help="compute cells of another version of the code again")
if __name__ == "__main__":  # processes of cells import this file
    options = parser.parse_args()
    if options.page:
        write_page(options.out)
        sys.exit()
    run.restore(published(), options.out)
    cells = [(network, room) for network in in_turn(options.network) for room in options.room]
    run.run_all(cells, options.out, options.limit, options.again)
