"""Table 1 of the DQA paper: Direct, NoisyQuant and DQA (m = 3) on stored shortcut activations alone.

    python -m examples.reproductions.dqa_table1 --quick
    python -m examples.reproductions.dqa_table1 --network resnet32 --data ~/cifar10 --weights resnet32.safetensors

The paper's setting: signed codes, one scale per tensor from the tensor at hand, weights and all else float, channels
ranked by greedy search; every run draws its own calibration subset, on which channels are ranked too. Beside it:

    random channels     DQA without a ranking: what the search is worth
    batch scale         the maximum over the batch, as in the paper, instead of each sample's own
    literal             the same without a clamp: max|A| becomes the code 2^(n-1), which needs one bit more
    |max A|             the literal one with |max(A)|, as printed, in place of max|A|
    first best          the paper's line 13: among channels of equal accuracy the first, not the lower cross-entropy
    unsigned, channel   unsigned where there is no negative value, one static scale per channel: the plain rival
    static scale        the maximum over calibration, which the authors' searches start from
    searched clip       the NoisyQuant authors' clip search alone, and with their search of noise and mean (on the
                        activation: behind a shortcut there is no linear layer), static and per sample

All DQA rows of a run share one ranking per strategy, made with DQA as in the paper. At 2 bits m is 2: the paper asks
for m <= n. Stored bits are measured bytes: lengths, per-sample scales and tables in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from dqa_plugins import DQA, Direct, Method, NoisyQuant, RankTable, functional, iter_quantizers, rank_channels
from dqa_plugins.storage import convert_stored, prepare_stored, storage_report
from examples.reproductions import common
from examples.reproductions.style import style
from examples.reproductions.workloads import Workload, chosen, workload

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
        ranking: "greedy", "random", "first" (greedy, the first of equals) or "" (no important channels).
        literal: codes are not clamped; the scale is "max|A|" or "|max A|".
    """

    method: Method
    coding: str = "none"
    ranking: str = ""
    literal: str = ""


def settings(bits: int, ratio: float) -> dict[str, Setting]:
    """The rows at one bit width."""
    dqa = DQA.paper(bits, ratio=ratio)
    direct, plain = Direct.paper(bits), {"qparams": "static", "signed": None, "granularity": "channel"}
    batch, dqa_batch = direct.replace(scope="batch"), dqa.replace(scope="batch")
    script = NoisyQuant.official(bits, objective="activation")
    clip = script.replace(amplitude=0.0, mean=0.0)
    return {
        "Direct": Setting(direct),
        "NoisyQuant": Setting(NoisyQuant.paper(bits)),
        "DQA": Setting(dqa, "shift_error", "greedy"),
        "DQA, random channels": Setting(dqa, "shift_error", "random"),
        "DQA, first best": Setting(dqa, "shift_error", "first"),
        "Direct, static scale": Setting(direct.replace(qparams="static")),
        "NoisyQuant, static scale": Setting(NoisyQuant.paper(bits).replace(qparams="static")),
        "Direct, searched clip": Setting(clip),
        "NoisyQuant, searched clip": Setting(script),
        "Direct, searched clip, per sample": Setting(clip.replace(qparams="dynamic")),
        "NoisyQuant, searched clip, per sample": Setting(script.replace(qparams="dynamic")),
        "Direct, batch scale": Setting(batch),
        "DQA, batch scale": Setting(dqa_batch, "shift_error", "greedy"),
        "Direct, literal": Setting(batch, literal="max|A|"),
        "DQA, literal": Setting(dqa_batch, "shift_error", "greedy", literal="max|A|"),
        "Direct, literal, |max A|": Setting(batch, literal="|max A|"),
        "Direct, unsigned, channel": Setting(direct.replace(**plain)),
        "DQA, unsigned, channel": Setting(dqa.replace(**plain), "shift_error", "greedy"),
    }


class Literal:
    """Forward of a quantizer as the paper writes it: one signed scale per batch, nothing clamped.

    Args:
        method: Direct or DQA.
        extra_bits: (C,) int64.
        scale: "max|A|", or "|max A|" as algorithm 1 prints it.
    """

    def __init__(self, method: Method, extra_bits: Tensor, scale: str = "max|A|") -> None:
        self.method, self.extra_bits, self.scale = method, extra_bits, scale

    def __call__(self, x: Tensor) -> Tensor:
        bits = self.method.bits
        scale = (x.amax().abs() if self.scale == "|max A|" else x.abs().amax()) / 2 ** (bits - 1)
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
    return storage_report(model, task.test[0][0]).bits_per_activation + bool(setting.literal)


def freeze(prepared: nn.Module, literal: str) -> int:
    """Fake-quantize from now on. Returns the number of sites where NoisyQuant found a noise that lowers the error."""
    noisy = 0
    for _, quantizer in iter_quantizers(prepared):
        quantizer.freeze()
        noisy += bool(quantizer.noise.any())
        if literal:  # an instance's own forward: the graph stays as it is
            object.__setattr__(quantizer, "forward", Literal(quantizer.method, quantizer.extra_bits, literal))
    return noisy


