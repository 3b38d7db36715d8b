"""Figures of DQA's and NoisyQuant's experiments."""

from __future__ import annotations

from functools import cache
from typing import Any

from examples.reproductions import dqa_sweep, dqa_table1, efficientnet_agreement, noisyquant_transformer
from examples.reproductions.common import Mean
from examples.results.pages import ResultsError, block, load, table


def spread(found: Mean, runs: int, form: str = ".1f") -> str:
    """Mean and deviation; of one run the value alone."""
    return f"{found.mean:{form}}" + (f" ± {found.std:{form}}" if runs > 1 else "")


@cache
def cells() -> list[dict[str, Any]]:
    """Of DQA's table 1."""
    return dqa_table1.summarize(load("papers/dqa_table1")["rows"])


def cell(network: str, method: str, bits: int) -> dict[str, Any]:
    """One of them."""
    for found in cells():
        if (found["network"], found["method"], found["bits"]) == (network, method, bits):
            return found
    raise ResultsError(f"dqa_table1.json has no {network}, {method}, {bits} bits")


@block
def dqa_table1_of(network: str, value: str = "score") -> str:
    """A table of one network: rows by method, columns by bits; stored bits in brackets. One run: no deviation."""
    rows = []
    for method in dqa_table1.settings(4, 0.4):
        line = [method]
        for bits in dqa_table1.BITS:
            try:
                found = cell(network, method, bits)
                line.append(f"{spread(found[value], found['runs'])} ({found['stored_bits'].mean:.2f})")
            except (ResultsError, KeyError):
                line.append("-")
        if set(line[1:]) != {"-"}:
            rows.append(line)
    return table(["", *(f"{bits} bits" for bits in dqa_table1.BITS)], rows)


@block
def dqa(network: str, bits: str, method: str, value: str = "score", form: str = ".1f") -> str:
    """A mean of DQA's table 1: `dqa resnet32 3 "DQA, literal"`."""
    return format(cell(network, method, int(bits))[value].mean, form)


@block
def dqa_gain(network: str, bits: str, method: str, over: str) -> str:
    """Points that one row is above another."""
    return f"{cell(network, method, int(bits))['score'].mean - cell(network, over, int(bits))['score'].mean:.1f}"


@block
def dqa_fp32(network: str, value: str = "score") -> str:
    """FP32 score of a network."""
    return f"{load('papers/dqa_table1')['fp32'][network][value]:.2f}"


@block
def dqa_noise(network: str, bits: str, method: str) -> str:
    """At how many sites a noise was found, by run: "7 to 9"."""
    found = sorted(cell(network, method, int(bits))["sites_with_noise"])
    return str(found[0]) if found[0] == found[-1] else f"{found[0]} to {found[-1]}"


@block
def versions(name: str) -> str:
    """Which versions of the code measured the rows of a JSON."""
    counts: dict[str, int] = {}
    for row in load(name)["rows"]:
        counts[row["code"]] = counts.get(row["code"], 0) + 1
    return ", ".join(f"{code} ({count} rows)" for code, count in counts.items())


@block
def dqa_figure2() -> str:
    """Bits per shift error, and m over them."""
    report = load("papers/dqa_figure2")
    names = ("entropy", "fixed_codebook", "codebook_per_tensor", "codebook_per_sample", "held")
    rows = [[r["bits"], *(f"{r[n]:.3f} ({r[f'ratio_{n}']:.2f})" for n in names)] for r in report["rows"]]
    return table(["n", "entropy", "fixed codebook", "table per batch", "table per sample", "bytes held"], rows)


@block
def dqa_sweep_of(network: str, bits: str) -> str:
    """Rows by m, columns by ratio."""
    found = {
        (c["extra_bits"], c["ratio"]): c
        for c in dqa_sweep.summarize(load("papers/dqa_sweep")["rows"])
        if (c["network"], c["bits"]) == (network, int(bits))
    }
    ratios = sorted({ratio for _, ratio in found})
    rows = [
        [f"m = {extra}"]
        + [
            f"{c['score'].mean:.1f} ({c['stored_bits'].mean:.2f})" if (c := found.get((extra, ratio))) else "-"
            for ratio in ratios
        ]
        for extra in sorted({extra for extra, _ in found})
    ]
    return table([f"n = {bits}", *(f"{ratio:.0%}" for ratio in ratios)], rows)


@block
def dqa_sweep_best() -> str:
    """Per network and total of stored bits: the setting with the best score."""
    return table(*dqa_sweep.best(dqa_sweep.summarize(load("papers/dqa_sweep")["rows"])))


@block
def noisyquant_transformer_of(network: str) -> str:
    """Score, error of the outputs and sites with a noise."""
    found = noisyquant_transformer.summarize(load("papers/noisyquant_transformer")["rows"], network)
    rows = [
        [
            c["method"],
            c["bits"],
            spread(c["score"], c["runs"], ".2f"),
            spread(c["output_error"], c["runs"], ".3f"),
            c["sites_with_noise"],
            c["runs"],
        ]
        for c in found
    ]
    metric = noisyquant_transformer.METRICS[network]
    return table(["", "bits", metric, "output error, %", "sites with noise", "runs"], rows)


@block
def efficientnet(place: str) -> str:
    """Agreement with FP32: rows by method, columns by bits; bits per activation in brackets."""
    found = efficientnet_agreement.summarize(load("papers/efficientnet_agreement")["rows"])
    by = {(c["method"], c["bits"]): c for c in found if c["place"] == place}
    widths = sorted({bits for _, bits in by})
    rows = [
        [method]
        + [
            f"{spread(c['agreement'], c['runs'])} ({c['bits_per_activation'].mean:.2f})"
            if (c := by.get((method, bits)))
            else "-"
            for bits in widths
        ]
        for method in dict.fromkeys(method for method, _ in by)
    ]
    return table([place, *(f"{bits} bits" for bits in widths)], rows)


@block
def dqa_sweep_cell(network: str, bits: str, extra_bits: str, ratio: str, value: str = "score") -> str:
    """One cell of the sweep: its score, or its stored bits."""
    wanted = (network, int(bits), int(extra_bits), float(ratio))
    for c in dqa_sweep.summarize(load("papers/dqa_sweep")["rows"]):
        if (c["network"], c["bits"], c["extra_bits"], c["ratio"]) == wanted:
            return format(c[value].mean, ".1f" if value == "score" else ".2f")
    raise ResultsError(f"dqa_sweep.json has no {wanted}")
