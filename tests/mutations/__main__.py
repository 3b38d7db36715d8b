"""python -m tests.mutations [parts of names ...] [--list] [--jobs 2]"""

from __future__ import annotations

import argparse
import sys

from . import all_mutations
from .run import run


def main() -> int:
    """Exit status 1 if a mutation survives."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="names of the mutations to run, or parts of names; default: all")
    parser.add_argument("--list", action="store_true", help="name the mutations and stop")
    parser.add_argument("--jobs", type=int, default=2, help="at a time, one thread each")
    options = parser.parse_args()
    everything = all_mutations()
    chosen = [m for m in everything if m.name in options.names] or [
        m for m in everything if not options.names or any(part in m.name for part in options.names)
    ]
    if options.list:
        print("\n".join(m.name for m in chosen))
        return 0
    survived = []
    for result in run(chosen, options.jobs):
        if result.killer is None:
            survived.append(result.name)
        print(f"{result.seconds:5.0f} s  {result.name}: {result.killer or 'SURVIVED'}", flush=True)
        for test in result.ignored:
            print(f"         fails without it too: {test}")
    print(f"{len(chosen) - len(survived)} of {len(chosen)} killed", *survived, sep="\n  survived: ")
    return int(bool(survived))


if __name__ == "__main__":
    sys.exit(main())
