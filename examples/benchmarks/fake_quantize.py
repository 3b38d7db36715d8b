"""Time of fake quantization and calibration: of one tensor beside a copy and torch.ao, and of whole networks.

    python -m examples.benchmarks.fake_quantize --json

A 32x64x56x56 float32 activation behind a ReLU, one thread, eager mode. All candidates take turns in one process, in
shuffled order, on memory that the process has already; times are medians of CPU time of the thread (wall-clock for two
threads). Fields, ratios all:
    vs_clone                          by method: time of a frozen quantizer's forward over that of x.clone(); <= 1.5
    speedup_vs_torch_ao_fake_quantize by method: torch.ao's FakeQuantize (per channel: DQA) over ours; >= 8
    time_vs_minmax_observer           by method: the statistic of calibration over torch.ao's MinMaxObserver; <= 2
    quantile_time_vs_minmax_observer  the same where it has quantiles; <= 4
    speedup_vs_torch_quantile         torch.quantile of each sample (0.99) over ours; >= 50
    two_threads_speedup               wall-clock of one thread over that of two; two_threads_speedup_busy: while another
                                      process keeps a core busy
and for ResNet-18 and MobileNetV2 (random weights, convolutions and norms fused, 3x96x96, batches of 32, through FX),
of the slowest method, each method beside it (`..._by_method`):
    calibration_time_vs_torch_ao      forward of our prepared network over that with torch.ao's default observers; <= 1
    static_time_vs_float              forward with static parameters over that of the float network; <= 1.3
    dynamic_time_vs_float             with dynamic ones; <= 1.5
"""

from __future__ import annotations

import copy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs as a file, too

from dqa_plugins import DQA, ActivationQuantizer, DenseSparse, Direct, Method, NoisyQuant
from dqa_plugins.adapters.fx import get_qconfig_mapping
from dqa_plugins.ranges import measure, quantiles
from examples.benchmarks.machine import run
from examples.benchmarks.storage import Clock
from examples.networks.imagenet import mobilenetv2, resnet18

SHAPE = (32, 64, 56, 56)
METHODS: dict[str, Method] = {
    "direct": Direct(),
    "dqa": DQA(),
    "noisyquant": NoisyQuant(),
    "dense_sparse": DenseSparse(),
}
OBSERVED: dict[str, Method] = {
    "tensor": Direct(),
    "channel": Direct(granularity="channel"),
    "range": Direct(symmetric=False),
    "clip": Direct(clip=0.999),
    "dense_sparse": DenseSparse(),
}
QUANTILES = ("clip", "dense_sparse")
NETWORKS = {"resnet18": resnet18, "mobilenetv2": mobilenetv2}


def frozen(method: Method, x: Tensor) -> ActivationQuantizer:
    """A quantizer calibrated on x."""
    quantizer = ActivationQuantizer(method, name="site")
    quantizer(x)
    return quantizer.freeze()


def theirs(x: Tensor) -> dict[str, nn.Module]:
    """torch.ao's fake quantizers in the state in which they only quantize, per tensor and per channel."""
    from torch.ao.quantization import FakeQuantize, MinMaxObserver, PerChannelMinMaxObserver

    found: dict[str, nn.Module] = {}
    for name, observer, scheme in (
        ("tensor", MinMaxObserver, torch.per_tensor_affine),
        ("channel", PerChannelMinMaxObserver, torch.per_channel_affine),
    ):
        fields = {"ch_axis": 1} if name == "channel" else {}
        module = FakeQuantize(observer, quant_min=0, quant_max=15, dtype=torch.quint8, qscheme=scheme, **fields)
        module(x)
        module.disable_observer()
        found[name] = module
    return found


