"""Figure 2 of the DQA paper and its compression ratio: how shift errors are distributed, and what Huffman makes of it.

    python -m examples.reproductions.dqa_figure2 --quick

ResNet-32, stored shortcuts, m = 3, the paper's setting (signed, per-sample scale, 40% of the channels), n = 3, 4, 5.
Counts of the bits that a shift error takes, none of them leaving the table out:

    entropy             of the distribution, order 0: the floor for any code of single symbols
    fixed codebook      Huffman lengths from the calibration subset, one table per layer, held once
    codebook per tensor Huffman lengths from the tensor itself, whose table (4 bits a symbol) goes with it: one for a
                        batch of 128, or one for every sample

"shift-error bytes" are what the packed tensors really hold: streams, their lengths and padding included. The ratio is
m over the bits. Zero activations have zero codes: without them the errors are close to uniform, so both are shown.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dqa_plugins import DQA, functional, iter_quantizers, rank_channels
from dqa_plugins.storage import convert_stored, storage_report
from dqa_plugins.storage.coder.huffman import code_lengths
from examples.reproductions import common
from examples.reproductions.dqa_table1 import calibrated, freeze
from examples.reproductions.workloads import Workload, workload

BITS = (3, 4, 5)
EXTRA = 3
LIMIT = 12  # longest code in bits, as in the package
TABLE_BITS = 4 * 2**EXTRA  # code lengths of one table


def entropy(counts: np.ndarray) -> float:
    """Bits per symbol of (A,) counts, order 0."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())


def huffman(counts: np.ndarray, weights: np.ndarray) -> float:
    """Bits per symbol when `counts` are coded with lengths made for `weights`; every symbol keeps a code."""
    return float((code_lengths(weights + 0.5, LIMIT) * counts).sum() / counts.sum())


