"""Calibration on 2 and 3 processes (torchrun, gloo, CPU): every rank ends with the model of one process."""

from __future__ import annotations

import json
import math
import os
import random
import socket
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dqa_plugins.distributed import sample_offset, synchronize
from dqa_plugins.errors import UnsupportedCombination
from dqa_plugins.exact import exact_sum
from tests.compare import same_bits
from tests.distributed import cases

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def torchrun(ranks: int, *script: str) -> subprocess.CompletedProcess[str]:
    """Run a script on several processes, one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *script]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT, env=ENVIRONMENT)


@pytest.fixture(scope="module", params=[2, 3], ids="{} ranks".format)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """All jobs, run once for each number of ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    jobs = "equality,ranking,wrapped,refusals,silent" if request.param == 2 else "equality,ranking"
    found = torchrun(request.param, "-m", "tests.distributed.worker", jobs, str(folder))
    assert found.returncode == 0, found.stderr[-6000:]
    return request.param, folder


@pytest.mark.parametrize("name", cases.CASES)
@pytest.mark.filterwarnings("ignore::dqa_plugins.errors.DQAWarning")
def test_every_rank_has_the_model_of_one_process(finished: tuple[int, Path], name: str) -> None:
    """Records before freezing and everything after it, bit for bit."""
    ranks, folder = finished
    before, after = cases.run(name, cases.batches(ranks, cases.CASES[name][2]), several=False)
    # the extra state of records tells that they are merged
    expected = {f"{name}/before/{k}": v for k, v in before.items() if not k.endswith("_extra_state")}
    expected |= {f"{name}/after/{k}": v for k, v in after.items()}
    expected = {k: v for k, v in expected.items() if isinstance(v, torch.Tensor)}
    for rank in range(ranks):
        found = torch.load(folder / f"{rank}.pt")
        assert expected.keys() <= found.keys()
        for key, value in expected.items():
            assert same_bits(found[key], value) or told(found[key]) == told(value), f"rank {rank}: {key}"


def told(state: torch.Tensor) -> dict[str, object]:
    """An extra state without the count of first executions, which a process keeps over all of its models."""
    assert state.dtype == torch.uint8, "only extra states may differ, in this"
    return {key: value for key, value in json.loads(bytes(state.numpy())).items() if key != "index"}


def test_every_rank_has_the_rank_table_of_one_process(finished: tuple[int, Path], tmp_path: Path) -> None:
    """Orders, scores and cross-entropies, of every strategy; only rank 0 writes its checkpoint, and all resume it."""
    ranks, folder = finished
    expected = {name: rank_it(tmp_path / "checkpoint.json").to_dict() for name, rank_it in cases.rankings().items()}
    for rank in range(ranks):
        found = json.loads((folder / f"tables{rank}.json").read_text())
        assert found.pop("resumed") == found["greedy"]
        for name, table in expected.items():
            assert found[name] == json.loads(json.dumps(table)), f"rank {rank}: {name}"
    assert [path.name for path in folder.glob("checkpoint*")] == ["checkpoint0.json"]
    assert json.loads((folder / "checkpoint0.json").read_text()) == json.loads(
        (tmp_path / "checkpoint.json").read_text()
    )


def test_every_rank_allocates_the_bits_of_one_process(finished: tuple[int, Path]) -> None:
    """With targets, with inputs alone (random projections) and without batches."""
    ranks, folder = finished
    expected = cases.allocations(0, 1)
    assert len({tuple(bits) for bits in expected.values()}) > 1
    for rank in range(ranks):
        assert json.loads((folder / f"bits{rank}.json").read_text()) == expected


def test_wrapped_and_sharded_models_calibrate_like_plain_ones(finished: tuple[int, Path]) -> None:
    """DistributedDataParallel without buffers, and FSDP2 (fully_shard) through FX convert."""
    ranks, folder = finished
    for rank in range(ranks) if ranks == 2 else ():
        found = torch.load(folder / f"wrapped{rank}.pt")
        plain = {k.removeprefix("plain/"): v for k, v in found.items() if k.startswith("plain/")}
        for key, value in plain.items():
            for kind in ("ddp", "fsdp2"):
                assert same_bits(found[f"{kind}/{key}"], value), f"rank {rank}: {kind} {key}"


