"""What each process of tests/distributed runs: `worker.py <jobs> <folder>`, under torchrun or started by hand."""

from __future__ import annotations

import copy
import datetime
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.ao.quantization.quantize_fx import convert_fx

from dqa_plugins import DQA, QPP, DenseSparse, iter_quantizers, rank_channels
from dqa_plugins.distributed import sample_offset, synchronize
from dqa_plugins.errors import RankLost
from tests.distributed import cases

SECONDS = float(os.environ.get("GROUP_SECONDS", "60"))  # timeout of the group


def equality(folder: Path, rank: int, ranks: int) -> None:
    """The states of all cases, saved for comparison."""
    found = {}
    for name, (_, _, dtype) in cases.CASES.items():
        before, after = cases.run(name, cases.own(rank, ranks, dtype), several=True)
        found |= {f"{name}/before/{key}": value for key, value in before.items()}
        found |= {f"{name}/after/{key}": value for key, value in after.items()}
    torch.save({k: v for k, v in found.items() if isinstance(v, Tensor)}, folder / f"{rank}.pt")


def ranking(folder: Path, rank: int, ranks: int) -> None:
    """The tables of all strategies; each rank names a checkpoint of its own, so that one can see who writes."""
    tables = {name: rank_it(folder / f"checkpoint{rank}.json").to_dict() for name, rank_it in cases.rankings().items()}
    resumed = cases.rankings()["greedy"](folder / f"checkpoint{rank}.json").to_dict()
    (folder / f"bits{rank}.json").write_text(json.dumps(cases.allocations(rank, ranks)))
    (folder / f"tables{rank}.json").write_text(json.dumps({**tables, "resumed": resumed}))


def wrapped(folder: Path, rank: int, ranks: int) -> None:
    """A model in DistributedDataParallel and one sharded by fully_shard calibrate like a plain one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    found = {}
    for kind in ("plain", "ddp", "fsdp2"):
        model = cases.prepared_fx(DQA(bits=3))
        outer = model
        if kind == "ddp":
            outer = DistributedDataParallel(model, broadcast_buffers=False)
        if kind == "fsdp2":
            fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
        with torch.no_grad():
            for x in cases.own(rank, ranks):
                outer(x)
        synchronize(outer)
        quantized = convert_fx(model)
        parameters = {n: q.state_dict() for n, q in iter_quantizers(quantized)}
        for name, state in parameters.items():
            found |= {f"{kind}/{name}.{key}": v for key, v in state.items() if isinstance(v, Tensor)}
        with torch.no_grad():
            found[f"{kind}/output"] = quantized(cases.batches(ranks)[0])
    torch.save(found, folder / f"wrapped{rank}.pt")


def _fed(method: Any, rank: int, ranks: int, *, batches: int = cases.PER_RANK, offset: int | None = None) -> nn.Module:
    model = cases.prepared_fx(method)
    if offset is not None:
        sample_offset(model, offset)
    with torch.no_grad():
        for x in cases.own(rank, ranks)[:batches]:
            model(x)
    return model


def _again(model: nn.Module, x: Tensor) -> nn.Module:
    synchronize(synchronize(model))
    with torch.no_grad():
        model(x)
    return model


def refusals(folder: Path, rank: int, ranks: int) -> None:
    """What must be refused, on every rank and at once; the group goes on working."""
    from torch.nn.parallel import DataParallel, DistributedDataParallel

    x = cases.own(rank, ranks)[0]
    qpp = DenseSparse(qparams=QPP())
    other = _fed(DQA(), rank, ranks)
    with torch.no_grad():
        next(other.parameters()).add_(rank)
    alike = _fed(DQA(), 0, ranks)
    pairs = [(x, torch.zeros(len(x), dtype=torch.int64))]

    def metric(outputs: Tensor, targets: Tensor) -> Tensor:
        if dist.get_rank() == dist.get_world_size() - 1:
            raise OSError("the disk of this rank is full")
        return -outputs.square().mean(1)

    def noisy(outputs: Tensor, targets: Tensor) -> Tensor:
        return -outputs.square().mean(1) + torch.rand(len(outputs))

    same = [(cases.own(0, ranks)[0], pairs[0][1])]
    attempts: dict[str, Callable[[], Any]] = {
        "uneven": lambda: synchronize(_fed(DQA(), rank, ranks, batches=1 + rank)),
        "no data": lambda: synchronize(_fed(DQA(), rank, ranks, batches=0)),
        "undeclared": lambda: synchronize(_fed(qpp, rank, ranks)),
        "declared wrongly": lambda: synchronize(_fed(qpp, rank, ranks, offset=7)),
        "declared late": lambda: sample_offset(_fed(qpp, rank, ranks), 20),
        "no number": lambda: sample_offset(_fed(qpp, rank, ranks), -1),
        "other weights": lambda: synchronize(other),
        "other methods": lambda: synchronize(_fed(DQA(bits=3 + rank), rank, ranks)),
        "other calls": lambda: (synchronize if rank else rank_channels)(_fed(DQA(), rank, ranks)),
        "went on": lambda: synchronize(_again(_fed(DQA(), rank, ranks), x)),
        "converted": lambda: synchronize(convert_fx(_fed(DQA(), rank, ranks))),
        "no quantizers": lambda: synchronize(cases.network()),
        "ddp": lambda: synchronize(DistributedDataParallel(_fed(DQA(), rank, ranks))),
        "replicas": lambda: synchronize(DataParallel(_fed(DQA(), rank, ranks))),
        "other batches": lambda: rank_channels(copy.deepcopy(alike), pairs, "taylor", progress=False),
        "not synchronized": lambda: rank_channels(_fed(DQA(), rank, ranks), same, "taylor", progress=False),
        "a rank raises": lambda: rank_channels(copy.deepcopy(alike), same, metric=metric, progress=False),
        "random metric": lambda: rank_channels(copy.deepcopy(alike), same, metric=noisy, progress=False),
    }
    told = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            told[name] = "nothing"
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"
    uneven = synchronize(_fed(DQA(), rank, ranks, batches=1 + rank), uneven=True)
    told["count"] = next(q.calibration.count for _, q in iter_quantizers(uneven))
    (folder / f"refusals{rank}.json").write_text(json.dumps(told))


def lost(folder: Path, rank: int, ranks: int) -> None:
    """The last rank dies before it synchronizes, the others learn it."""
    model = _fed(DQA(), rank, ranks)
    dist.barrier()
    if rank == ranks - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    _report_loss(model, folder / f"lost{rank}.json")
    os._exit(0)  # destroying a group that lost a rank may wait


def silent(folder: Path, rank: int, ranks: int) -> None:
    """The last rank never synchronizes, the others learn it when the timeout of their group is over."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=2))
    model = _fed(DQA(), rank, ranks)
    if rank < ranks - 1:
        _report_loss(model, folder / f"silent{rank}.json", group)
    dist.barrier()


def _report_loss(model: nn.Module, path: Path, group: Any = None) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    begun = time.monotonic()
    try:
        synchronize(model, group=group)
    except RankLost as error:
        unchanged = all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if key in before)
        told = {"message": str(error), "seconds": time.monotonic() - begun, "unchanged": unchanged}
        path.write_text(json.dumps(told))


JOBS = {job.__name__: job for job in (equality, ranking, wrapped, refusals, lost, silent)}


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=SECONDS))
    for job in sys.argv[1].split(","):
        JOBS[job](Path(sys.argv[2]), dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
