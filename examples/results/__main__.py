"""Measure, and put the figures into the pages.

    python -m examples.results dqa_table1 qpp_tables     # measure these parts, then render README and docs
    python -m examples.results                           # render only
    python -m examples.results --check                   # fail if a page and its JSONs differ
    python -m examples.results --all --quick             # a small pass of everything, into out/results

A part measures only rows that its JSON lacks; delete the JSON, or run the script with --again, for all of them.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from examples.results import blocks_dqa, blocks_other, blocks_qpp, blocks_speed  # noqa: F401 - they register the blocks
from examples.results.pages import RESULTS, differing
from examples.results.parts import PARTS, measure


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 1 if --check finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--all", action="store_true", help="every part")
    parser.add_argument("--quick", action="store_true", help="small, into out/results; the pages stay as they are")
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if a page differs")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown:
        parser.error(f"no part is called {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if options.check:
        found = differing(write=False)
        for page in found:
            print(f"{page} and its JSONs differ: python -m examples.results renders it again", file=sys.stderr)
        return int(bool(found))
    for name in PARTS if options.all else options.parts:
        started = time.perf_counter()
        measure(name, Path("out/results") if options.quick else RESULTS, quick=options.quick)
        print(f"{name}: {time.perf_counter() - started:.0f} s")
    if not options.quick:
        print("\n".join(differing(write=True)) or "no page changes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
