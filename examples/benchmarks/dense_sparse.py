"""Dense+Sparse and DQA in int8 against float and plain int8 (QPP paper, Table 1 and figure 6).

    python -m examples.benchmarks.dense_sparse --json

One convolution, 64 channels at 56x56, 3x3, 64 filters, and a ResNet-18 at 224 px, batch 1, one thread. Each time is the
median thread CPU time over runs in shuffled order with rotating inputs, on memory that the process has already; only
ratios of one run mean something. Plain
int8 ("dynamic") takes the extremes of the input by the same compiled passes. Thresholds of "predicted" are given to the
convolution; in the ResNet-18 they are computed from the features of the input.

    ds_predicted_1pct_time_vs_dynamic_int8          D+S with 1% outliers over plain dynamic int8
    ds_predicted_1pct_speedup_vs_prepacked_fp32     float with a prepacked weight over the same
    resnet18_time_vs_dynamic_int8, resnet18_speedup_vs_fp32     the network with QPP, features included
    dqa_time_vs_torch_static_int8                   the network with static DQA over torch's int8 convolutions
    convolution_us, convolution_vs_dynamic          Table 1: by row; D+S rows by density in percent
    layers_ms                                       figure 6: time of 1 to 8 convolutions in a row
    resnet18_ms, resnet18_parts                     times, and where that of a predicted forward goes
and "machine". `--plot` writes figure 6.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from brevitas.graph.calibrate import calibration_mode
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs as a file, too

from dqa_plugins import DQA, QPP, DenseSparse, Direct
from dqa_plugins.adapters.brevitas import substitute_layers
from dqa_plugins.adapters.fx import quantize_model
from dqa_plugins.grid import Grid
from dqa_plugins.host.weights import QuantizedWeight, hold
from dqa_plugins.quantizer import ActivationQuantizer
from dqa_plugins.runtime import engine, lower
from dqa_plugins.runtime.layers import Int8Conv2d
from dqa_plugins.runtime.quantizer import Int8Quantizer
from examples.benchmarks.machine import keep_freed_memory, machine
from examples.quiet import quiet_hosts

DENSITIES = (0.0, 0.5, 1.0, 2.0, 6.0)  # percent
INPUTS = 8
Runs = dict[str, Callable[[int], Any]]


def medians(runs: Runs, rounds: int) -> dict[str, float]:
    """Seconds of thread CPU time of each run, called with the number of an input."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for i in range(INPUTS):
            run(i)
    for turn in range(rounds):
        names = list(runs)
        random.Random(turn).shuffle(names)
        for name in names:
            start = time.thread_time_ns()
            runs[name](turn % INPUTS)
            times[name].append((time.thread_time_ns() - start) / 1e9)
    return {name: statistics.median(found) for name, found in times.items()}


class Prepacked(nn.Module):
    """A float convolution, and a ReLU, on a weight that oneDNN laid out for one shape."""

    def __init__(self, conv: nn.Conv2d, x: Tensor, activation: str = "none") -> None:
        super().__init__()
        self.geometry = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        self.bias, self.activation = conv.bias, activation
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(conv.weight.data, *self.geometry, list(x.shape))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, *self.geometry, self.activation, [], ""
        )
        return found


def int8_conv(conv: nn.Conv2d) -> Int8Conv2d:
    """With a weight of one scale per filter."""
    scale = conv.weight.detach().abs().amax((1, 2, 3)) / 127
    codes = torch.round(conv.weight.detach() / scale.reshape(-1, 1, 1, 1)).to(torch.int8)
    geometry = (list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)
    return Int8Conv2d(codes, scale, conv.bias.detach(), "conv", *geometry)


def by_sample(method: Any) -> Int8Quantizer:
    """A quantizer of dynamic or predicted qparams, in front of a convolution."""
    quantizer = ActivationQuantizer(method, name="site")
    quantizer(torch.rand(4, 64, 8, 8))
    with warnings.catch_warnings(record=True):  # that it is static: predictions are given, no regression is fitted
        quantizer.freeze()
    return Int8Quantizer("site", quantizer, channels_last=True)


