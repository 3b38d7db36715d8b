"""NoisyQuant on its home ground: the inputs of a transformer's linear layers, at 6 and 4 bits (and 3).

    python -m examples.reproductions.noisyquant_transformer --quick

A small vision transformer on digits: every Linear but the first and last gets a quantizer on its input (behind
LayerNorm, GELU and attention, where values have a sign and long tails), weights and all else stay float. Rows: Direct,
NoisyQuant with the noise that lowers the error of the activation, the authors' script (clip and noise searched on the
error of the layer's output), and Direct with the script's clip search, which shows how much of its gain is the clip and
how much the noise. The error is that of the layers' outputs, relative to the outputs themselves. --quick leaves 3 bits
out.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from dqa_plugins import ActivationQuantizer, Direct, Method, NoisyQuant
from examples.networks import digits, load
from examples.networks.scores import accuracy
from examples.reproductions import common

BITS = (6, 4, 3)


def methods(bits: int) -> dict[str, Method]:
    """The rows at one bit width. All signed: so are the inputs of a transformer's linear layers."""
    script = NoisyQuant.official(bits)
    return {
        "Direct": Direct(bits=bits, signed=True),
        "NoisyQuant": NoisyQuant(bits=bits, signed=True),
        "Direct, script's clip": script.replace(amplitude=0.0, mean=0.0),
        "NoisyQuant, script": script,
    }


class QuantizedLinear(nn.Module):
    """A Linear behind a quantizer, which notes the error of its output."""

    def __init__(self, linear: nn.Linear, method: Method, name: str) -> None:
        super().__init__()
        self.linear = linear
        self.quantizer = ActivationQuantizer(method, name=name, producer_axis=-1)
        self.quantizer.consumer_geometry = ()  # a Linear: the noise may be searched on the error of its output
        self.errors: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, T, C) -> (N, T, O)."""
        y = self.linear(self.quantizer(x))
        if self.quantizer.state == "frozen":
            expected = self.linear(x)
            self.errors.append(float((y - expected).square().mean() / expected.square().mean()))
        return y


def place(model: nn.Module, method: Method) -> nn.Module:
    """A copy with a quantizer before every Linear but the first and the last."""
    model = copy.deepcopy(model)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name in names[1:-1]:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, QuantizedLinear(model.get_submodule(name), method, name))
    return model


def layers(model: nn.Module) -> Iterator[QuantizedLinear]:
    """The quantized layers."""
    return (module for module in model.modules() if isinstance(module, QuantizedLinear))


@torch.no_grad()
def measure(bits: int, name: str, run: int, options: common.Options) -> dict[str, Any]:
    """One row in one run, with a calibration subset and a noise of its own. Runs in a process of its own."""
    split = digits.load_split()
    method = methods(bits)[name]
    if isinstance(method, NoisyQuant):
        method = method.replace(seed=run)
    model = place(load("vit")[0], method)
    calibration, _ = digits.calibration_subset(split, 32 if options.quick else 256, seed=run)
    for part in calibration.split(64):
        model(part)
    for layer in layers(model):
        layer.quantizer.freeze(layer.linear.weight)
    score = accuracy(model, split.test_images, split.test_labels)
    errors = [error for layer in layers(model) for error in layer.errors]
    return {
        "bits": bits,
        "method": name,
        "run": run,
        "accuracy": score,
        "output_error": 100 * sum(errors) / len(errors),
        "sites": sum(1 for _ in layers(model)),
        "sites_with_noise": sum(bool(layer.quantizer.noise.any()) for layer in layers(model)),
    }


def plot(cells: list[dict[str, Any]], fp32: float, title: str, options: common.Options) -> None:
    """Accuracy and output error, side by side."""
    figure, panels = common.axes(2, width=6.4, height=4.0)
    names = list(methods(4))
    for number, name in enumerate(names):
        found = [c for c in cells if c["method"] == name]
        places = [k + 0.2 * (number - 1.5) for k in range(len(found))]
        for axis, key in zip(panels, ("accuracy", "output_error"), strict=True):
            heights, spreads = [c[key].mean for c in found], [c[key].std for c in found]
            axis.bar(places, heights, 0.19, yerr=spreads, capsize=2, label=name)
    panels[0].axhline(fp32, color="grey", linewidth=1, label="FP32")
    panels[0].set_ylabel("accuracy, %")
    panels[0].set_ylim(min(c["accuracy"].mean for c in cells) - 8, 101)
    panels[0].legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=5)
    panels[1].set_ylabel("squared error of the layers' outputs, %")
    panels[1].set_yscale("log")
    for axis in panels:
        shown = list(dict.fromkeys(c["bits"] for c in cells))
        axis.set_xticks(range(len(shown)), [f"{bits} bits" for bits in shown])
    figure.suptitle(title, fontsize=10)
    common.save(figure, options, "noisyquant_transformer")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, print, write."""
    options = common.parse(__doc__, arguments, runs=(5, 2))
    bit_widths = BITS[:2] if options.quick else BITS
    started = time.perf_counter()
    common.settle()
    split = digits.load_split()
    fp32 = accuracy(load("vit")[0], split.test_images, split.test_labels)
    jobs = [(bits, name, run, options) for bits in bit_widths for name in methods(bits) for run in range(options.runs)]
    rows = common.run_jobs(measure, jobs, options)
    cells = []
    for bits in bit_widths:
        for name in methods(bits):
            found = [r for r in rows if (r["bits"], r["method"]) == (bits, name)]
            means = {key: common.mean_std(r[key] for r in found) for key in ("accuracy", "output_error")}
            noisy = "/".join(str(r["sites_with_noise"]) for r in found)
            cells.append({"bits": bits, "method": name, **means, "sites_with_noise": noisy})
    data = "vision transformer on scikit-learn digits (stand-in for ImageNet), linear inputs only"
    title = f"NoisyQuant at home: {data}; FP32 {fp32:.2f} %, {options.runs} runs"
    lines: list[list[str] | None] = []
    for cell in cells:
        if cell["method"] == "Direct":
            lines.append(None)
        noisy = f"{cell['sites_with_noise']} of {rows[0]['sites']}"
        lines.append([cell["method"], str(cell["bits"]), str(cell["accuracy"]), str(cell["output_error"]), noisy])
    columns = ("method", "bits", "accuracy %", "output error %", "sites with a noise, by run")
    common.show(title, columns, lines)
    plot(cells, fp32, title, options)
    report = {"data": data, "fp32": fp32, "cells": cells, "rows": rows}
    common.write(options, "noisyquant_transformer", report, started)
    return report


if __name__ == "__main__":
    main()