@torch.no_grad()
def one_tensor(repeats: int) -> dict[str, Any]:
    """The fields of the single activation."""
    from torch.ao.quantization import MinMaxObserver

    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(SHAPE, generator=generator).relu() for _ in range(3)]
    ours = {name: frozen(method, inputs[0]) for name, method in METHODS.items()}
    ao, minmax = theirs(inputs[0]), MinMaxObserver()
    jobs: dict[str, Callable[[int], Any]] = {"clone": lambda i: inputs[i % 3].clone()}
    for name, quantizer in ours.items():
        jobs[name] = lambda i, q=quantizer: q(inputs[i % 3])
    for name, module in ao.items():
        jobs[f"ao {name}"] = lambda i, m=module: m(inputs[i % 3])
    jobs["minmax"] = lambda i: minmax(inputs[i % 3])
    for name, method in OBSERVED.items():
        jobs[f"observe {name}"] = lambda i, m=method: measure(inputs[i % 3], m, 1)
    jobs["quantile"] = lambda i: quantiles(inputs[i % 3].flatten(1), (0.99,))
    seconds = Clock(repeats).run(jobs)
    slow = Clock(3).run({"quantile": lambda i: torch.quantile(inputs[i % 3].flatten(1), 0.99, dim=1)})
    observed = {name: seconds[f"observe {name}"] / seconds["minmax"] for name in OBSERVED}
    per = {name: seconds["ao channel" if name == "dqa" else "ao tensor"] for name in METHODS}
    return {
        "vs_clone": {name: seconds[name] / seconds["clone"] for name in METHODS},
        "speedup_vs_torch_ao_fake_quantize": {name: per[name] / seconds[name] for name in METHODS},
        "time_vs_minmax_observer": {name: v for name, v in observed.items() if name not in QUANTILES},
        "quantile_time_vs_minmax_observer": {name: observed[name] for name in QUANTILES},
        "speedup_vs_torch_quantile": slow["quantile"] / seconds["quantile"],
        "clone_ms": seconds["clone"] * 1e3,
        **two_threads(ours["direct"], inputs, repeats),
    }


def two_threads(quantizer: ActivationQuantizer, inputs: list[Tensor], repeats: int) -> dict[str, float]:
    """Speed of two threads over one by the wall clock, on a machine as it is and with a core kept busy."""

    def job(threads: int) -> Callable[[int], Any]:
        def run(turn: int) -> Tensor:
            torch.set_num_threads(threads)
            return quantizer(inputs[turn % 3])

        return run

    found = {}
    for suffix in ("", "_busy"):
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if suffix else None
        try:
            seconds = Clock(repeats, time.perf_counter).run({str(threads): job(threads) for threads in (1, 2)})
        finally:
            if other is not None:
                other.kill()
                other.wait()
        found[f"two_threads_speedup{suffix}"] = seconds["1"] / seconds["2"]
    torch.set_num_threads(1)
    return found


def prepared(model: nn.Module, mapping: Any, x: Tensor) -> nn.Module:
    """A copy with observers, by FX."""
    from torch.ao.quantization.quantize_fx import prepare_fx

    return prepare_fx(copy.deepcopy(model), mapping, (x,))


def quantized(model: nn.Module, method: Method, batches: list[Tensor]) -> nn.Module:
    """The network with its activations quantized, weights in float."""
    from torch.ao.quantization.quantize_fx import convert_fx

    found = prepared(model, get_qconfig_mapping(method, weight_bits=None), batches[0])
    for batch in batches:
        found(batch)
    converted: nn.Module = convert_fx(found)
    return converted


@torch.no_grad()
def network(make: Callable[[], nn.Module], repeats: int) -> dict[str, Any]:
    """The fields of a network."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import fuse_fx

    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(32, 3, 96, 96, generator=generator) for _ in range(3)]
    model = make()
    networks = {
        "float": fuse_fx(copy.deepcopy(model)),
        "ao": prepared(model, get_default_qconfig_mapping(), batches[0]),
    }
    for name, method in METHODS.items():
        networks[f"calibration {name}"] = prepared(model, get_qconfig_mapping(method, weight_bits=None), batches[0])
        networks[f"static {name}"] = quantized(model, method, batches)
        networks[f"dynamic {name}"] = quantized(model, method.replace(qparams="dynamic"), batches)
    seconds = Clock(repeats).run({name: lambda i, m=m: m(batches[i % 3]) for name, m in networks.items()})
    found: dict[str, Any] = {"float_ms": seconds["float"] * 1e3}
    for field, prefix, base in (
        ("calibration_time_vs_torch_ao", "calibration", "ao"),
        ("static_time_vs_float", "static", "float"),
        ("dynamic_time_vs_float", "dynamic", "float"),
    ):
        ratios = {name: seconds[f"{prefix} {name}"] / seconds[base] for name in METHODS}
        found[field], found[f"{field}_by_method"] = max(ratios.values()), ratios
    return found


def measure_all(repeats: int) -> dict[str, Any]:
    """All fields."""
    networks = {name: network(make, max(3, repeats // 3)) for name, make in NETWORKS.items()}
    return {**one_tensor(repeats), **networks}


if __name__ == "__main__":
    run(__doc__, measure_all, 25)
