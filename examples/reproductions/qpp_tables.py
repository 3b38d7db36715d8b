"""Tables 2 and 3 of the QPP paper: scores and failure rates of Dense+Sparse, with standard quantization beside it.

    python -m examples.reproductions.qpp_tables --quick
    python -m examples.reproductions.qpp_tables --network espcn --data ~/Set5
    python -m examples.reproductions.qpp_tables --network efficientnet_lite0 --data ~/imagenet

Weights to 8 bits by equation 16, activations to 4 or 8, density 1%. As in the paper the first and last layer stay float
(not in ESPCN), features are taken at the first ReLU of the classifier, at the input of ESPCN and at four places of the
U-Net. Sources of the parameters: static (mean over calibration, equation 1), dynamic (each sample's own), QPP as in the
paper (least squares on three quantiles, mean and maximum, no intercept), and the default mode of this package, whose
predictions are not known before inference and cost more. "Standard" is equation 12 on minimum and maximum.

Every score is taken on held-out samples, as they are and under other exposures (grey times 2^u, u uniform in [-1, 1]),
which calibration never saw. FR(d): share of (sample, layer) pairs whose density is outside 1% +- d%; every source is
applied to the identical tensors. dynamic's own FR, the floor, is not zero: values tie at the threshold.
"""

from __future__ import annotations

import operator
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import PlaceholderObserver, QConfig
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.nn import functional as F

from dqa_plugins import QPP, DenseSparse, Direct, DQAWarning, Method
from dqa_plugins.adapters.fx import get_qconfig, get_qconfig_mapping
from dqa_plugins.qpp import QPPReport, qpp_report
from examples.reproductions import common
from examples.reproductions.workloads import PATCH, Batches, Workload, workload

STAND_INS = ("resnet32", "espcn", "unet")
NETWORKS = (*STAND_INS, "efficientnet_lite0")
FAMILIES = ("Dense+Sparse", "standard")
SOURCES = ("dynamic", "static", "QPP, paper", "QPP, default")
BITS = (4, 8)
DENSITY = 0.01
SITES: dict[str, tuple[str, ...] | None] = {
    "resnet32": None,  # the first quantized tensor: the output of the first ReLU
    "efficientnet_lite0": None,
    "espcn": ("input",),
    "unet": ("down.0.relu1", "down.2.relu1", "bottom.relu1", "merge.1.relu1"),
}
SAMPLES = 128  # calibration samples, at least


def source(name: str, key: str, sites: tuple[str, ...] | None = None) -> str | QPP:
    """The qparams of a row."""
    if not name.startswith("QPP"):
        return name
    mode = "paper" if name.endswith("paper") else "extended"
    return QPP(mode=mode, sites=sites or SITES[key])


def method(family: str, bits: int, qparams: str | QPP, density: float = DENSITY) -> Method:
    """The method of a row; static parameters are the mean over calibration, as in the paper."""
    if family == "Dense+Sparse":
        return DenseSparse(bits=bits, density=density, qparams=qparams)
    return Direct(bits=bits, symmetric=False, reduce="mean", qparams=qparams)


@torch.no_grad()
def quantize(task: Workload, chosen: Method, run: int) -> nn.Module:
    """The network with 8-bit weights (eq. 16) and quantized activations, calibrated on a subset of its own."""
    skip = () if task.key == "espcn" else ("first", "last")
    mapping = get_qconfig_mapping(chosen, weight_bits=8, weight_scheme="qpp", skip=skip)
    if task.key == "espcn":
        # as in the paper what the convolutions read is quantized: neither the image that is added to, nor the output
        mapping.set_object_type(F.interpolate, None).set_object_type(operator.add, None)
        mapping.set_object_type(nn.PixelShuffle, None)
        weight = get_qconfig(chosen, weight_bits=8, weight_scheme="qpp").weight
        mapping.set_module_name("conv3", QConfig(PlaceholderObserver.with_args(dtype=torch.float32), weight))
    inputs, _ = task.draw(max(SAMPLES, task.calibration), run)
    prepared = prepare_fx(task.model, mapping, (inputs[:2],))
    for part in inputs.split(32):
        prepared(part)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DQAWarning)  # layers that keep static parameters: counted in the report
        return convert_fx(prepared)


