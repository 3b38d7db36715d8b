"""A real pretrained network: how often EfficientNet-Lite0, quantized, still gives the answer that it gives in float.

    python -m examples.reproductions.efficientnet_agreement --quick
    python -m examples.reproductions.efficientnet_agreement --data ~/imagenet      # accuracy instead of agreement

Every method at 3 to 6 bits on every activation but those of the first and last layer, weights float, parameters static,
calibrated on crops of eight photos and tested on 208 crops of eight others. No labels are needed. "Stored" is the DQA
paper's use: only the residual shortcuts are quantized, which are linear bottlenecks here and carry a sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from dqa_plugins import DQA, DenseSparse, Direct, Method, NoisyQuant, iter_quantizers
from dqa_plugins.adapters.fx import get_qconfig_mapping
from dqa_plugins.report import activation_report
from dqa_plugins.storage import prepare_stored
from examples.reproductions import common
from examples.reproductions.style import style
from examples.reproductions.workloads import Workload, workload

BITS = (3, 4, 5, 6)
PLACES = ("stored", "all")
KEY = "efficientnet_lite0"


def methods(bits: int) -> dict[str, Method]:
    """The rows at one bit width."""
    return {
        "Direct": Direct(bits=bits),
        "Direct, per channel": Direct(bits=bits, granularity="channel"),
        "NoisyQuant": NoisyQuant(bits=bits),
        "DQA": DQA(bits=bits),
        "DQA, per channel": DQA(bits=bits, granularity="channel"),
        "Dense+Sparse": DenseSparse(bits=bits),
    }


@torch.no_grad()
def quantize(task: Workload, method: Method, place: str, run: int) -> nn.Module:
    """The calibrated network with frozen quantizers on stored shortcuts, or on all activations."""
    batches = [inputs for inputs, _ in task.calibration_batches(run)]
    prepared: Any
    if place == "stored":
        prepared = prepare_stored(task.model, method, batches[0][:1])
    else:
        mapping = get_qconfig_mapping(method, weight_bits=None, skip=("first", "last"))
        prepared = prepare_fx(task.model, mapping, (batches[0][:1],))
    for inputs in batches:
        prepared(inputs)
    if place == "all":
        return convert_fx(prepared)
    for _, quantizer in iter_quantizers(prepared):
        quantizer.freeze()
    return prepared


@cache
def float_logits(options: common.Options) -> list[Tensor]:
    """What the float network answers on the test batches, once per process."""
    task = workload(KEY, options.data, None, quick=options.quick)
    with torch.no_grad():
        return [task.model(inputs) for inputs, _ in task.test]


@torch.no_grad()
def measure(place: str, bits: int, method: str, run: int, options: common.Options) -> dict[str, Any]:
    """One row in one run. Runs in a process of its own."""
    task = workload(KEY, options.data, None, quick=options.quick)
    model = quantize(task, methods(bits)[method], place, run)
    hits, distances = 0, []
    for (inputs, targets), expected in zip(task.test, float_logits(options), strict=True):
        logits = model(inputs)
        hits += int((logits.argmax(1) == targets).sum())
        distances.append((logits - expected).square().sum(1) / expected.square().sum(1))
    sample: Tensor = task.test[0][0][:4]
    return {
        "agreement": 100 * hits / sum(len(targets) for _, targets in task.test),
        "relative_logit_error": float(torch.cat(distances).mean().sqrt()),
        "bits_per_activation": activation_report(model, [sample]).bits_per_activation,
    }


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and deviation over the runs."""
    cells: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["place"], row["bits"], row["method"]), []).append(row)
    values = ("agreement", "relative_logit_error", "bits_per_activation")
    order = list(methods(4))
    return [
        {
            "place": place,
            "bits": bits,
            "method": name,
            "runs": len(found),
            **{value: common.mean_std(r[value] for r in found) for value in values},
        }
        for (place, bits, name), found in sorted(
            cells.items(), key=lambda c: (PLACES.index(c[0][0]), c[0][1], order.index(c[0][2]))
        )
    ]


def plot(cells: list[dict[str, Any]], task: Workload, options: common.Options) -> None:
    """Agreement against bits per activation."""
    figure, panels = common.axes(len(PLACES), width=5.0, height=4.6)
    titles = {"stored": "stored shortcuts only", "all": "all activations but first and last layer"}
    for axis, place in zip(panels, PLACES, strict=True):
        for name in methods(4):
            found = [c for c in cells if (c["place"], c["method"]) == (place, name)]
            x, y = [c["bits_per_activation"].mean for c in found], [c["agreement"].mean for c in found]
            axis.errorbar(x, y, [c["agreement"].std for c in found], capsize=2, label=name, **style(name))
        axis.set_xlabel("bits per activation, side information in")
        axis.set_ylabel("accuracy, %" if task.real else "same top-1 as FP32, %")
        axis.set_title(titles[place], fontsize=11)
        axis.set_ylim(-2, 102)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=10)
    figure.suptitle(f"{task.title}\nweights float; mean ± deviation over calibrations", fontsize=11)
    common.save(figure, options, "efficientnet_agreement")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, print, write."""
    options = common.parse(__doc__, arguments, runs=(3, 1))
    common.settle()
    task = workload(KEY, options.data, None, quick=options.quick)
    jobs = [
        {"place": place, "bits": bits, "method": name, "run": run}
        for run in range(options.runs)
        for place in PLACES
        for bits in BITS
        for name in methods(bits)
        if options.asks_for(bits, name)
    ]
    report = common.collect(measure, jobs, options, "efficientnet_agreement", data=task.title)
    cells = summarize(report["rows"])
    lines: list[list[str] | None] = []
    for cell in cells:
        if cell["method"] == "Direct":
            lines.append(None)
        values = (cell["agreement"], cell["relative_logit_error"], cell["bits_per_activation"])
        lines.append([cell["place"], cell["method"], str(cell["bits"]), *map(str, values), str(cell["runs"])])
    columns = (
        "activations",
        "method",
        "n",
        "same top-1 %",
        "relative error of the logits",
        "bits / activation",
        "runs",
    )
    common.show(f"{task.title}; weights float", columns, lines, text=2)
    plot(cells, task, options)
    return report


if __name__ == "__main__":
    main()
