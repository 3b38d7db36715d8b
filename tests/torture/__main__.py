"""python -m tests.torture [--seconds 30] [--class NAME ...] [--seed N] [--json] [--list]"""

from __future__ import annotations

import argparse
import json
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

from rich.console import Console
from rich.table import Table

from tests.torture.engine import Count, run_classes
from tests.torture.registry import load

LONG = 300.0  # seconds from which slow classes have a turn


def as_table(counts: dict[str, Count]) -> Table:
    """One row per class."""
    table = Table("class", "cases", "right", "refused", "seconds", "defect", title="torture")
    for name, count in counts.items():
        numbers = (f"{count.cases:,}", f"{count.right:,}", f"{count.refused:,}", f"{count.seconds:.1f}")
        table.add_row(name, *numbers, count.defect[:60])
    totals = [sum(getattr(count, of) for count in counts.values()) for of in ("cases", "right", "refused")]
    defects = sum(bool(count.defect) for count in counts.values())
    table.add_row("all", *(f"{total:,}" for total in totals), "", f"{defects} defects" if defects else "none")
    for column in table.columns[1:5]:
        column.justify = "right"
    return table


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 1 where a defect was found."""
    classes = load()
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--class", dest="classes", action="append", choices=list(classes), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one object instead of a table")
    parser.add_argument("--list", action="store_true", help="the classes, with what each checks")
    options = parser.parse_args(arguments)
    if options.list:
        for name, found in classes.items():
            sys.stdout.write(f"{name}: {(found.check.__doc__ or '').splitlines()[0]}\n")
        return 0
    quick = [name for name, found in classes.items() if options.seconds >= LONG or not found.slow]
    chosen = [classes[name] for name in options.classes or quick]
    counts = run_classes(chosen, options.seconds, options.seed)
    defects = {name: count for name, count in counts.items() if count.defect}
    if options.json:
        found = {"seed": options.seed, "seconds": options.seconds}
        found |= {"cases": sum(count.cases for count in counts.values()), "defects": len(defects)}
        found["classes"] = {name: count.as_dict() for name, count in counts.items()}
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
        return int(bool(defects))
    console = Console()
    console.print(as_table(counts))
    for name, count in defects.items():
        console.print(f"\n[bold]{name}[/bold]: {count.defect}", highlight=False)
        sys.stdout.write(f"  from tests.torture.registry import load, replay\n  {count.reproducer}\n")
    return int(bool(defects))


if __name__ == "__main__":
    raise SystemExit(main())
