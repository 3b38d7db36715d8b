"""Faults to break the package with, one at a time, and what runs them: `python -m tests.mutations` (make mutations).

A suite that only looks at shapes lets most of these through. Each file lists the faults of one part, as exact
replacements of source text: a text that is not there exactly once is an error that names the mutation, so that the
lists cannot rot in silence.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Mutation(NamedTuple):
    """One fault.

    Args:
        name: what is broken, in a few words.
        file: below the root, as dqa_plugins/grid.py.
        old, new: the text that is replaced, and by what.
        tests: paths below tests/, those that are likely to notice first.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


class Part:
    """The mutations of one part of the package.

    Args:
        name: of the part, in front of its mutations' names.
        folder: below the root, where its files are.
        tests: paths below tests/ that may notice.
    """

    def __init__(self, name: str, folder: str, *tests: str) -> None:
        self.name, self.folder, self.tests = name, folder, tests
        self.mutations: list[Mutation] = []

    def add(self, name: str, file: str, old: str, new: str, *first: str) -> None:
        """A mutation; `first`: tests to ask before the part's others."""
        tests = (*first, *(test for test in self.tests if test not in first))
        self.mutations.append(Mutation(f"{self.name}: {name}", f"{self.folder}/{file}", old, new, tests))


def mutate(mutation: Mutation, root: Path) -> None:
    """Edit the files below a root.

    Raises:
        ValueError: the file is not there, or does not hold the text exactly once.
    """
    path = root / mutation.file
    text = path.read_text() if path.exists() else ""
    if (count := text.count(mutation.old)) != 1:
        raise ValueError(
            f"mutation '{mutation.name}': {mutation.file} holds {mutation.old!r} {count} times; it must hold it once. "
            f"Adapt tests/mutations."
        )
    path.write_text(text.replace(mutation.old, mutation.new))


def all_mutations() -> list[Mutation]:
    """Of every part."""
    from . import cache, core, export, kernels, placement, qpp, ranking, rooms, storage

    whole = (core, storage, kernels, export, ranking, qpp)
    parts = (*(module.PART for module in whole), *placement.PARTS, *rooms.PARTS, *cache.PARTS)
    return [mutation for part in parts for mutation in part.mutations]