def convolution(rounds: int) -> tuple[dict[str, float], Runs]:
    """Table 1: seconds of one convolution."""
    conv = nn.Conv2d(64, 64, 3, padding=1)
    inputs = [_channels_last(torch.randn(1, 64, 56, 56).relu()) for _ in range(INPUTS)]
    prepacked, lowered = Prepacked(conv, inputs[0]), int8_conv(conv)
    half = [x.bfloat16() for x in inputs]
    half_conv = nn.Conv2d(64, 64, 3, padding=1).bfloat16().to(memory_format=torch.channels_last)
    plain = by_sample(Direct(bits=8, qparams="dynamic"))
    static = Int8Quantizer("site", Grid(inputs[0].amax().reshape(1, 1, 1, 1) / 256, 0, 255), channels_last=True)
    channels_last = nn.Conv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last)
    runs: Runs = {
        "fp32": lambda i: channels_last(inputs[i]),
        "prepacked_fp32": lambda i: prepacked(inputs[i]),
        "bf16": lambda i: half_conv(half[i]),
        "static_int8": lambda i: lowered(static(inputs[i])),
        "dynamic_int8": lambda i: lowered(plain(inputs[i])),
    }
    for density in DENSITIES:
        predicted = by_sample(DenseSparse(bits=8, density=density / 100, qparams=QPP(mode="paper")))
        dynamic = by_sample(DenseSparse(bits=8, density=density / 100, qparams="dynamic"))
        ends = [torch.quantile(x.flatten(), 1 - density / 100).reshape(1, 1, 1) for x in inputs]
        runs[f"ds_predicted_{density:g}"] = lambda i, q=predicted, e=ends: lowered(q(inputs[i], e[i]))
        runs[f"ds_dynamic_{density:g}"] = lambda i, q=dynamic: lowered(q(inputs[i]))
    return medians(runs, rounds), runs


def layers(rounds: int) -> dict[str, list[float]]:
    """Figure 6: seconds of 1 to 8 convolutions with ReLUs in a row."""
    convs = [nn.Conv2d(64, 64, 3, padding=1) for _ in range(8)]
    inputs = [_channels_last(torch.randn(1, 64, 56, 56).relu()) for _ in range(INPUTS)]
    floats, bytes_ = [Prepacked(c, inputs[0], "relu") for c in convs], [int8_conv(c) for c in convs]
    plain = by_sample(Direct(bits=8, qparams="dynamic"))
    sparse = by_sample(DenseSparse(bits=8, qparams=QPP(mode="paper")))
    plain.relu = sparse.relu = True
    plain.floor = sparse.floor = np.float32(0)
    ends: list[list[Tensor]] = []
    for x in inputs:
        ends.append([])
        for layer in floats:
            ends[-1].append(torch.quantile(x.flatten(), 0.99).reshape(1, 1, 1))
            x = layer(x)

    def in_float(i: int, depth: int) -> None:
        x = inputs[i]
        for layer in floats[:depth]:
            x = layer(x)

    def in_int8(i: int, depth: int) -> None:
        x = inputs[i]
        for layer in bytes_[:depth]:
            x = layer(plain(x))

    def in_sparse(i: int, depth: int) -> None:
        x = inputs[i]
        for layer, end in zip(bytes_[:depth], ends[i], strict=False):
            x = layer(sparse(x, end))

    kinds = {"prepacked_fp32": in_float, "dynamic_int8": in_int8, "ds_predicted_1": in_sparse}
    runs: Runs = {f"{k}/{d}": lambda i, f=f, d=d: f(i, d) for k, f in kinds.items() for d in range(1, 9)}
    found = medians(runs, rounds)
    return {kind: [found[f"{kind}/{depth}"] for depth in range(1, 9)] for kind in kinds}


