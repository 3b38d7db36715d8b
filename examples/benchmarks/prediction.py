"""Time of a network with predicted parameters beside static and dynamic ones.

    python -m examples.benchmarks.prediction --json

ResNet-18 (random weights, 3x96x96) through FX, every activation quantized by Dense+Sparse at 4 bits, weights in float,
features of the network's input; one thread, eager mode. All candidates take turns in one process, in shuffled order, on
memory that the process has already; times are medians of CPU time of the thread. For batches of 1 and of 32:
    paper_time_vs_static, extended_time_vs_static      QPP's two modes over static parameters; <= 1.05, <= 1.15
    paper_time_vs_dynamic, extended_time_vs_dynamic    the same over exact per-sample quantiles; < 1
    features_share                                     site features of the mode over its forward; <= 0.01
    features_share_by_mode
    static_ms                                          a forward with static parameters
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs as a file, too

from dqa_plugins import QPP, DenseSparse
from dqa_plugins.qpp.features import site_features
from examples.benchmarks.fake_quantize import quantized
from examples.benchmarks.machine import run
from examples.benchmarks.storage import Clock
from examples.networks.imagenet import resnet18

MODES = ("paper", "extended")


@torch.no_grad()
def measure(repeats: int) -> dict[str, Any]:
    """All fields."""
    generator = torch.Generator().manual_seed(0)
    # exposures differ: samples that look alike would have nothing to predict
    images = torch.rand(96, 3, 96, 96, generator=generator) * torch.linspace(0.3, 1.5, 96).reshape(-1, 1, 1, 1)
    images = images[torch.randperm(96, generator=generator)]
    calibration = list(images.split(32))
    sources: dict[str, Any] = {"static": "static", "dynamic": "dynamic"}
    sources |= {mode: QPP(mode=mode, sites=("input",)) for mode in MODES}
    networks = {
        name: quantized(resnet18(), DenseSparse(qparams=source), calibration) for name, source in sources.items()
    }
    result: dict[str, Any] = {}
    for batch in (1, 32):
        inputs = [images[i : i + batch] for i in (0, 32, 64)]
        jobs: dict[str, Any] = {name: lambda i, m=m, x=inputs: m(x[i % 3]) for name, m in networks.items()}
        jobs |= {f"{mode} features": lambda i, m=mode, x=inputs: site_features(x[i % 3], m) for mode in MODES}
        seconds = Clock(repeats * (4 if batch == 1 else 1)).run(jobs)
        shares = {mode: seconds[f"{mode} features"] / seconds[mode] for mode in MODES}
        result[f"batch_{batch}"] = {
            **{f"{mode}_time_vs_static": seconds[mode] / seconds["static"] for mode in MODES},
            **{f"{mode}_time_vs_dynamic": seconds[mode] / seconds["dynamic"] for mode in MODES},
            "features_share": max(shares.values()),
            "features_share_by_mode": shares,
            "static_ms": seconds["static"] * 1e3,
        }
    return result


if __name__ == "__main__":
    run(__doc__, measure, 15)
