"""Table 1 of the DQA paper: Direct, NoisyQuant and DQA (m = 3) on stored shortcut activations alone.

    python -m examples.reproductions.dqa_table1 --quick
    python -m examples.reproductions.dqa_table1 --network resnet32 --data ~/cifar10 --weights resnet32.safetensors

The paper's setting: signed codes, one scale per tensor from the tensor at hand, weights and all else float, channels
ranked by greedy search; every run draws its own calibration subset, on which channels are ranked too. Beside it:

    random channels     DQA without a ranking: what the search is worth
    batch scale         the maximum over the batch, as in the paper, instead of each sample's own
    literal             the same without a clamp: max|A| becomes the code 2^(n-1), which needs one bit more
    unsigned, channel   unsigned where there is no negative value, one static scale per channel: the plain rival

At 2 bits m is 2: the paper asks for m <= n. Stored bits are measured bytes: lengths, per-sample scales and tables in.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dqa_plugins import DQA, Direct, Method, NoisyQuant, RankTable, functional, iter_quantizers, rank_channels
from dqa_plugins.storage import convert_stored, prepare_stored, storage_report
from examples.reproductions import common
from examples.reproductions.workloads import NAMES, Workload, workload

BITS = (2, 3, 4, 5)
NETWORKS = ("resnet32", "mobilenetv2", "unet")
# Table 1 of the paper, in percent: (FP32, {bits: (Direct, NoisyQuant, DQA)}); other networks' weights, other data
PAPER = {
    "resnet32": (92.49, {3: (52.85, 71.22, 82.13), 4: (87.74, 89.66, 90.55), 5: (91.33, 91.86, 92.12)}),
    "mobilenetv2": (91.42, {3: (82.75, 87.67, 88.63), 4: (90.01, 90.56, 90.84), 5: (91.19, 91.33, 91.28)}),
    "unet": (92.5, {3: (84.41, 92.16, 90.38), 4: (91.54, 91.13, 92.03), 5: (91.48, 91.41, 91.46)}),
}


@dataclass(frozen=True)
class Setting:
    """One row: a method, how its codes are packed, how its channels are chosen.

    Attributes:
        method: the method.
        coding: of the packed bytes: "none" or "shift_error", the paper's layout.
        ranking: "greedy", "random" or "" (no important channels).
        literal: codes are not clamped.
    """

    method: Method
    coding: str = "none"
    ranking: str = ""
    literal: bool = False


def settings(bits: int, ratio: float) -> dict[str, Setting]:
    """The rows at one bit width."""
    dqa = DQA.paper(bits, ratio=ratio)
    direct, plain = Direct.paper(bits), {"qparams": "static", "signed": None, "granularity": "channel"}
    return {
        "Direct": Setting(direct),
        "NoisyQuant": Setting(NoisyQuant.paper(bits)),
        "DQA": Setting(dqa, "shift_error", "greedy"),
        "DQA, random channels": Setting(dqa, "shift_error", "random"),
        "Direct, batch scale": Setting(direct.replace(scope="batch")),
        "DQA, batch scale": Setting(dqa.replace(scope="batch"), "shift_error", "greedy"),
        "Direct, literal": Setting(direct.replace(scope="batch"), literal=True),
        "DQA, literal": Setting(dqa.replace(scope="batch"), "shift_error", "greedy", literal=True),
        "Direct, unsigned, channel": Setting(direct.replace(**plain)),
        "DQA, unsigned, channel": Setting(dqa.replace(**plain), "shift_error", "greedy"),
    }


class Literal:
    """Forward of a quantizer as the paper writes it: one signed scale per batch, nothing clamped."""

    def __init__(self, method: Method, extra_bits: Tensor) -> None:
        self.method = method
        self.extra_bits = extra_bits

    def __call__(self, x: Tensor) -> Tensor:
        bits = self.method.bits
        scale = x.abs().amax() / 2 ** (bits - 1)
        if not isinstance(self.method, DQA):
            return functional.direct_fake_quantize(x, scale, bits, clamp=False)
        codes, errors = functional.dqa_quantize(x, scale, self.extra_bits, bits, clamp=False)
        return functional.dqa_dequantize(codes, errors, scale, self.extra_bits)


@torch.no_grad()
def calibrated(task: Workload, method: Method, seed: int) -> Any:
    """The network with a quantizer on every stored shortcut, calibrated on a subset of its own."""
    batches = task.calibration_batches(seed)
    prepared = prepare_stored(task.model, method, batches[0][0][:2])
    for inputs, _ in batches:
        prepared(inputs)
    return prepared


@torch.no_grad()
def stored_bits(prepared: Any, setting: Setting, task: Workload) -> float:
    """Bits per stored activation on one test batch, all side information in.

    Unclamped codes need one bit more: 2^(n-1) does not fit n bits.
    """
    model = convert_stored(prepared, setting.coding)
    return storage_report(model, task.test[0][0]).bits_per_activation + setting.literal


def freeze(prepared: nn.Module, literal: bool) -> int:
    """Fake-quantize from now on. Returns the number of sites where NoisyQuant found a noise that lowers the error."""
    noisy = 0
    for _, quantizer in iter_quantizers(prepared):
        quantizer.freeze()
        noisy += bool(quantizer.noise.any())
        if literal:  # an instance's own forward: the graph stays as it is
            object.__setattr__(quantizer, "forward", Literal(quantizer.method, quantizer.extra_bits))
    return noisy


def measure(key: str, bits: int, run: int, options: common.Options) -> list[dict[str, Any]]:
    """All rows of one network at one bit width in one run. Runs in a process of its own."""
    task = workload(key, options.data, options.weights, quick=options.quick)
    tables: dict[str, RankTable] = {}
    rows = []
    for name, setting in settings(bits, task.ratio).items():
        prepared = calibrated(task, setting.method, run)
        if setting.ranking:
            if setting.ranking not in tables:
                batches = task.calibration_batches(run, task.ranking)
                tables[setting.ranking] = rank_channels(
                    prepared, batches, strategy=setting.ranking, seed=run, progress=False
                )
            tables[setting.ranking].apply(prepared)
        stored = stored_bits(prepared, setting, task)
        noisy = freeze(prepared, setting.literal)
        score = task.score(prepared)
        rows.append(
            {
                "network": key,
                "bits": bits,
                "run": run,
                "method": name,
                "score": score,
                "stored_bits": stored,
                "sites_with_noise": noisy,
            }
        )
    return rows


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and deviation over the runs, in the order of the rows."""
    cells: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["network"], row["bits"], row["method"]), []).append(row)
    return [
        {
            "network": network,
            "bits": bits,
            "method": method,
            "score": common.mean_std(r["score"] for r in found),
            "stored_bits": common.mean_std(r["stored_bits"] for r in found),
            "sites_with_noise": [r["sites_with_noise"] for r in found],
        }
        for (network, bits, method), found in cells.items()
    ]