class Block(nn.Module):
    """A basic block of ResNet-18."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.down = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.relu1(self.conv1(x)))
        return self.relu2(y + (x if self.down is None else self.down(x)))


def resnet18() -> nn.Module:
    """With random weights and batch norms folded already."""
    parts: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    for before, after in ((64, 64), (64, 128), (128, 256), (256, 512)):
        parts += [Block(before, after, 1 if before == after else 2), Block(after, after, 1)]
    model = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            nn.init.zeros_(module.bias)
    return model.eval()


def in_prepacked_float(model: nn.Module, x: Tensor) -> nn.Module:
    """The network on prepacked weights, with ReLUs fused where a convolution alone feeds them."""
    traced = torch.fx.symbolic_trace(model)
    torch.fx.passes.shape_prop.ShapeProp(traced).propagate(x)
    for node in list(traced.graph.nodes):
        module = traced.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, nn.Conv2d):
            user = next(iter(node.users))
            relu = user.op == "call_module" and isinstance(traced.get_submodule(user.target), nn.ReLU)
            shaped = torch.empty(node.args[0].meta["tensor_meta"].shape)
            traced.add_submodule(node.name, Prepacked(module, shaped, "relu" if relu else "none"))
            node.target = node.name
            if relu:
                user.replace_all_uses_with(node)
                traced.graph.erase_node(user)
    traced.recompile()
    return traced


def network(rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of a ResNet-18, and the parts of a forward with predicted thresholds."""
    model = resnet18()
    inputs = [_channels_last(_image(i)) for i in range(INPUTS)]
    calibration = [torch.cat([_image(i + 100 * k) for i in range(8)]) for k in range(4)]

    def lowered(method: Any) -> nn.Module:
        converted = copy.deepcopy(model)
        substitute_layers(converted, {nn.ReLU: method})  # as in the papers: what convolutions read
        with calibration_mode(converted):
            for x in calibration:
                converted(x)
        for conv in [m for m in converted.modules() if isinstance(m, nn.Conv2d)][1:]:  # the stem reads floats
            made = int8_conv(conv)
            zeros = torch.zeros(len(made.scale), dtype=torch.int32)
            hold(conv, "weight", QuantizedWeight(made.weight, made.scale, zeros, 0))
        return lower(converted.eval(), inputs[0])

    methods = {
        "dynamic_int8": Direct(bits=8, qparams="dynamic"),
        "static_int8": Direct(bits=8),
        "dqa_static": DQA(bits=4),
        "ds_static_1": DenseSparse(bits=8),
        "ds_dynamic_1": DenseSparse(bits=8, qparams="dynamic"),
        "ds_predicted_1": DenseSparse(bits=8, qparams=QPP(mode="paper", sites=("input",))),
    }
    models = {name: lowered(method) for name, method in methods.items()}
    models["fp32"] = in_prepacked_float(model, inputs[0])
    runs: Runs = {name: lambda i, m=m: m(inputs[i]) for name, m in models.items()}
    return medians(runs, rounds), parts_of(models["ds_predicted_1"], inputs)


def parts_of(model: nn.Module, inputs: list[Tensor]) -> dict[str, float]:
    """Seconds that each kind of module takes in a forward, by hooks (which add a little to each)."""
    spent: dict[str, list[float]] = {}
    started: dict[nn.Module, int] = {}
    handles = []
    for module in model.children():
        handles.append(module.register_forward_pre_hook(lambda m, _: started.__setitem__(m, time.thread_time_ns())))
        handles.append(
            module.register_forward_hook(
                lambda m, *_: spent.setdefault(type(m).__name__, []).append(time.thread_time_ns() - started[m])
            )
        )
    start = time.thread_time_ns()
    for x in inputs:
        model(x)
    total = (time.thread_time_ns() - start) / 1e9 / len(inputs)
    for handle in handles:
        handle.remove()
    found = {name: sum(times) / 1e9 / len(inputs) for name, times in spent.items()}
    return {**found, "rest": total - sum(found.values())}


def torch_static(rounds: int) -> float:
    """Time of a block of convolutions with DQA over torch's own static int8 path: qconv with fused ReLU, bytes out."""
    convs = [nn.Conv2d(64, 64, 3, padding=1) for _ in range(4)]
    inputs = [_channels_last(torch.randn(1, 64, 56, 56).relu()) for _ in range(INPUTS)]
    model = nn.Sequential(*[part for conv in convs for part in (conv, nn.ReLU())]).eval()
    dqa = lower(quantize_model(model, DQA(bits=4), inputs, example_inputs=inputs[0]), inputs[0])
    torch.backends.quantized.engine = "onednn"
    mapping = torch.ao.quantization.get_default_qconfig_mapping("onednn")
    prepared = torch.ao.quantization.quantize_fx.prepare_fx(model, mapping, (inputs[0],))
    for x in inputs:
        prepared(x)
    theirs = torch.ao.quantization.quantize_fx.convert_fx(prepared)
    found = medians({"dqa": lambda i: dqa(inputs[i]), "torch": lambda i: theirs(inputs[i])}, rounds)
    return found["dqa"] / found["torch"]


