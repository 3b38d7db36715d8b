"""Tables 2 and 3 of the QPP paper: scores and failure rates of Dense+Sparse, with standard quantization beside it.

    python -m examples.reproductions.qpp_tables --quick
    python -m examples.reproductions.qpp_tables --network espcn --data ~/Set5
    python -m examples.reproductions.qpp_tables --network resnet18 --data ~/imagenet
    python -m examples.reproductions.qpp_tables --network hrnet --data ~/cityscapes --weights hrnet.safetensors

Weights to 8 bits by equation 16, activations to 4 or 8, density 1%. As in the paper the first and last layer stay float
(not in ESPCN), features are taken at the first ReLU of the classifiers, at the input of ESPCN and at four places of the
segmentation networks. "Standard" is equation 12 on minimum and maximum. Sources of the parameters:

    dynamic, static             each sample's own; the mean over calibration (equation 1)
    QPP, paper                  least squares on three quantiles, mean and maximum, no intercept
    QPP, paper, same data       the same, fitted on calibration and on the augmented copy that the extended mode sees
    QPP, extended               our default: more features, ridge, augmented calibration; not known before inference
    QPP, extended, no augmentation

Every score is taken on held-out samples, as they are and under other exposures (grey times 2^u, u uniform in [-1, 1]).
The augmentation of the extended mode changes exposure by e^0.8 = 2.2 either way, so it covers these shifts; the rows
"same data" and "no augmentation" tell what that brings. FR(d): share of (sample, layer) pairs whose density is outside
1% +- d%; every source is applied to the identical tensors. A layer that features are taken of, and one with fewer than
1,000 values, is counted apart: there a prediction is (nearly) the layer's own statistic. dynamic's own FR, the floor,
is not zero: values tie at the threshold.
"""

from __future__ import annotations

import operator
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
from dqa_plugins.qpp.augment import change
from examples.reproductions import common
from examples.reproductions.style import colour
from examples.reproductions.workloads import PATCH, Batches, Workload, chosen, workload

STAND_INS = ("resnet32", "mobilenetv2", "espcn", "unet")
NETWORKS = (*STAND_INS, "efficientnet_lite0", "resnet18", "resnet34", "hrnet")
FAMILIES = ("Dense+Sparse", "standard")
BOTH_SIDES = "Dense+Sparse, two thresholds"  # also where no value is negative: half of the outliers are the smallest
SOURCES = ("dynamic", "static", "QPP, paper", "QPP, extended")
FITTED = ("QPP, paper", "QPP, paper, same data", "QPP, extended", "QPP, extended, no augmentation")
EXPOSURES = ("clean", "shifted")
BITS = (4, 8)
DENSITY = 0.01
# where features are taken of; the others: at the first quantized tensor, the output of the first ReLU
SITES: dict[str, tuple[str, ...]] = {
    "espcn": ("input",),
    "unet": ("down.0.relu1", "down.2.relu1", "bottom.relu1", "merge.1.relu1"),
    "hrnet": ("backbone.act1", "backbone.transition1", "backbone.transition2", "backbone.transition3"),
}
SAMPLES = 128  # calibration samples, at least


def qparams_of(name: str, key: str, sites: tuple[str, ...] | None = None) -> str | QPP:
    """The qparams of a row."""
    if not name.startswith("QPP"):
        return name
    mode = "paper" if "paper" in name else "extended"
    return QPP(mode=mode, sites=sites or SITES.get(key), augment="no augmentation" not in name)


def method(family: str, bits: int, qparams: str | QPP, density: float = DENSITY) -> Method:
    """The method of a row; static parameters are the mean over calibration, as in the paper."""
    if family != "standard":
        signed = True if family == BOTH_SIDES else None
        return DenseSparse(bits=bits, density=density, qparams=qparams, signed=signed)
    return Direct(bits=bits, symmetric=False, reduce="mean", qparams=qparams)


@torch.no_grad()
def quantize(task: Workload, chosen: Method, run: int, *, same_data: bool = False) -> nn.Module:
    """The network with 8-bit weights (eq. 16) and quantized activations, calibrated on a subset of its own.

    Args:
        same_data: calibrate on the copy as well that the augmentation of the extended mode makes.
    """
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
    if same_data:
        inputs = torch.cat([inputs, *change((inputs,), 0)])
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
    """FR(1) and FR(0.5) in percent by source: of all layers of 1,000 values, of those that others' features tell of."""
    large = [layer for layer in report.layers if not layer.small]
    groups = {"": large, ", own-site layers apart": [layer for layer in large if layer.reads != layer.site]}
    return {
        f"{name} FR({margin}){suffix}": 100 * QPPReport(layers).failure_rate(name, share)
        for suffix, layers in groups.items()
        for name in ("static", "predicted", "dynamic")
        for margin, share in (("1", 1.0), ("0.5", 0.5))
    }


def measure(network: str, family: str, bits: int, source: str, run: int, options: common.Options) -> dict[str, Any]:
    """One row in one run. Runs in a process of its own."""
    task = workload(network, options.data, options.weights, quick=options.quick)
    model = task.model
    if source != "FP32":
        chosen = method(family, bits, qparams_of(source, network))
        model = quantize(task, chosen, run, same_data="same data" in source)
    row: dict[str, Any] = {}
    for exposure, batches in zip(EXPOSURES, (task.test, task.shifted()), strict=True):
        row[exposure] = task.scores(model, batches)
        if source.startswith("QPP") and family == "Dense+Sparse" and bits == BITS[0]:
            report = qpp_report(model, density_samples(task, batches))
            row[f"{exposure} rates"] = rates(report)
            row["layers"] = len(report.layers)
            row["own-site layers"] = sum(layer.reads == layer.site for layer in report.layers)
            row["small layers"] = sum(layer.small for layer in report.layers)
            row["layers kept static"] = sum(bool(layer.reason) for layer in report.layers)
    return row