REFUSED = {
    "uneven": "RanksDiffer: 'input.0' (DQA, 4 bits): ranks 0 to 1 saw 5, 10 samples",
    "no data": "UncalibratedQuantizer: synchronize: no rank has run",
    "undeclared": "RanksDiffer: 'input.0' (DenseSparse, 4 bits) learns from augmented samples",
    "declared wrongly": "RanksDiffer: 'input.0' (DenseSparse, 4 bits): rank 0 said sample_offset(prepared, samples=7) "
    "and calibrated on 20",
    "declared late": "has calibrated on samples 0 to 19, which are not those of rank 1 (20 to 39)",
    "no number": "UnsupportedCombination: sample_offset(samples=-1)",
    "other weights": "RanksDiffer: synchronize: ranks 0 and 1 differ in '0.0.weight'",
    "other methods": "RanksDiffer: synchronize: ranks 0 and 1 differ in 'input.0'",
    "other calls": "exchanges 'rank_channels'",
    "went on": "UnsupportedCombination: 'input.0' (DQA, 4 bits) saw 5 samples after an earlier synchronize",
    "converted": "UnsupportedCombination: the quantizers of this GraphModule are frozen",
    "no quantizers": "UnsupportedCombination: this Sequential has no quantizers",
    "ddp": "UnsupportedCombination: DistributedDataParallel overwrote",
    "replicas": "UnsupportedCombination: torch.nn.DataParallel",
    "other batches": "RanksDiffer: rank_channels: ranks 0 and 1 differ in 'batches'",
    "not synchronized": "RanksDiffer: rank_channels: ranks 0 and 1 differ in 'model'",
    "a rank raises": "OSError: the disk of this rank is full",
    "random metric": "UnsupportedCombination: ranking 'input.0': the model or the metric draws random numbers",
}


def test_refusals_name_the_layer_and_the_way_out_on_every_rank(finished: tuple[int, Path]) -> None:
    """None of them leaves a rank waiting: after each the same group goes on."""
    ranks, folder = finished
    for rank in range(ranks) if ranks == 2 else ():
        told = json.loads((folder / f"refusals{rank}.json").read_text())
        assert told.pop("count") == 15  # uneven=True
        assert told.keys() == REFUSED.keys()
        for name, start in REFUSED.items():
            assert start in told[name], f"rank {rank}, {name}: {told[name]}"


def test_a_rank_that_never_calls_is_an_error_within_the_timeout(finished: tuple[int, Path]) -> None:
    """Of the group that is given; the records are as they were."""
    ranks, folder = finished
    if ranks == 2:
        told = json.loads((folder / "silent0.json").read_text())
        assert told["unchanged"]
        assert 2 <= told["seconds"] < 15
        assert "rank 0 of 2 got no answer" in told["message"]


def test_a_killed_rank_is_an_error(tmp_path: Path) -> None:
    """The others get RankLost, and their records are as they were."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "GROUP_SECONDS": "20"}
    command = [sys.executable, "-m", "tests.distributed.worker", "lost", str(tmp_path)]
    started = [
        subprocess.Popen(command, cwd=ROOT, env={**ENVIRONMENT, **group, "RANK": str(rank)}) for rank in range(2)
    ]
    try:
        assert started[0].wait(90) == 0
    finally:
        for process in started:
            process.kill()
            process.wait()
    told = json.loads((tmp_path / "lost0.json").read_text())
    assert told["unchanged"]
    assert told["seconds"] < 30
    assert "rank 0 of 2 got no answer" in told["message"]


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a group nothing happens; under torchrun without one, merging would be forgotten in silence."""
    model = cases.by_hand(torch.float32)
    for x in cases.batches(1):
        model(x)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert sample_offset(model, 20) == 0
    assert synchronize(model) is model
    assert all(same_bits(value, before[key]) for key, value in model.state_dict().items())
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UnsupportedCombination, match="init_process_group"):
        synchronize(model)


@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=20), st.randoms())
def test_exact_sums_do_not_depend_on_order_or_grouping(values: list[float], chance: random.Random) -> None:
    """The parts are those of the exact sum, against fractions; however it is cut, the parts are the same."""
    column = torch.tensor(values, dtype=torch.float64)[:, None]
    whole = exact_sum(column)
    assert sum(map(Fraction, whole.flatten().tolist())) == sum(map(Fraction, values))
    assert float(whole[0]) == math.fsum(values)
    chance.shuffle(values)
    cut = chance.randint(0, len(values) - 1)
    shuffled = torch.tensor(values, dtype=torch.float64)[:, None]
    first = exact_sum(shuffled[:cut]) if cut else shuffled[:0]
    assert same_bits(exact_sum(torch.cat([first, shuffled[cut:]])), whole)
