"""Figures 4, 5, 7, 8 and 9 of the QPP paper, on ResNet-32.

    python -m examples.reproductions.qpp_figures --quick

    figure 4      density against the error of the threshold b: Gaussian activations, and the network's own
    figure 5      accuracy against density, up to 10%, at 4 bits as in the paper and at 3 and 2
    figure 7      error of the thresholds of each layer against dynamic: static, one predictor, two predictors
    figures 8, 9  distribution of the density with one and with two predictors

The predictors are the paper's (least squares on three quantiles, mean and maximum at the first ReLU; the second in the
middle of the network); the default mode of this package, with one site, is drawn beside them. Dense+Sparse as in
`qpp_tables`: weights 8 bits, first and last layer float.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dqa_plugins import QPP, iter_quantizers
from dqa_plugins.metrics import density
from dqa_plugins.qpp import QPPReport, qpp_report
from examples.reproductions import common
from examples.reproductions.qpp_tables import DENSITY, density_samples, method, quantize
from examples.reproductions.style import colour
from examples.reproductions.workloads import Workload, workload

KEY = "resnet32"
ERRORS = (-0.5, -0.4, -0.3, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
DENSITIES = (0.0, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1)
BITS = (4, 3, 2)
FIRST, MIDDLE = "relu1", "blocks.7.relu2"
PREDICTORS = {
    "QPP, paper, one predictor": QPP(mode="paper", sites=(FIRST,)),
    "QPP, paper, two predictors": QPP(mode="paper", sites=(FIRST, MIDDLE)),
    "QPP, extended": QPP(sites=(FIRST,)),
}


def gaussian_density(error: float, target: float = DENSITY) -> float:
    """Share of normal values above b (1 + error), with b the (1 - target) quantile."""
    best = math.sqrt(2) * float(torch.erfinv(torch.tensor(1 - 2 * target, dtype=torch.float64)))
    return 0.5 * math.erfc(best * (1 + error) / math.sqrt(2))


@torch.no_grad()
def measured_density(task: Workload) -> dict[str, list[float]]:
    """Density when every sample's own threshold is off by a factor 1 + error: median and quartiles over layers."""
    model = quantize(task, method("Dense+Sparse", 4, "dynamic"), 0)
    found: dict[str, list[Tensor]] = {name: [] for name, _ in iter_quantizers(model)}

    def note(name: str) -> Any:
        def count(quantizer: Any, arguments: tuple[Tensor, ...], _: Tensor) -> None:
            x = arguments[0]
            _, lower, upper = quantizer.runtime_qparams(x)
            rows = [density(x, lower * (1 + e), upper * (1 + e)).mean() for e in ERRORS]
            found[name].append(torch.stack(rows))

        return count

    for name, quantizer in iter_quantizers(model):
        quantizer.register_forward_hook(note(name))
    task.score(model, task.test[:2])
    layers = torch.stack([torch.stack(rows).mean(0) for rows in found.values()])
    quartiles = layers.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), 0)
    return dict(zip(("low", "median", "high"), quartiles.tolist(), strict=True))


def accuracy_at(bits: int, share: float, options: common.Options) -> float:
    """Accuracy of dynamic Dense+Sparse at one density. Runs in a process of its own."""
    task = workload(KEY, options.data, options.weights, quick=options.quick)
    return task.score(quantize(task, method("Dense+Sparse", bits, "dynamic", share), 0))


def predictions(name: str, options: common.Options) -> QPPReport:
    """Densities and errors of one way to predict. Runs in a process of its own."""
    task = workload(KEY, options.data, options.weights, quick=options.quick)
    model = quantize(task, method("Dense+Sparse", 4, PREDICTORS[name]), 0)
    return qpp_report(model, density_samples(task, task.test))


def layer_errors(report: QPPReport, source: str) -> dict[str, list[float]]:
    """Mean and deviation over the samples of each layer's error, in percent."""
    return {
        "mean": [100 * float(layer.errors[source].mean()) for layer in report.layers],
        "std": [100 * float(layer.errors[source].std()) for layer in report.layers],
    }


def densities(report: QPPReport, source: str) -> Tensor:
    """Densities of all (sample, layer) pairs in percent; layers with too few elements left out."""
    return 100 * torch.cat([layer.densities[source] for layer in report.layers if not layer.small])


def plot_figures_4_and_5(report: dict[str, Any], task: Workload, options: common.Options) -> None:
    """Density against threshold error, accuracy against density."""
    figure, panels = common.axes(2)
    x = [100 * e for e in ERRORS]
    four = report["figure 4"]
    panels[0].plot(x, [100 * v for v in four["gaussian"]], "o-", label="Gaussian")
    panels[0].plot(x, [100 * v for v in four["median"]], "s-", label="this network, median of the layers")
    low, high = ([100 * v for v in four[key]] for key in ("low", "high"))
    panels[0].fill_between(x, low, high, alpha=0.2, color="tab:orange", label="its quartiles")
    panels[0].axhline(100 * DENSITY, color="grey", linewidth=1, linestyle=":")
    panels[0].set_xlabel("error of the threshold, %")
    panels[0].set_ylabel("density, %")
    panels[0].set_title("Figure 4: density against threshold error (target 1%)")
    panels[0].legend()
    for (bits, values), shade in zip(report["figure 5"].items(), ("tab:red", "salmon", "darkred"), strict=False):
        panels[1].plot([100 * d for d in DENSITIES], values, "o-", color=shade, label=f"{bits} bits")
    panels[1].axhline(report["fp32"], color="grey", linewidth=1, label="FP32")
    panels[1].set_xlabel("density, %")
    panels[1].set_ylabel(task.metric)
    panels[1].set_title("Figure 5: accuracy against density (dynamic thresholds)")
    panels[1].legend()
    figure.suptitle(task.title)
    common.save(figure, options, "qpp_figures_4_5")


