"""m and the share of important channels, swept for every bit width (the DQA paper leaves this to future work).

    python -m examples.reproductions.dqa_sweep --network resnet32 --bits 2 3

The paper's setting of table 1 (signed, one scale per sample, stored shortcuts only); channels by quantization error on
calibration data, without the greedy search, which changes little from 3 bits on. Stored bits are measured bytes in the
paper's layout. The question that the table answers: for so many stored bits, is a wider code better, or more extra
bits, or more channels?
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dqa_plugins import DQA
from examples.reproductions import common
from examples.reproductions.dqa_table1 import Setting, calibrated, freeze, stored_bits
from examples.reproductions.workloads import chosen, workload

NETWORKS = ("resnet32", "mobilenetv2", "unet")
BITS = (2, 3, 4)
EXTRA = (0, 1, 2, 3, 4)
RATIOS = (0.1, 0.2, 0.4, 0.6, 0.8)


def measure(
    network: str, bits: int, extra_bits: int, ratio: float, run: int, options: common.Options
) -> dict[str, Any]:
    """One setting. Runs in a process of its own."""
    task = workload(network, options.data, options.weights, quick=options.quick)
    setting = Setting(DQA.paper(bits, extra_bits=extra_bits, ratio=ratio), "shift_error" if extra_bits else "none")
    prepared = calibrated(task, setting.method, run)
    stored = stored_bits(prepared, setting, task)
    freeze(prepared, "")
    return {**task.scores(prepared), "stored_bits": stored}


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and deviation over the runs."""
    cells: dict[tuple[str, int, int, float], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["network"], row["bits"], row["extra_bits"], row["ratio"]), []).append(row)
    values = ("score", "stored_bits")
    return [
        dict(zip(("network", "bits", "extra_bits", "ratio"), key, strict=True))
        | {v: common.mean_std(r[v] for r in found) for v in values}
        for key, found in sorted(cells.items())
    ]


def best(
    cells: list[dict[str, Any]], limits: Sequence[float] = (2.5, 3, 3.5, 4, 5)
) -> tuple[list[str], list[list[str]]]:
    """(columns, rows): for at most so many stored bits the setting with the best score, network by network."""
    rows = []
    for network in dict.fromkeys(c["network"] for c in cells):
        line = [network]
        for limit in limits:
            fitting = [c for c in cells if c["network"] == network and c["stored_bits"].mean <= limit + 0.05]
            if not fitting:
                line.append("-")
                continue
            top = max(fitting, key=lambda c: (c["score"].mean, -c["stored_bits"].mean))
            text = f"n = {top['bits']}" + (
                f", m = {top['extra_bits']}, {top['ratio']:.0%}" if top["extra_bits"] else ""
            )
            line.append(f"{text}: {top['score'].mean:.1f} ({top['stored_bits'].mean:.2f})")
        rows.append(line)
    return ["stored bits up to", *(f"{limit:g}" for limit in limits)], rows


def plot(cells: list[dict[str, Any]], report: dict[str, Any], options: common.Options) -> None:
    """Score against stored bits, a line per n and m, one panel per network."""
    networks = list(dict.fromkeys(c["network"] for c in cells))
    figure, panels = common.axes(len(networks), width=6.4, height=4.4)
    colours = ("black", "tab:cyan", "tab:olive", "tab:green", "tab:pink")
    for axis, network in zip(panels, networks, strict=True):
        for bits, marker in zip(BITS, "osD", strict=True):
            for extra in EXTRA:
                found = [c for c in cells if (c["network"], c["bits"], c["extra_bits"]) == (network, bits, extra)]
                if not found:
                    continue
                x, y = [c["stored_bits"].mean for c in found], [c["score"].mean for c in found]
                name = f"n = {bits}, m = {extra}" if extra else f"n = {bits}, Direct"
                axis.plot(x, y, marker=marker, color=colours[extra], markersize=5, linewidth=1, label=name)
        axis.set_xlabel("stored bits per activation")
        axis.set_ylabel(report["metric"][network])
        axis.set_title(report["data"][network].replace(", ", "\n", 1), fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 + len(networks))
    figure.suptitle("DQA, n bits and m more;\nalong a line 10 to 80% important channels")
    common.save(figure, options, "dqa_sweep")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, print, write."""
    options = common.parse(__doc__, arguments, runs=(3, 1), networks=NETWORKS)
    common.settle()
    tasks = chosen(options, NETWORKS)
    jobs = [
        {"network": task.key, "bits": bits, "extra_bits": extra, "ratio": ratio, "run": run}
        for run in range(options.runs)
        for task in tasks
        for bits in BITS
        if options.asks_for(bits)
        for extra in EXTRA[: bits + 1]  # the paper asks for m <= n
        for ratio in (RATIOS if extra else RATIOS[:1])
    ]
    report = common.collect(measure, jobs, options, "dqa_sweep", **common.merged(options, "dqa_sweep", tasks))
    cells = summarize(report["rows"])
    common.show("DQA: the best setting within so many stored bits", *best(cells))
    plot(cells, report, options)
    return report


if __name__ == "__main__":
    main()