@cache
def ranking(network: str, bits: int, run: int, strategy: str, options: common.Options) -> RankTable:
    """The channels of one run, ranked with DQA as in the paper."""
    task = workload(network, options.data, options.weights, quick=options.quick)
    prepared = calibrated(task, DQA.paper(bits, ratio=task.ratio), run)
    first = strategy == "first"
    return rank_channels(
        prepared,
        task.calibration_batches(run, task.ranking),
        strategy="greedy" if first else strategy,
        strict=first,
        seed=run,
        progress=False,
    )


def measure(network: str, bits: int, run: int, method: str, options: common.Options) -> dict[str, Any]:
    """One row of one network in one run. Runs in a process of its own."""
    task = workload(network, options.data, options.weights, quick=options.quick)
    setting = settings(bits, task.ratio)[method]
    prepared = calibrated(task, setting.method, run)
    if setting.ranking:
        ranking(network, bits, run, setting.ranking, options).apply(prepared)
    stored = stored_bits(prepared, setting, task)
    noisy = freeze(prepared, setting.literal)
    return {**task.scores(prepared), "stored_bits": stored, "sites_with_noise": noisy}


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and deviation over the runs, in the order of the settings."""
    cells: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["network"], row["bits"], row["method"]), []).append(row)
    values = ("score", "pixel_accuracy", "stored_bits")
    found = [
        {
            "network": network,
            "bits": bits,
            "method": method,
            "runs": len(r),
            **{v: common.mean_std(row[v] for row in r) for v in values if v in r[0]},
            "sites_with_noise": [row["sites_with_noise"] for row in r],
        }
        for (network, bits, method), r in cells.items()
    ]
    order = list(settings(4, 0.4))
    return sorted(found, key=lambda c: (NETWORKS.index(c["network"]), c["bits"], order.index(c["method"])))


def show(cells: list[dict[str, Any]], task: Workload, fp32: float) -> None:
    """One table per network."""
    rows: list[list[str] | None] = []
    for bits in BITS:
        rows.append(None)
        for cell in cells:
            if (cell["network"], cell["bits"]) == (task.key, bits):
                paper = PAPER[task.key][1].get(bits, ())
                names = dict(zip(("Direct", "NoisyQuant", "DQA"), paper, strict=False))
                there = f"{names[cell['method']]:.2f}" if cell["method"] in names else ""
                found = (str(cell["score"]), str(cell.get("pixel_accuracy", "")), f"{cell['stored_bits'].mean:.2f}")
                rows.append([cell["method"], str(bits), *found, str(cell["runs"]), there])
    title = f"DQA Table 1: {task.title}; FP32 {fp32:.2f} {task.metric} (paper {PAPER[task.key][0]})"
    columns = ("method", "bits", task.metric, "pixel accuracy %", "stored bits", "runs", "paper, its data")
    common.show(title, columns, rows)


def plot(cells: list[dict[str, Any]], report: dict[str, Any], options: common.Options) -> None:
    """Score against bits, one panel per network."""
    networks = list(dict.fromkeys(c["network"] for c in cells))
    figure, panels = common.axes(len(networks), width=4.6, height=4.6)
    shown = (
        "Direct",
        "NoisyQuant",
        "NoisyQuant, searched clip",
        "DQA",
        "DQA, random channels",
        "DQA, literal",
        "Direct, unsigned, channel",
        "DQA, unsigned, channel",
    )
    for axis, network in zip(panels, networks, strict=True):
        for number, name in enumerate(shown):
            found = [c for c in cells if c["network"] == network and c["method"] == name]
            x = [c["bits"] + 0.03 * (number - 4) for c in found]
            y = [report["fp32"][network]["score"] - c["score"].mean for c in found]
            spread = [c["score"].std for c in found]
            axis.errorbar(x, y, spread, capsize=2, label=name, **style(name))
        axis.axhline(0, color="grey", linewidth=1, label="FP32")
        axis.set_yscale("symlog", linthresh=1)  # what is lost at 2 bits would hide the rest
        axis.set_yticks((0, 0.5, 1, 2, 5, 10, 20, 50), ("0", "0.5", "1", "2", "5", "10", "20", "50"))
        axis.set_ylim(90, -1)
        axis.set_xticks(BITS)
        axis.set_xlabel("bits n of a code")
        axis.set_ylabel(f"points of {report['metric'][network].removesuffix(' %')} below FP32")
        axis.set_title(report["data"][network].replace(", ", "\n", 1), fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=10)
    figure.suptitle("Only stored shortcuts quantized (DQA: important channels have m bits more); mean ± deviation")
    common.save(figure, options, "dqa_table1")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, print, write."""
    options = common.parse(__doc__, arguments, runs=(5, 2), networks=NETWORKS)
    common.settle()
    tasks = chosen(options, NETWORKS)
    jobs = [
        {"network": task.key, "bits": bits, "run": run, "method": name}
        for run in range(options.runs)
        for task in tasks
        for bits in BITS
        for name in settings(bits, 0.4)
        if options.asks_for(bits, name)
    ]
    old = common.kept(options, "dqa_table1")
    report = common.collect(
        measure,
        jobs,
        options,
        "dqa_table1",
        **common.merged(options, "dqa_table1", tasks),
        fp32={**old.get("fp32", {}), **{task.key: task.scores(task.model) for task in tasks}},
    )
    cells = summarize(report["rows"])
    for task in tasks:
        show(cells, task, report["fp32"][task.key]["score"])
    plot(cells, report, options)
    return report


if __name__ == "__main__":
    main()