def show(cells: list[dict[str, Any]], task: Workload, fp32: float, runs: int) -> None:
    """One table per network."""
    rows: list[list[str] | None] = []
    for bits in BITS:
        rows.append(None)
        for cell in cells:
            if (cell["network"], cell["bits"]) == (task.key, bits):
                paper = PAPER[task.key][1].get(bits, ())
                names = dict(zip(("Direct", "NoisyQuant", "DQA"), paper, strict=False))
                there = f"{names[cell['method']]:.2f}" if cell["method"] in names else ""
                rows.append([cell["method"], str(bits), str(cell["score"]), f"{cell['stored_bits'].mean:.2f}", there])
    title = f"DQA Table 1: {task.title}; FP32 {fp32:.2f} {task.metric} (paper {PAPER[task.key][0]}); {runs} runs"
    common.show(title, ("method", "bits", task.metric, "stored bits", "paper, its data"), rows)


def plot(cells: list[dict[str, Any]], tasks: list[Workload], fp32: dict[str, float], options: common.Options) -> None:
    """Score against bits, one panel per network."""
    figure, panels = common.axes(len(tasks))
    styles = {
        "Direct": ("tab:blue", "-", "o"),
        "NoisyQuant": ("tab:orange", "-", "v"),
        "DQA": ("tab:green", "-", "s"),
        "DQA, random channels": ("tab:green", ":", "x"),
        "DQA, literal": ("tab:green", "--", "D"),
        "Direct, unsigned, channel": ("tab:red", "-", "P"),
        "DQA, unsigned, channel": ("tab:purple", "-", "*"),
    }
    for axis, task in zip(panels, tasks, strict=True):
        for number, (name, (color, line, marker)) in enumerate(styles.items()):
            found = [c for c in cells if c["network"] == task.key and c["method"] == name]
            x = [c["bits"] + 0.04 * (number - 3) for c in found]
            y, spread = [c["score"].mean for c in found], [c["score"].std for c in found]
            axis.errorbar(x, y, spread, color=color, linestyle=line, marker=marker, markersize=5, capsize=2, label=name)
        axis.axhline(fp32[task.key], color="grey", linewidth=1, label="FP32")
        axis.set_xticks(BITS)
        axis.set_xlabel("bits n (DQA: m more on important channels)")
        axis.set_ylabel(task.metric)
        axis.set_title(f"{task.network}\n{task.data}", fontsize=10)
    panels[0].legend(fontsize=8, loc="lower right")
    figure.suptitle(f"Stored shortcut activations quantized, all else float; {options.runs} runs, mean ± std")
    common.save(figure, options, "dqa_table1")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, print, write."""
    options = common.parse(__doc__, arguments, runs=(5, 2), networks=NETWORKS)
    started = time.perf_counter()
    common.settle()
    keys = [options.network] if options.network else list(NETWORKS)
    tasks = [workload(key, options.data, options.weights, quick=options.quick) for key in keys]
    fp32 = {task.key: task.score(task.model) for task in tasks}
    jobs = [(key, bits, run, options) for key in keys for bits in BITS for run in range(options.runs)]
    rows = [row for part in common.run_jobs(measure, jobs, options) for row in part]
    cells = summarize(rows)
    for task in tasks:
        show(cells, task, fp32[task.key], options.runs)
        found = [c["sites_with_noise"] for c in cells if (c["network"], c["method"]) == (task.key, "NoisyQuant")]
        print(f"NoisyQuant, {NAMES[task.key]}: sites where a noise lowers the error, by bits and run: {found}")
    plot(cells, tasks, fp32, options)
    report = {"data": {t.key: t.title for t in tasks}, "fp32": fp32, "cells": cells, "rows": rows}
    common.write(options, "dqa_table1", report, started)
    return report


if __name__ == "__main__":
    main()
