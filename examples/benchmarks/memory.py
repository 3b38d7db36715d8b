"""Peak activation memory of a U-Net and a ResNet, FP32 against stored activations at 2 to 4 bits.

    python -m examples.benchmarks.memory --json

The peak is that of torch's CPU allocator over one forward pass, from the profiler's memory events: not arithmetic.
Beside it the bytes of the skips themselves and the run time. One object per network:
    peak_mb_fp32, peak_mb_<n>bit            peak over what was allocated before the pass, MB (1e6 bytes)
    skip_mb_fp32, skip_mb_<n>bit            what is held for the skips, tables included
    skip_share_<n>bit                       their ratio
    seconds_fp32, seconds_<n>bit            one pass, median of `--repeats`
and "machine": cores, threads, the load at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs as a file, too

from dqa_plugins import DQA
from dqa_plugins.storage import convert_stored, prepare_stored, storage_report
from examples.benchmarks.machine import machine
from examples.networks.resnet import ResNet
from examples.networks.unet import unet


def peak_bytes(model: nn.Module, x: Tensor) -> int:
    """Highest sum of torch's CPU allocations during one pass, over what was there before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        model(x)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def seconds(model: nn.Module, x: Tensor, repeats: int) -> float:
    """Median wall-clock time of one pass."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        model(x)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.no_grad()
def measure(model: nn.Module, x: Tensor, coding: str, repeats: int) -> dict[str, float]:
    """All fields of one network."""
    model(x)
    result = {"peak_mb_fp32": peak_bytes(model, x) / 1e6, "seconds_fp32": seconds(model, x, repeats)}
    for bits in (2, 3, 4):
        prepared = prepare_stored(model, DQA(bits=bits), x[:1])
        prepared(x)
        stored = convert_stored(prepared, coding)
        report = storage_report(stored, x)
        held = report.nbytes + report.codebook_nbytes
        result["skip_mb_fp32"] = report.float_nbytes / 1e6
        result[f"peak_mb_{bits}bit"] = peak_bytes(stored, x) / 1e6
        result[f"skip_mb_{bits}bit"] = held / 1e6
        result[f"skip_share_{bits}bit"] = held / report.float_nbytes
        result[f"seconds_{bits}bit"] = seconds(stored, x, repeats)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--size", type=int, default=512, help="height and width of the U-Net's input")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--coding", default="joint")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    images = torch.rand(arguments.batch, 1, arguments.size, arguments.size)
    small = torch.rand(64, 3, 32, 32)
    result = {
        "unet": measure(unet().eval(), images, arguments.coding, arguments.repeats),
        "resnet32": measure(ResNet(5, in_channels=3).eval(), small, arguments.coding, arguments.repeats),
    }
    if arguments.json:
        print(json.dumps({**result, "machine": machine()}, indent=2))
        return
    for name, fields in result.items():
        print(name)
        for field, value in fields.items():
            print(f"  {field:20s} {value:10.3f}")


if __name__ == "__main__":
    main()
