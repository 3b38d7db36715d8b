"""Figures of QPP's experiments."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from examples.reproductions import qpp_guard, qpp_tables
from examples.reproductions.common import mean_std
from examples.results.blocks_dqa import spread
from examples.results.pages import ResultsError, block, load, table

NETWORKS = {"resnet32": "ResNet-32", "mobilenetv2": "MobileNetV2", "espcn": "ESPCN", "unet": "U-Net"}


def rows() -> list[dict[str, Any]]:
    """Of the tables 2 and 3."""
    found: list[dict[str, Any]] = load("papers/qpp_tables")["rows"]
    return found


@block
def qpp_data() -> str:
    """What the networks were measured on, and how many layers they have."""
    report, lines = load("papers/qpp_tables"), []
    for network, title in report["data"].items():
        found = next((r for r in rows() if r["network"] == network and "layers" in r), None)
        if found:
            kept = [r["layers kept static"] for r in rows() if r["network"] == network and "layers" in r]
            counts = [found[k] for k in ("layers", "own-site layers", "small layers")]
            lines.append([title, report["metric"][network], *counts, f"{min(kept)} to {max(kept)}"])
    columns = ("network", "score", "layers", "own-site", "below 1,000 values", "kept static, by row")
    return table(columns, lines)


@block
def qpp_scores(metric: str = "score") -> str:
    """Table 2: clean / shifted exposure, a column per network."""
    cells = {
        (network, c["bits"], c["family"], c["source"]): c
        for network in NETWORKS
        for c in qpp_tables.scores_of(rows(), network)
    }
    shown = [n for n in NETWORKS if any(key[0] == n for key in cells)]
    families, sources = (
        ("", *qpp_tables.FAMILIES, qpp_tables.BOTH_SIDES),
        ("FP32", "dynamic", "static", *qpp_tables.FITTED),
    )
    lines = []
    for bits, family, source in itertools.product((32, *qpp_tables.BITS), families, sources):
        if not any(key[1:] == (bits, family, source) for key in cells):
            continue
        line = ["FP32" if bits == 32 else f"w8a{bits}, {family}, {source}"]
        for network in shown:
            c = cells.get((network, bits, family, source))
            texts = [spread(c[e][metric], c["runs"], ".2f") for e in qpp_tables.EXPOSURES] if c else ["-"]
            line.append(" / ".join(texts))
        lines.append(line)
    return table(["clean / shifted", *(NETWORKS[n] for n in shown)], lines)


def _rates(suffix: str, names: tuple[str, ...]) -> Iterator[list[str]]:
    for network, title in NETWORKS.items():
        for cell in qpp_tables.rates_of(rows(), network, suffix):
            yield [title, cell["source"], *(spread(cell[n], cell["runs"]) for n in names), str(cell["runs"])]


@block
def qpp_rates(which: str = "all") -> str:
    """Table 3: failure rates by network and source; `apart`: without the layers that features are taken of."""
    names = tuple(f"{e} FR({m})" for e in qpp_tables.EXPOSURES for m in ("1", "0.5"))
    suffix = ", own-site layers apart" if which == "apart" else ""
    return table(["network", "parameters", *names, "runs"], list(_rates(suffix, names)))


@block
def qpp_summary() -> str:
    """FR(0.5) without own-site layers, a row per network: for the README."""
    sources = ("static", *qpp_tables.FITTED)
    lines = []
    for network, title in NETWORKS.items():
        cells = {c["source"]: c for c in qpp_tables.rates_of(rows(), network, ", own-site layers apart")}
        if cells:
            for exposure in qpp_tables.EXPOSURES:
                found = [cells.get(s) for s in sources]
                texts = [spread(c[f"{exposure} FR(0.5)"], c["runs"]) if c else "-" for c in found]
                lines.append([f"{title}, {exposure}", *texts])
    heads = [s.replace("QPP, ", "") for s in sources]
    return table(["FR(0.5), %", *heads], lines)


@block
def qpp_rate(network: str, source: str, name: str, which: str = "apart") -> str:
    """One failure rate: `qpp_rate resnet32 "QPP, paper" "clean FR(0.5)"`."""
    suffix = ", own-site layers apart" if which == "apart" else ""
    for cell in qpp_tables.rates_of(rows(), network, suffix):
        if cell["source"] == source:
            return spread(cell[name], cell["runs"])
    raise ResultsError(f"qpp_tables.json has no rates of {network}, {source}")


@block
def qpp_score(network: str, family: str, bits: str, source: str, exposure: str = "clean", form: str = ".2f") -> str:
    """One score of table 2."""
    for cell in qpp_tables.scores_of(rows(), network):
        if (cell["family"], cell["bits"], cell["source"]) == (family, int(bits), source):
            return f"{cell[exposure]['score'].mean:{form}}"
    raise ResultsError(f"qpp_tables.json has no {network}, {family}, {bits} bits, {source}")


@block
def qpp_figure4(density: str) -> str:
    """Density in percent when the threshold is 30% too low: `gaussian`, `median`, `low` or `high` of the layers."""
    report = load("papers/qpp_figures")
    place = report["threshold errors"].index(-0.3)
    return f"{100 * report['figure 4'][density][place]:.1f}"


@block
def qpp_figure5() -> str:
    """Accuracy of dynamic Dense+Sparse by density."""
    report = load("papers/qpp_figures")
    lines = [[f"w8a{bits}", *(f"{v:.2f}" for v in values)] for bits, values in report["figure 5"].items()]
    return table(["density, %", *(f"{100 * d:g}" for d in report["densities"])], lines)


@block
def qpp_toy_slopes() -> str:
    """The fitted slope over equation 10, by layer."""
    report = load("papers/qpp_toy")
    found = {layer: mean_std(ratios) for layer, ratios in report["slope_ratio_over_draws"].items()}
    return " and ".join(f"{m.mean:.2f} ± {m.std:.2f} (layer {layer})" for layer, m in found.items())


@block
def qpp_toy_fits() -> str:
    """R² and relative error of equation 10, and of a fitted line."""
    lines = [
        [r["network"], r["layer"], f"{r['slope_equation_10']:.3g}", f"{r['slope_fitted']:.3g}", f"{r['r2_fitted']:.2f}"]
        for r in load("papers/qpp_toy")["rows"]
    ]
    return table(["network", "layer", "slope, equation 10", "slope, fitted", "R², fitted"], lines)


@block
def qpp_guards(network: str) -> str:
    """Score and densities without a bound, with a cap and with a guard."""
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in load("papers/qpp_guard")["rows"]:
        if row["network"] == network:
            cells.setdefault((row["source"], row["action"]), []).append(row)
    lines = []
    for source in qpp_guard.SOURCES:
        for action in qpp_guard.ACTIONS:
            found = cells.get((source, action))
            if found:
                line = [source, action]
                for exposure in qpp_tables.EXPOSURES:
                    for key in ("score", "largest_density", "over_limit", "acted"):
                        line.append(spread(mean_std(r[exposure][key] for r in found), len(found), ".2f"))
                lines.append(line)
    names = ("score", "largest density", "pairs over 2%", "acted on")
    return table(["parameters", "action", *(f"{e}: {n}" for e in qpp_tables.EXPOSURES for n in names)], lines)


@block
def qpp_table1() -> str:
    """Time of one convolution by row, over dynamic int8."""
    report = load("dense_sparse")
    names = {
        "prepacked_fp32": "float32, prepacked weight",
        "bf16": "bfloat16",
        "dynamic_int8": "int8, dynamic",
        "static_int8": "int8, static",
        **{f"ds_dynamic_{d}": f"Dense+Sparse, dynamic, {d}%" for d in ("0", "0.5", "1", "2", "6")},
        **{f"ds_predicted_{d}": f"Dense+Sparse, predicted, {d}%" for d in ("0", "0.5", "1", "2", "6")},
    }
    times, ratios = report["convolution_us"], report["convolution_vs_dynamic"]
    return table(
        ["one convolution", "µs", "over dynamic int8"],
        [[text, f"{times[key]:.0f}", f"{ratios[key]:.2f}"] for key, text in names.items() if key in times],
    )


@block
def qpp_costs() -> str:
    """Time of a forward with predictions over static and dynamic parameters, beside FR(0.5)."""
    report, lines = load("prediction"), []
    for mode in ("paper", "extended"):
        gains = [qpp_rate(network, f"QPP, {mode}", "clean FR(0.5)") for network in ("resnet32", "mobilenetv2")]
        times = [
            f"{report[b][f'{mode}_time_vs_{o}']:.2f}" for b in ("batch_1", "batch_32") for o in ("static", "dynamic")
        ]
        shares = [f"{report[b]['features_share_by_mode'][mode]:.1%}" for b in ("batch_1", "batch_32")]
        lines.append([mode, *times, *shares, *gains])
    heads = [f"batch {b}, time over {o}" for b in (1, 32) for o in ("static", "dynamic")]
    return table(["mode", *heads, "features, batch 1", "batch 32", "FR(0.5) ResNet-32", "FR(0.5) MobileNetV2"], lines)


@block
def qpp_pixels(network: str, family: str, bits: str, source: str, exposure: str = "clean") -> str:
    """Pixel accuracy of a row of table 2."""
    for cell in qpp_tables.scores_of(rows(), network):
        if (cell["family"], cell["bits"], cell["source"]) == (family, int(bits), source):
            return f"{cell[exposure]['pixel_accuracy'].mean:.1f}"
    raise ResultsError(f"qpp_tables.json has no {network}, {family}, {bits} bits, {source}")
