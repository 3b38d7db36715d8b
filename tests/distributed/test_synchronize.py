"""Calibration on 2 and 3 processes (torchrun, gloo, CPU): every rank ends with the model of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.compare import same_bits
from tests.distributed import cases

ROOT = Path(__file__).parents[2]


def torchrun(ranks: int, jobs: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run jobs of the worker on several processes, one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", "tests.distributed.worker", jobs, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=environment,
    )


@pytest.fixture(scope="module", params=[2, 3], ids="{} ranks".format)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """All jobs, run once for each number of ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    found = torchrun(request.param, "equality", folder)
    assert found.returncode == 0, found.stderr[-6000:]
    return request.param, folder


@pytest.mark.parametrize("name", cases.CASES)
@pytest.mark.filterwarnings("ignore::dqa_plugins.errors.DQAWarning")
def test_every_rank_has_the_model_of_one_process(finished: tuple[int, Path], name: str) -> None:
    """Records before freezing and everything after it, bit for bit."""
    ranks, folder = finished
    before, after = cases.run(name, cases.batches(ranks, cases.CASES[name][2]), several=False)
    expected = {f"{name}/before/{k}": v for k, v in before.items()} | {f"{name}/after/{k}": v for k, v in after.items()}
    expected = {k: v for k, v in expected.items() if isinstance(v, torch.Tensor)}
    for rank in range(ranks):
        found = {k: v for k, v in torch.load(folder / f"{rank}.pt").items() if k.startswith(f"{name}/")}
        assert found.keys() == expected.keys()
        for key, value in found.items():
            if key.endswith("_extra_state"):  # the number of synchronized samples differs before freezing
                continue
            assert same_bits(value, expected[key]), f"rank {rank}: {key}"
