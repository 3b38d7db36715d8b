"""Time of prepare, calibrate and convert, and of to_onnx, beside those of the host alone.

    python -m examples.benchmarks.pipeline [--json FILE] [--runs N]

One process, one thread; the variants run in shuffled turns, and medians of the CPU seconds of the thread are taken, so
that a busy machine falls on all of them alike.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from dqa_plugins import DQA, DenseSparse, Direct, NoisyQuant
from dqa_plugins.adapters import fx
from dqa_plugins.export import to_onnx
from examples.benchmarks.machine import machine
from examples.networks.resnet import resnet20
from examples.quiet import quiet_hosts

METHODS = {"Direct": Direct(), "DQA": DQA(), "NoisyQuant": NoisyQuant(), "DenseSparse": DenseSparse()}


def pipeline(model: nn.Module, mapping: Any, batches: list[Tensor]) -> nn.Module:
    """FX's own three steps."""
    prepared = prepare_fx(model, mapping, (batches[0],))
    with torch.no_grad():
        for batch in batches:
            prepared(batch)
    converted: nn.Module = convert_fx(prepared)
    return converted


def float_export(model: nn.Module, x: Tensor, path: str) -> None:
    """torch's own exporter."""
    batch = ({0: torch.export.Dim("batch", min=1, max=1024)},)
    torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=batch, opset_version=21, verbose=False)


def times(work: dict[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """Median CPU seconds of each piece of work, in shuffled turns; the first turn is not counted."""
    found: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(runs + 1):
        for name in random.Random(turn).sample(sorted(work), len(work)):
            begun = time.thread_time()
            work[name]()
            if turn:
                found[name].append(time.thread_time() - begun)
    return {name: round(median(seconds), 3) for name, seconds in found.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    quiet_hosts()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, batches = resnet20().eval(), [torch.randn(16, 1, 32, 32) for _ in range(4)]
    mappings = {name: fx.get_qconfig_mapping(method) for name, method in METHODS.items()}
    mappings["stock int8"] = get_default_qconfig_mapping("x86")
    whole = times({n: lambda m=m: pipeline(model, m, batches) for n, m in mappings.items()}, given.runs)
    quantized = {name: pipeline(model, mappings[name], batches) for name in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        work: dict[str, Callable[[], Any]] = {"float": lambda: float_export(model, batches[0], path)}
        for name, network in quantized.items():
            work[name] = lambda network=network: to_onnx(network, batches[0], path)
        export = times(work, given.runs)
    found = {
        "network": "ResNet-20, (16, 1, 32, 32), four batches, FX",
        "pipeline": {n: {"seconds": s, "of stock": round(s / whole["stock int8"], 2)} for n, s in whole.items()},
        "to_onnx": {n: {"seconds": s, "of float": round(s / export["float"], 2)} for n, s in export.items()},
        "runs": given.runs,
        "machine": machine(),
    }
    for part in ("pipeline", "to_onnx"):
        print(part)
        for name, row in found[part].items():
            print(f"  {name:12}" + "".join(f"  {value:7.2f} {what}" for what, value in row.items()))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
