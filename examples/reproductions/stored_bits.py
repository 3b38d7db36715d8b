"""Accuracy against stored bits: what it costs in memory to keep the shortcuts of a network within half a point.

    python -m examples.reproductions.stored_bits --json out/stored_bits.json --plot out/stored_bits.png

For every method and bit width: calibrate on 256 training images (a seed draws them), convert, run the test images
through the stored model and count `nbytes` of every packed tensor, all side information and the tables (once) in.
Only stored activations are quantized; weights and all else stay float. The networks are trained on small stand-in data:
nothing here replicates a paper's number.

Methods:
    direct          Direct as in the DQA paper: signed, one scale per tensor, fixed-length codes
    rival           unsigned (after ReLU) Direct with one scale per channel, fixed-length codes
    rival_joint     the same with the entropy coder of this package: the one to beat
    dqa_paper       DQA in the paper's layout: n bits fixed, shift errors Huffman coded
    dqa_joint       the same values, whole codes entropy coded
    dqa_channel     DQA with unsigned codes and one scale per channel, whole codes entropy coded
    allocated       allocate_bits: a per-channel step chosen by the gradient of the loss, whole codes entropy coded
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dqa_plugins import DQA, Direct
from dqa_plugins.methods import Method
from dqa_plugins.storage import allocate_bits, convert_stored, prepare_stored, storage_report
from examples.networks import load
from examples.networks.digits import calibration_subset, load_split

TARGETS = (0.8, 1.0, 1.2, 1.35, 1.45, 1.6, 2.0, 2.5)
POINTS = 0.5  # the goal: within this many points of FP32
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}  # Student's t, seeds - 1 degrees


def candidates() -> list[tuple[str, str, Method, str, float | None]]:
    """(curve, label, method, coding, target bits) of every point."""
    points: list[tuple[str, str, Method, str, float | None]] = []
    for bits in (2, 3, 4, 5, 6):
        paper = {"bits": bits, "extra_bits": min(3, bits), "ratio": 0.4}
        points += [
            ("direct", f"n={bits}", Direct(bits=bits, signed=True), "none", None),
            ("rival", f"n={bits}", Direct(bits=bits, granularity="channel"), "none", None),
            ("rival_joint", f"n={bits}", Direct(bits=bits, granularity="channel"), "joint", None),
            ("dqa_paper", f"n={bits}", DQA(**paper, signed=True), "shift_error", None),
            ("dqa_joint", f"n={bits}", DQA(**paper, signed=True), "joint", None),
            ("dqa_channel", f"n={bits}", DQA(**paper, granularity="channel"), "joint", None),
        ]
    points += [("allocated", f"target={t}", DQA(bits=4, granularity="channel"), "joint", t) for t in TARGETS]
    return points


def test_accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in percent."""
    return float((model(images).argmax(1) == labels).double().mean() * 100)


def evaluate(network: str, seeds: int, curves: list[str] | None = None) -> dict[str, Any]:
    """All points of one network."""
    model, _ = load(network)
    split = load_split()
    with torch.no_grad():
        reference = test_accuracy(model, split.test_images, split.test_labels)
    rows = []
    for curve, label, method, coding, target in candidates():
        if curves and curve not in curves:
            continue
        accuracies, bits, start = [], [], time.perf_counter()
        for seed in range(seeds):
            images, labels = calibration_subset(split, 256, seed)
            prepared = prepare_stored(model, method, images[:2])
            with torch.no_grad():
                prepared(images)
            if target is not None:
                pairs = zip(images.split(64), labels.split(64), strict=True)
                allocate_bits(prepared, pairs, target)
            with torch.no_grad():
                stored = convert_stored(prepared, coding)
                accuracies.append(test_accuracy(stored, split.test_images, split.test_labels))
                bits.append(storage_report(stored, split.test_images).bits_per_activation)
        half = T_95.get(seeds, 2.0) * statistics.stdev(accuracies) / math.sqrt(seeds) if seeds > 1 else 0.0
        row = {
            "network": network,
            "curve": curve,
            "label": label,
            "accuracy_percent": statistics.mean(accuracies),
            "accuracy_interval_95": half,
            "stored_bits": statistics.mean(bits),
            "seconds": time.perf_counter() - start,
        }
        rows.append(row)
    return {"network": network, "accuracy_percent_fp32": reference, "points": rows, "needed": needed(rows, reference)}


def needed(rows: list[dict[str, Any]], reference: float) -> dict[str, float | None]:
    """Fewest stored bits of each curve within POINTS of FP32; None where no point is."""
    found: dict[str, float | None] = {}
    for row in rows:
        found.setdefault(row["curve"], None)
        best = found[row["curve"]]
        if row["accuracy_percent"] >= reference - POINTS and (best is None or row["stored_bits"] < best):
            found[row["curve"]] = row["stored_bits"]
    return found


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """One panel per network."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(6 * len(results), 4.2), squeeze=False)
    for axis, result in zip(axes[0], results, strict=True):
        for curve in dict.fromkeys(row["curve"] for row in result["points"]):
            rows = sorted((r for r in result["points"] if r["curve"] == curve), key=lambda r: r["stored_bits"])
            axis.errorbar(
                [r["stored_bits"] for r in rows],
                [r["accuracy_percent"] for r in rows],
                [r["accuracy_interval_95"] for r in rows],
                marker="o",
                markersize=3,
                capsize=2,
                label=curve,
            )
        reference = result["accuracy_percent_fp32"]
        axis.axhline(reference, color="black", linewidth=0.8)
        axis.axhline(reference - POINTS, color="black", linewidth=0.8, linestyle=":")
        axis.set_ylim(max(reference - 15, 0), reference + 1)
        axis.set_xlim(0.5, 7)
        axis.set_xlabel("stored bits per activation, tables included")
        axis.set_ylabel("test accuracy, %")
        axis.set_title(f"{result['network']} (digits)")
        axis.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--networks", nargs="+", default=["resnet32", "mobilenetv2"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--curves", nargs="+", help="only these methods")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--plot", type=Path, help="write the plot here")
    arguments = parser.parse_args()
    results = [evaluate(network, arguments.seeds, arguments.curves) for network in arguments.networks]
    for result in results:
        print(f"{result['network']}: FP32 {result['accuracy_percent_fp32']:.2f}%")
        for row in result["points"]:
            print(
                f"  {row['curve']:12s} {row['label']:11s} {row['stored_bits']:6.3f} bits  "
                f"{row['accuracy_percent']:6.2f} +- {row['accuracy_interval_95']:.2f} %"
            )
        print("  stored bits needed:", {k: None if v is None else round(v, 2) for k, v in result["needed"].items()})
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
