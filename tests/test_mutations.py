"""The lists of tests/mutations fit the code, and a sample of the faults is noticed. All of them: make mutations."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .mutations import ROOT, Mutation, all_mutations, mutate

MUTATIONS = all_mutations()
# of every part; each is noticed by a test that runs early, about two minutes in all on two cores
SAMPLE = [
    "core: halves go up, not to even",
    "core: clamp off by one above",
    "core: static: the last batch's maximum",
    "core: half() casts qparams",
    "graph: every in-place write is a loss",
    "host: clamps quantize their input",
    "fx: sites lose their names",
    "storage: outliers are not put back",
    "ranking: lowest score first",
    "qpp: quantiles of another level",
]


def test_names_tell_mutations_apart() -> None:
    names = [mutation.name for mutation in MUTATIONS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_applies(mutation: Mutation, tmp_path: Path) -> None:
    copy = tmp_path / mutation.file
    copy.parent.mkdir(parents=True)
    copy.write_text((ROOT / mutation.file).read_text())
    mutate(mutation, tmp_path)
    compile(copy.read_text(), mutation.file, "exec")
    assert any((ROOT / "tests" / test).exists() for test in mutation.tests)


def test_one_that_does_not_apply_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "grid.py").write_text("x = 1\nx = 1\n")
    for old, count in (("y = 1", 0), ("x = 1", 2)):
        with pytest.raises(ValueError, match=rf"'halves go up': grid\.py holds '{old}' {count} times"):
            mutate(Mutation("halves go up", "grid.py", old, "", ()), tmp_path)
    with pytest.raises(ValueError, match=r"gone\.py holds"):
        mutate(Mutation("halves go up", "gone.py", "x", "", ()), tmp_path)


@pytest.mark.slow
def test_a_sample_is_noticed() -> None:
    """In a process of its own: forks and the threads of this one do not go together."""
    assert not set(SAMPLE) - {mutation.name for mutation in MUTATIONS}
    found = subprocess.run(
        [sys.executable, "-m", "tests.mutations", "--jobs", "2", *SAMPLE],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
    assert f"{len(SAMPLE)} of {len(SAMPLE)} killed" in found.stdout