def plot_figures_7_to_9(found: dict[str, QPPReport], task: Workload, options: common.Options) -> None:
    """Error per layer; distributions of the density."""
    figure, panels = common.axes(4, width=5.4, height=4.2, columns=2)
    first = next(iter(found.values()))
    colors = {name: colour(name) for name in ("static", *found)}
    lines = {"static": layer_errors(first, "static"), **{n: layer_errors(r, "predicted") for n, r in found.items()}}
    for name, line in lines.items():
        dashes = ":" if name == "QPP, paper, one predictor" else "-"
        places = range(1, len(line["mean"]) + 1)
        panels[0].plot(places, line["mean"], dashes, color=colors[name], label=name)
        panels[1].plot(places, line["std"], dashes, color=colors[name], label=name)
    sites = [layer.site for layer in first.layers]
    for axis, what in zip(panels, ("mean", "standard deviation"), strict=False):
        axis.axvline(sites.index(MIDDLE) + 1, color="grey", linewidth=1, label="second predictor")
        axis.set_xticks(range(1, len(sites) + 1, 4), sites[::4], rotation=60, ha="right", fontsize=8)
        axis.set_ylabel("error of the threshold, %")
        axis.set_title(f"Figure 7: error per layer, {what} over samples")
        axis.legend()
    bins = torch.linspace(0, 4, 28).tolist()  # wider than one element of the smallest layers
    for axis, name, number in zip(panels[2:], list(found)[:2], (8, 9), strict=True):
        shown = (("static", colour("static")), ("predicted", colour(name)))
        for source, color in shown:
            label = "static" if source == "static" else name
            axis.hist(densities(found[name], source).clamp(max=4).tolist(), bins, alpha=0.5, color=color, label=label)
        default = densities(found["QPP, extended"], "predicted").clamp(max=4).tolist()
        axis.hist(default, bins, histtype="step", color=colour("QPP, extended"), label="QPP, extended")
        axis.axvline(100 * DENSITY, color="black", linewidth=1)
        axis.set_xlabel("density, % (right edge: 4% and above)")
        axis.set_ylabel("(sample, layer) pairs")
        axis.set_title(f"Figure {number}: distribution of the density, {name}")
        axis.legend()
    figure.suptitle(f"{task.title}; w8a4, density 1%")
    common.save(figure, options, "qpp_figures_7_8_9")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, print, write."""
    options = common.parse(__doc__, arguments, runs=(1, 1))
    started = time.perf_counter()
    common.settle()
    task = workload(KEY, options.data, options.weights, quick=options.quick)
    four = {"gaussian": [gaussian_density(e) for e in ERRORS], **measured_density(task)}
    widths = [bits for bits in BITS if options.asks_for(bits)]
    jobs = [(bits, share, options) for bits in widths for share in DENSITIES]
    scores = common.run_jobs(accuracy_at, jobs, options)
    five = {str(b): scores[k * len(DENSITIES) : (k + 1) * len(DENSITIES)] for k, b in enumerate(widths)}
    reports = common.run_jobs(predictions, [(name, options) for name in PREDICTORS], options)
    found = dict(zip(PREDICTORS, reports, strict=True))
    report: dict[str, Any] = {"data": task.title, "fp32": task.score(task.model), "threshold errors": ERRORS}
    report |= {"figure 4": four, "densities": DENSITIES, "figure 5": five}
    report["layers"] = [layer.site for layer in reports[0].layers]
    report["figure 7"] = {"static": layer_errors(reports[0], "static")}
    report["figure 7"] |= {name: layer_errors(r, "predicted") for name, r in found.items()}
    report["failure rates"] = {
        name: {s: {"FR(1)": r.failure_rate(s, 1.0), "FR(0.5)": r.failure_rate(s, 0.5)} for s in ("static", "predicted")}
        for name, r in found.items()
    }
    rows = [[f"{100 * d:.2f}", *(f"{five[str(b)][k]:.2f}" for b in widths)] for k, d in enumerate(DENSITIES)]
    common.show(
        f"QPP figure 5: {task.title}; FP32 {report['fp32']:.2f}", ("density %", *(f"w8a{b}" for b in widths)), rows
    )
    lines = [[f"{100 * e:+.0f}", *(f"{100 * four[k][i]:.2f}" for k in four)] for i, e in enumerate(ERRORS)]
    columns = ("threshold error %", "Gaussian: density %", "this network: quartile", "median", "quartile")
    common.show(f"QPP figure 4: {task.title}; target 1%", columns, lines)
    thirds = len(report["layers"]) // 3
    parts = [slice(0, thirds), slice(thirds, 2 * thirds), slice(2 * thirds, None)]
    table = []
    for name, line in report["figure 7"].items():
        means = [torch.tensor(line["mean"][part]).mean() for part in parts]
        frs = report["failure rates"][name]["predicted"] if name in found else None
        frs = frs or report["failure rates"]["QPP, paper, one predictor"]["static"]
        table.append([name, *(f"{m:.1f}" for m in means), *(f"{100 * frs[k]:.1f}" for k in ("FR(1)", "FR(0.5)"))])
    columns = ("", "error %: first third", "middle", "last third of the layers", "FR(1) %", "FR(0.5) %")
    common.show(f"QPP figures 7 to 9: {task.title}; w8a4, density 1%", columns, table)
    plot_figures_4_and_5(report, task, options)
    plot_figures_7_to_9(found, task, options)
    common.write(options, "qpp_figures", report, started)
    return report


if __name__ == "__main__":
    main()
