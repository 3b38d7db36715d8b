"""What each process of tests/distributed runs under torchrun: `worker.py <job> <folder>`."""

from __future__ import annotations

import datetime
import sys
import warnings
from pathlib import Path

import torch
from torch import distributed as dist

from tests.distributed import cases

SECONDS = 20  # timeout of the group


def equality(folder: Path, rank: int, ranks: int) -> None:
    """The states of all cases, saved for comparison."""
    found = {}
    for name, (_, _, dtype) in cases.CASES.items():
        before, after = cases.run(name, cases.own(rank, ranks, dtype), several=True)
        found |= {f"{name}/before/{key}": value for key, value in before.items()}
        found |= {f"{name}/after/{key}": value for key, value in after.items()}
    torch.save({k: v for k, v in found.items() if isinstance(v, torch.Tensor)}, folder / f"{rank}.pt")


JOBS = {"equality": equality}


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=SECONDS))
    folder = Path(sys.argv[2])
    for job in sys.argv[1].split(","):
        JOBS[job](folder, dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