def density_samples(task: Workload, batches: Batches) -> list[Tensor]:
    """Inputs that densities are taken of: the test part; for ESPCN patches of its photos, which differ in size."""
    if task.key != "espcn":
        return [inputs for inputs, _ in batches]
    patches = []
    for inputs, _ in batches:
        rows = inputs.unfold(2, PATCH, PATCH * 4 // 5).unfold(3, PATCH, PATCH * 4 // 5)
        patches.append(rows.reshape(-1, 1, PATCH, PATCH))
    return list(torch.cat(patches).split(16))


def rates(report: QPPReport) -> dict[str, float]:
    """FR(1) and FR(0.5) in percent by source, and of the small layers apart."""
    found = {}
    for name in ("static", "predicted", "dynamic"):
        for margin, share in (("1", 1.0), ("0.5", 0.5)):
            found[f"{name} FR({margin})"] = 100 * report.failure_rate(name, share)
    found["predicted FR(0.5), small layers"] = 100 * report.failure_rate("predicted", 0.5, small=True)
    return found


def measure(key: str, family: str, bits: int, name: str, run: int, options: common.Options) -> dict[str, Any]:
    """One row in one run. Runs in a process of its own."""
    task = workload(key, options.data, options.weights, quick=options.quick)
    model = quantize(task, method(family, bits, source(name, key)), run)
    row: dict[str, Any] = {"network": key, "family": family, "bits": bits, "source": name, "run": run}
    for exposure, batches in (("clean", task.test), ("shifted", task.shifted())):
        row[exposure] = task.score(model, batches)
        if name.startswith("QPP") and family == "Dense+Sparse" and bits == BITS[0]:
            report = qpp_report(model, density_samples(task, batches))
            row[f"{exposure} rates"] = rates(report)
            row["layers"] = len(report.layers)
            row["layers kept static"] = sum(bool(layer.reason) for layer in report.layers)
    return row


def table2(rows: list[dict[str, Any]], task: Workload, fp32: dict[str, float], options: common.Options) -> list[Any]:
    """Scores of one network. Returns the cells."""
    cells, lines = [], []
    for bits in BITS:
        lines += [None, [f"w8a{bits}", "FP32", "", f"{fp32['clean']:.2f}", f"{fp32['shifted']:.2f}"]]
        for family in FAMILIES:
            for name in SOURCES:
                key = (task.key, family, bits, name)
                found = [r for r in rows if (r["network"], r["family"], r["bits"], r["source"]) == key]
                cell = {e: common.mean_std(r[e] for r in found) for e in ("clean", "shifted")}
                cells.append({"network": task.key, "family": family, "bits": bits, "source": name, **cell})
                lines.append([f"w8a{bits}", family, name, str(cell["clean"]), str(cell["shifted"])])
    title = f"QPP Table 2: {task.title}; {options.runs} runs, density 1%"
    common.show(title, ("", "method", "parameters", f"{task.metric}", "shifted exposure"), lines, text=3)
    return cells


def table3(rows: list[dict[str, Any]], task: Workload) -> list[dict[str, Any]]:
    """Failure rates of one network. Returns the cells."""
    names = {"static": "static", "QPP, paper": "predicted", "QPP, default": "predicted", "dynamic": "dynamic"}
    cells, lines = [], []
    for name, key in names.items():
        origin = name if name.startswith("QPP") else "QPP, default"  # static and dynamic on that model's tensors
        found = [r for r in rows if r["network"] == task.key and r["source"] == origin and "clean rates" in r]
        cell: dict[str, Any] = {"network": task.key, "source": name}
        for exposure in ("clean", "shifted"):
            for margin in ("1", "0.5"):
                values = [r[f"{exposure} rates"][f"{key} FR({margin})"] for r in found]
                cell[f"{exposure} FR({margin})"] = common.mean_std(values)
        cell["layers kept static"] = [r["layers kept static"] for r in found] if name.startswith("QPP") else None
        cells.append(cell)
        shown = [str(value) for value in cell.values() if isinstance(value, common.Mean)]
        lines.append([f"D+S {name}" + (" (the floor)" if name == "dynamic" else ""), *shown])
    columns = ("parameters", "FR(1) %", "FR(0.5) %", "shifted: FR(1) %", "FR(0.5) %")
    common.show(f"QPP Table 3: {task.title}; w8a4, density 1%", columns, lines)
    return cells


def plot(
    cells: list[Any], frs: list[Any], tasks: list[Workload], fp32: dict[str, Any], options: common.Options
) -> None:
    """Scores at w8a4 above, failure rates below, one column per network."""
    figure, panels = common.axes(2 * len(tasks), width=5.2, height=3.6, columns=len(tasks))
    caps = 2 if options.runs > 1 else 0
    for column, task in enumerate(tasks):
        axis = panels[column]
        labels, clean, shifted = [], [], []
        for family in FAMILIES:
            for name in SOURCES:
                key = (task.key, family, BITS[0], name)
                cell = next(c for c in cells if (c["network"], c["family"], c["bits"], c["source"]) == key)
                labels.append(("D+S " if family == "Dense+Sparse" else "std. ") + name)
                clean.append(cell["clean"])
                shifted.append(cell["shifted"])
        places = range(len(labels))
        for offset, values, label, marker in ((-0.1, clean, "clean", "o"), (0.1, shifted, "shifted exposure", "s")):
            heights, spreads = [v.mean for v in values], [v.std for v in values]
            x = [p + offset for p in places]
            axis.errorbar(x, heights, spreads, fmt=marker, markersize=6, capsize=caps, label=label)
        axis.axhline(fp32[task.key]["clean"], color="tab:blue", linewidth=1, label="FP32")
        axis.axhline(fp32[task.key]["shifted"], color="tab:orange", linewidth=1, label="FP32, shifted")
        axis.set_xticks(list(places), labels, rotation=40, ha="right", fontsize=7)
        axis.set_ylabel(f"{task.metric}, w8a4")
        axis.set_title(f"{task.network}\n{task.data}", fontsize=9)
        below = panels[len(tasks) + column]
        found = [c for c in frs if c["network"] == task.key]
        for number, key in enumerate(("clean FR(1)", "clean FR(0.5)", "shifted FR(1)", "shifted FR(0.5)")):
            heights, spreads = [c[key].mean for c in found], [c[key].std for c in found]
            x = [p + 0.2 * (number - 1.5) for p in range(len(found))]
            below.bar(x, heights, 0.2, yerr=spreads if caps else None, capsize=caps, label=key)
        below.set_xticks(range(len(found)), [c["source"] for c in found], fontsize=8)
        below.set_ylabel("failure rate, %")
    for axis in (panels[0], panels[len(tasks)]):
        axis.legend(fontsize=7)
    figure.suptitle("Dense+Sparse with 1% density, and standard quantization (min / max): scores and failure rates")
    common.save(figure, options, "qpp_tables")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, print, write."""
    options = common.parse(__doc__, arguments, runs=(3, 1), networks=NETWORKS)
    started = time.perf_counter()
    common.settle()
    keys = [options.network] if options.network else list(STAND_INS)
    tasks = [workload(key, options.data, options.weights, quick=options.quick) for key in keys]
    jobs = [
        (key, family, bits, name, run, options)
        for key in reversed(keys)
        for name in reversed(SOURCES)
        for family in FAMILIES
        for bits in BITS
        for run in range(options.runs)
    ]
    rows = common.run_jobs(measure, jobs, options)
    fp32 = {t.key: {"clean": t.score(t.model), "shifted": t.score(t.model, t.shifted())} for t in tasks}
    cells = [cell for task in tasks for cell in table2(rows, task, fp32[task.key], options)]
    frs = [cell for task in tasks for cell in table3(rows, task)]
    plot(cells, frs, tasks, fp32, options)
    report = {
        "data": {t.key: t.title for t in tasks},
        "fp32": fp32,
        "scores": cells,
        "failure_rates": frs,
        "rows": rows,
    }
    common.write(options, "qpp_tables", report, started)
    return report


if __name__ == "__main__":
    main()