def plot(result: dict[str, Any], path: Path) -> None:
    """Figure 6: time against density, and against the number of layers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plain = {
        "prepacked_fp32": {"label": "float32, prepacked weight", "color": "black", "linestyle": "-"},
        "bf16": {"label": "bfloat16", "color": "grey", "linestyle": "-."},
        "dynamic_int8": {"label": "int8, dynamic", "color": "grey", "linestyle": "--"},
    }
    sparse = {"ds_predicted": "Dense+Sparse, predicted thresholds", "ds_dynamic": "Dense+Sparse, exact quantiles"}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.4))
    rows = {name: time / 1e3 for name, time in result["convolution_us"].items()}
    for kind, label in sparse.items():
        left.plot(DENSITIES, [rows[f"{kind}_{d:g}"] for d in DENSITIES], marker="o", label=label)
    for kind, style in plain.items():
        left.axhline(rows[kind], **style)
    left.set(title="One convolution, 64 channels, 56x56, 3x3", xlabel="Values kept in float (%)")
    for kind, times in result["layers_ms"].items():
        style = plain.get(kind, {"label": "Dense+Sparse, 1%, predicted thresholds"})
        right.plot(range(1, 9), times, marker="o", **style)
    right.set(title="Several in a row, each with a ReLU", xlabel="Number of convolutions")
    for axes in (left, right):
        axes.set(ylabel="Time (ms)", ylim=(0, 1.45 * axes.get_ylim()[1]))
        axes.legend(fontsize=9, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _image(seed: int) -> Tensor:
    """Smooth noise of a brightness of its own."""
    generator = torch.Generator().manual_seed(seed)
    coarse = F.interpolate(torch.randn(1, 3, 32, 32, generator=generator), 224, mode="bilinear")
    return (coarse + 0.3 * torch.randn(1, 3, 224, 224, generator=generator)) * (0.5 + (seed % 8) / 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--rounds", type=int, default=200, help="runs of each row")
    parser.add_argument("--plot", type=Path, help="write figure 6 here")
    arguments = parser.parse_args()
    quiet_hosts()
    keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.inference_mode():
        single, _ = convolution(arguments.rounds)
        deep = layers(max(4, arguments.rounds // 4))
    with torch.no_grad():
        whole, parts = network(max(8, arguments.rounds // 4))
        against_torch = torch_static(max(8, arguments.rounds // 2))
    dynamic, predicted = single["dynamic_int8"], single["ds_predicted_1"]
    result: dict[str, Any] = {
        "ds_predicted_1pct_time_vs_dynamic_int8": predicted / dynamic,
        "ds_predicted_1pct_speedup_vs_prepacked_fp32": single["prepacked_fp32"] / predicted,
        "resnet18_time_vs_dynamic_int8": whole["ds_predicted_1"] / whole["dynamic_int8"],
        "resnet18_speedup_vs_fp32": whole["fp32"] / whole["ds_predicted_1"],
        "dqa_time_vs_torch_static_int8": against_torch,
        "convolution_us": {name: 1e6 * seconds for name, seconds in single.items()},
        "convolution_vs_dynamic": {name: seconds / dynamic for name, seconds in single.items()},
        "layers_ms": {name: [1e3 * seconds for seconds in times] for name, times in deep.items()},
        "resnet18_ms": {name: 1e3 * seconds for name, seconds in whole.items()},
        "resnet18_parts_ms": {name: 1e3 * seconds for name, seconds in parts.items()},
        "engine": engine(),
    }
    if arguments.plot:
        plot(result, arguments.plot)
    if arguments.json:
        print(json.dumps({**result, "machine": machine()}, indent=2))
        return
    for field, value in result.items():
        print(f"{field:45s} {value if not isinstance(value, float) else round(value, 3)}")


if __name__ == "__main__":
    main()
