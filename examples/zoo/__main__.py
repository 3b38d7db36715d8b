"""The command line, see the package."""

from __future__ import annotations

import argparse
from pathlib import Path

from examples.zoo import run
from examples.zoo.hosts import ROOMS
from examples.zoo.networks import NETWORKS

parser = argparse.ArgumentParser(prog="python -m examples.zoo", description=__doc__)
parser.add_argument("--out", type=Path, default=Path("out/zoo"), help="folder of the cells, one JSON each")
parser.add_argument("--network", nargs="*", choices=NETWORKS, default=list(NETWORKS), metavar="NAME")
parser.add_argument("--room", nargs="*", choices=ROOMS, default=ROOMS)
parser.add_argument("--limit", type=float, default=run.LIMIT, help="seconds per cell")
parser.add_argument("--again", action="store_true", help="compute cells of another version of the code again")
if __name__ == "__main__":  # processes of cells import this file
    options = parser.parse_args()
    cells = [(network, room) for network in options.network for room in options.room]
    run.run_all(cells, options.out, options.limit, options.again)
