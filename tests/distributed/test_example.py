"""The example calibrates a real network under torchrun."""

from __future__ import annotations

import pytest

from tests.distributed.test_synchronize import ROOT, torchrun


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_example_gives_every_rank_the_model_of_one_process(ranks: int) -> None:
    """ResNet-32 on digits: DQA, and one site with QPP."""
    found = torchrun(ranks, str(ROOT / "examples" / "distributed_calibration.py"))
    assert found.returncode == 0, found.stderr[-4000:]
    lines = [line for line in found.stdout.splitlines() if line.startswith("rank ")]
    assert len(lines) == ranks
    assert len({line.partition("model ")[2] for line in lines}) == 1
    assert f"{48 // ranks} images" in lines[0]
    assert "one process: the same model" in found.stdout