def scores_of(rows: list[dict[str, Any]], network: str) -> list[dict[str, Any]]:
    """Cells of table 2 of one network: mean and deviation over the runs."""
    cells: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in (r for r in rows if r["network"] == network):
        cells.setdefault((row["family"], row["bits"], row["source"]), []).append(row)
    order = ("FP32", *SOURCES[:2], *FITTED)
    return [
        {
            "family": family,
            "bits": bits,
            "source": name,
            "runs": len(found),
            **{e: {k: common.mean_std(r[e][k] for r in found) for k in found[0][e]} for e in EXPOSURES},
        }
        for (family, bits, name), found in sorted(
            cells.items(), key=lambda c: (c[0][1], ("", *FAMILIES, BOTH_SIDES).index(c[0][0]), order.index(c[0][2]))
        )
    ]


def rates_of(rows: list[dict[str, Any]], network: str, suffix: str = "") -> list[dict[str, Any]]:
    """Cells of table 3 of one network; static and dynamic are those on the extended model's tensors.

    Args:
        suffix: "" for all layers, ", own-site layers apart".
    """
    found = []
    for name in ("static", *FITTED, "dynamic"):
        origin, key = (name, "predicted") if name.startswith("QPP") else ("QPP, extended", name)
        runs = [r for r in rows if r["network"] == network and r["source"] == origin and "clean rates" in r]
        if runs:
            names = [(e, margin) for e in EXPOSURES for margin in ("1", "0.5")]
            values = {
                f"{e} FR({m})": common.mean_std(r[f"{e} rates"][f"{key} FR({m}){suffix}"] for r in runs)
                for e, m in names
            }
            found.append({"source": name, "runs": len(runs), **values})
    return found


def show(report: dict[str, Any], task: Workload) -> None:
    """Tables 2 and 3 of one network."""
    cells = scores_of(report["rows"], task.key)
    for metric in cells[0]["clean"]:
        lines = [
            [
                f"w8a{c['bits']}" if c["bits"] < 32 else "",
                c["family"],
                c["source"],
                *(str(c[e][metric]) for e in EXPOSURES),
                str(c["runs"]),
            ]
            for c in cells
        ]
        what = task.metric if metric == "score" else metric
        columns = ("", "method", "parameters", what, "shifted exposure", "runs")
        common.show(f"QPP Table 2: {task.title}; density 1%", columns, lines, text=3)
    columns = ("parameters", "FR(1) %", "FR(0.5) %", "shifted: FR(1) %", "FR(0.5) %", "runs")
    for suffix in ("", ", own-site layers apart"):
        lines = [
            [c["source"], *(str(v) for v in c.values() if isinstance(v, common.Mean)), str(c["runs"])]
            for c in rates_of(report["rows"], task.key, suffix)
        ]
        common.show(f"QPP Table 3: {task.title}; w8a4, density 1%{suffix}", columns, lines)


def plot(report: dict[str, Any], options: common.Options) -> None:
    """Failure rates, clean above and shifted below, one column per network."""
    networks = [key for key in NETWORKS if any(row["network"] == key for row in report["rows"])]
    figure, panels = common.axes(2 * len(networks), width=3.6, height=3.3, columns=len(networks))
    names = ("static", *FITTED)
    for column, network in enumerate(networks):
        cells = {c["source"]: c for c in rates_of(report["rows"], network, ", own-site layers apart")}
        for row, exposure in enumerate(EXPOSURES):
            axis = panels[row * len(networks) + column]
            for place, name in enumerate(n for n in names if n in cells):
                found = cells[name][f"{exposure} FR(0.5)"]
                hatch = "//" if name.count(",") > 1 else ""
                axis.bar(place, found.mean, 0.8, yerr=found.std or None, capsize=2, color=colour(name), hatch=hatch)
            axis.set_xticks([])
            axis.set_ylim(0, 100)
            axis.set_title(report["data"][network].split(",")[0] + ", " + exposure, fontsize=11)
            if not column:
                axis.set_ylabel("failure rate FR(0.5), %", fontsize=11)
    import matplotlib.patches

    handles = [
        matplotlib.patches.Patch(facecolor=colour(n), hatch="//" if n.count(",") > 1 else "", label=n) for n in names
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=11)
    figure.suptitle("Dense+Sparse, 4 bits, target 1%: share of samples and layers outside 0.5 to 1.5%")
    common.save(figure, options, "qpp_tables")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, print, write."""
    options = common.parse(__doc__, arguments, runs=(3, 1), networks=NETWORKS)
    common.settle()
    tasks = chosen(options, STAND_INS)
    rows = [(family, bits, name) for bits in BITS for family in FAMILIES for name in SOURCES]
    rows += [("Dense+Sparse", BITS[0], name) for name in FITTED if name not in SOURCES]
    rows += [(BOTH_SIDES, BITS[0], "dynamic"), ("", 32, "FP32")]
    jobs = [
        {"network": task.key, "family": family, "bits": bits, "source": name, "run": run}
        for run in range(options.runs)
        for task in tasks
        for family, bits, name in rows
        if options.asks_for(bits, name) and (run == 0 or name != "FP32")
    ]
    report = common.collect(
        measure,
        jobs,
        options,
        "qpp_tables",
        **common.merged(options, "qpp_tables", tasks),
    )
    for task in tasks:
        show(report, task)
    plot(report, options)
    return report


if __name__ == "__main__":
    main()