def shift_errors(prepared: Any, inputs: Tensor) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Counts of the shift errors of the important channels at each site for one batch.

    Args:
        prepared: a network with frozen DQA quantizers.
        inputs: (N, C, H, W).

    Returns:
        {site: (counts of all values, counts of those with an activation other than zero)}, each (N, 2^m).
    """
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    hooks = []

    def note(name: str) -> Any:
        def count(quantizer: Any, arguments: tuple[Tensor, ...], _: Tensor) -> None:
            x, extra = arguments[0], quantizer.extra_bits
            scale = quantizer.runtime_qparams(x)[0]
            errors = functional.dqa_quantize(x, scale, extra, quantizer.method.bits, signed=quantizer.signed)[1]
            important = (extra > 0).reshape(1, -1, 1, 1).expand_as(x)
            sample = torch.arange(len(x)).reshape(-1, 1, 1, 1)
            index = sample * 2**EXTRA + errors
            size = len(x) * 2**EXTRA
            all_values, nonzero = (
                np.bincount(index[mask].numpy(), minlength=size).reshape(len(x), -1)
                for mask in (important, important & (x != 0))
            )
            found[name] = (all_values, nonzero)

        return count

    for name, quantizer in iter_quantizers(prepared):
        hooks.append(quantizer.register_forward_hook(note(name)))
    with torch.no_grad():
        prepared(inputs)
    for hook in hooks:
        hook.remove()
    return found


def held_bits(prepared: Any, task: Workload, bits: int) -> float:
    """Bits per shift error really held: packed bytes and tables less the n-bit codes, over the important values."""
    report = storage_report(convert_stored(prepared, "shift_error"), task.test[0][0])
    shares = {name: float((q.extra_bits > 0).double().mean()) for name, q in iter_quantizers(prepared)}
    important = sum(edge.elements * shares[edge.name] for edge in report.edges)
    total = 8 * (report.nbytes + report.codebook_nbytes)
    return (total - bits * report.elements) / important


def measure(bits: int, options: common.Options) -> dict[str, Any]:
    """One bit width. Runs in a process of its own."""
    task = workload("resnet32", options.data, options.weights, quick=options.quick)
    prepared = calibrated(task, DQA.paper(bits, ratio=task.ratio, extra_bits=EXTRA), 0)
    rank_channels(prepared, task.calibration_batches(0, task.ranking), progress=False)
    held = held_bits(prepared, task, bits)
    freeze(prepared, literal=False)
    training = [shift_errors(prepared, inputs) for inputs, _ in task.calibration_batches(0)]
    tables = {site: sum(part[site][0].sum(0) for part in training) for site in training[0]}
    batches = [(site, *pair) for inputs, _ in task.test for site, pair in shift_errors(prepared, inputs).items()]
    tensors = [(site, counts.sum(0)) for site, counts, _ in batches]
    samples = [counts for _, batch, _ in batches for counts in batch if counts.any()]
    everything = sum(counts for _, counts in tensors)
    nonzero = sum(batch.sum(0) for _, _, batch in batches)
    values = everything.sum()
    fixed = sum(counts.sum() * huffman(counts, tables[site]) for site, counts in tensors) + TABLE_BITS * len(tables)
    own = sum(counts.sum() * huffman(counts, counts) + TABLE_BITS for _, counts in tensors)
    each = sum(counts.sum() * huffman(counts, counts) + TABLE_BITS for counts in samples)
    found = {
        "entropy": sum(counts.sum() * entropy(counts) for _, counts in tensors),
        "fixed_codebook": fixed,
        "codebook_per_tensor": own,
        "codebook_per_sample": each,
    }
    per_value = {name: float(total / values) for name, total in found.items()} | {"held": held}
    return {
        "bits": bits,
        "distribution": (everything / values).tolist(),
        "distribution_nonzero": (nonzero / nonzero.sum()).tolist(),
        "zero_activations": 1 - float(nonzero.sum() / values),
        "entropy_nonzero": entropy(nonzero),
        **per_value,
        **{f"ratio_{name}": EXTRA / bits_each for name, bits_each in per_value.items()},
    }


def plot(rows: list[dict[str, Any]], task: Workload, options: common.Options) -> None:
    """The distributions, one panel per bit width, and the bits."""
    figure, panels = common.axes(len(rows) + 1, width=5.4, height=3.4, columns=2)
    symbols = np.arange(2**EXTRA)
    for axis, row in zip(panels, rows, strict=False):
        axis.bar(symbols - 0.2, row["distribution"], 0.4, label="all values", color="tab:green")
        axis.bar(symbols + 0.2, row["distribution_nonzero"], 0.4, label="non-zero activations", color="palegreen")
        axis.axhline(2.0**-EXTRA, color="grey", linewidth=1, linestyle=":", label="uniform")
        axis.set_title(f"n = {row['bits']}, m = {EXTRA}; {100 * row['zero_activations']:.0f}% zeros")
        axis.set_xlabel("shift error (code of m bits)")
        axis.set_ylabel("share")
        axis.legend(fontsize=9)
    x = np.arange(len(rows))
    names = {
        "entropy": "entropy",
        "fixed_codebook": "Huffman, codebook fixed at calibration",
        "codebook_per_tensor": "Huffman, codebook per tensor (batch)",
        "codebook_per_sample": "Huffman, a table for every sample",
        "held": "bytes really held",
    }
    shades = ("black", "darkgreen", "tab:green", "limegreen", "palegreen")
    for number, (key, name) in enumerate(names.items()):
        panels[-1].bar(x + 0.17 * (number - 2), [row[key] for row in rows], 0.16, label=name, color=shades[number])
    panels[-1].axhline(EXTRA, color="grey", linewidth=1, linestyle=":", label="m bits, uncoded")
    panels[-1].set_xticks(x, [f"n = {row['bits']}" for row in rows])
    panels[-1].set_ylim(0, 5.6)
    panels[-1].set_ylabel("bits per shift error")
    panels[-1].legend(fontsize=8, loc="upper right")
    figure.suptitle(f"Shift errors of stored shortcuts: {task.title}")
    common.save(figure, options, "dqa_figure2")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, print, write."""
    options = common.parse(__doc__, arguments, runs=(1, 1))
    started = time.perf_counter()
    common.settle()
    task = workload("resnet32", options.data, options.weights, quick=options.quick)
    rows = common.run_jobs(measure, [(bits, options) for bits in BITS], options)
    names = ("entropy", "fixed_codebook", "codebook_per_tensor", "codebook_per_sample", "held")
    rows_shown = [
        [str(row["bits"]), *(f"{row[name]:.3f}" for name in names), f"{100 * row['zero_activations']:.0f}%"]
        for row in rows
    ]
    ratios = [[f"{row['bits']}, ratio", *(f"{row[f'ratio_{name}']:.3f}" for name in names), ""] for row in rows]
    common.show(
        f"Bits per shift error (m = {EXTRA}), {task.title}; the paper: ratio up to 1.12 on CIFAR-10",
        ("n", "entropy", "fixed codebook", "table per batch", "table per sample", "held", "zeros"),
        [*rows_shown, None, *ratios],
    )
    plot(rows, task, options)
    report = {"data": task.title, "extra_bits": EXTRA, "rows": rows}
    common.write(options, "dqa_figure2", report, started)
    return report


if __name__ == "__main__":
    main()
