"""Accuracy against stored bits: what it costs in memory to keep the shortcuts of a network within half a point.

    python -m examples.reproductions.stored_bits --out out/reproductions [--quick] [--network resnet32]

For every method and bit width: calibrate (the run draws the subset), convert, run the test inputs through the stored
model and count `nbytes` of every packed tensor, all side information and the tables (once) in. Only stored activations
are quantized; weights and all else stay float. ResNet-32 and MobileNetV2: test accuracy on digits, 256 calibration
images. EfficientNet-Lite0: top-1 agreement with FP32 on photo crops, in place of ImageNet. The networks and data are
stand-ins: nothing here replicates a paper's number.

Methods:
    direct          Direct as in the DQA paper: signed, one scale per tensor, fixed-length codes
    rival           Direct, unsigned where no value is negative, one scale per channel, fixed-length codes
    rival_joint     the same with the entropy coder of this package: the one to beat
    dqa_paper       DQA in the paper's layout: n bits fixed, shift errors Huffman coded
    dqa_joint       the same values, whole codes entropy coded
    allocated       allocate_bits: a per-channel step chosen by the gradient of the loss, whole codes entropy coded

With --network the results of other networks that <out>/stored_bits.json holds are kept.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dqa_plugins import DQA, Direct
from dqa_plugins.methods import Method
from dqa_plugins.storage import PackedActivation, allocate_bits, convert_stored, prepare_stored
from dqa_plugins.storage.model.sites import Pack
from examples.networks import load
from examples.reproductions.common import Options, axes, mean_std, parse, run_jobs, save, show, write

NETWORKS = ("resnet32", "mobilenetv2", "efficientnet_lite0")
CURVES = ("direct", "rival", "rival_joint", "dqa_paper", "dqa_joint", "allocated")
BITS = {"efficientnet_lite0": (4, 5, 6, 7, 8)}  # the others: 2 to 6
TARGETS = {"efficientnet_lite0": (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5)}
SMALL_BITS, SMALL_TARGETS = (2, 3, 4, 5, 6), (0.8, 1.0, 1.2, 1.35, 1.5, 1.75, 2.2)
POINTS = 0.5  # the goal: within this many points of FP32
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
_STYLES = {  # colours as in `style`: by method, the light ones with one scale per channel
    "direct": ("Direct, signed, per tensor", "tab:blue", "o", ":"),
    "rival": ("Direct, unsigned, per channel", "deepskyblue", "^", ":"),
    "rival_joint": ("the same, entropy coded", "deepskyblue", "^", "-"),
    "dqa_paper": ("DQA, the paper's layout", "tab:green", "s", ":"),
    "dqa_joint": ("the same values, entropy coded", "tab:green", "s", "-"),
    "allocated": ("allocated steps, entropy coded", "tab:pink", "D", "-"),
}


@dataclass(frozen=True)
class Task:
    """A network with its data, as one run sees them."""

    model: nn.Module
    metric: str
    calibration: Tensor
    labels: Tensor
    test: Tensor
    answers: Tensor

    @property
    def batch(self) -> int:
        """Samples of one pass: what keeps the memory of the larger network in bounds."""
        return 1024 if self.test.shape[-1] < 64 else 28


def task(network: str, run: int, quick: bool) -> Task:
    """Load a network, and draw the calibration data of a run."""
    model, _ = load(network)
    if network == "efficientnet_lite0":
        from examples.networks.efficientnet_lite import normalize
        from examples.networks.photos import photo_crops

        test = normalize(photo_crops(4 if quick else 8, seed=1000))
        calibration = normalize(photo_crops(4, seed=run))
        with torch.no_grad():
            labels, answers = model(calibration).argmax(1), model(test).argmax(1)
        return Task(model, "top-1 agreement with FP32", calibration, labels, test, answers)
    from examples.networks.digits import calibration_subset, load_split

    split = load_split()
    images, labels = calibration_subset(split, 256, run)
    return Task(model, "test accuracy", images, labels, split.test_images, split.test_labels)


def score(model: nn.Module, data: Task) -> tuple[float, float]:
    """(percent right, stored bits per activation, tables included) over the test inputs."""
    held = {"bytes": 0, "elements": 0}

    def note(_: nn.Module, __: Any, packed: Any) -> None:
        if isinstance(packed, PackedActivation):
            held["bytes"] += packed.nbytes
            held["elements"] += packed.numel

    packers = [m for m in model.modules() if isinstance(m, Pack)]
    handles = [m.register_forward_hook(note) for m in packers]
    with torch.no_grad():
        outputs = torch.cat([model(x) for x in data.test.split(data.batch)])
    for handle in handles:
        handle.remove()
    tables = sum(len(m.get_extra_state()) for m in packers)
    right = float((outputs.argmax(1) == data.answers).double().mean() * 100)
    return right, 8 * (held["bytes"] + tables) / max(held["elements"], 1)


def settings(network: str) -> list[tuple[Method, float | None, dict[str, str]]]:
    """(method, target bits, {curve: coding}) of every calibration."""
    found: list[tuple[Method, float | None, dict[str, str]]] = []
    for bits in BITS.get(network, SMALL_BITS):
        paper = DQA(bits=bits, extra_bits=min(3, bits), ratio=0.4, signed=True)
        rival = Direct(bits=bits, granularity="channel")
        found += [
            (Direct(bits=bits, signed=True), None, {"direct": "none"}),
            (rival, None, {"rival": "none", "rival_joint": "joint"}),
            (paper, None, {"dqa_paper": "shift_error", "dqa_joint": "joint"}),
        ]
    targets = TARGETS.get(network, SMALL_TARGETS)
    return found + [(DQA(bits=4, granularity="channel"), t, {"allocated": "joint"}) for t in targets]


def evaluate(network: str, run: int, quick: bool) -> dict[str, Any]:
    """All points of one network for one run: {"fp32": percent, "points": {curve: {label: (percent, bits)}}}."""
    data = task(network, run, quick)
    points: dict[str, dict[str, tuple[float, float]]] = {curve: {} for curve in CURVES}
    for method, target, codings in settings(network):
        prepared = prepare_stored(data.model, method, data.calibration[:2])
        with torch.no_grad():
            for x in data.calibration.split(data.batch):
                prepared(x)
        if target is not None:
            size = min(64, data.batch)
            pairs = zip(data.calibration.split(size), data.labels.split(size), strict=True)
            allocate_bits(prepared, pairs, target)
        for curve, coding in codings.items():
            label = f"n={method.bits}" if target is None else f"target {target}"
            points[curve][label] = score(convert_stored(prepared, coding), data)
    return {"metric": data.metric, "fp32": score(data.model, data)[0], "points": points}


def summarize(network: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over runs with a 95% interval of the mean (Student's t), and the bits that each curve needs."""
    rows = []
    for curve in CURVES:
        for label in runs[0]["points"][curve]:
            percents, bits = zip(*(r["points"][curve][label] for r in runs), strict=True)
            found = mean_std(percents)
            half = T_95.get(len(runs), 2.0) * found.std / math.sqrt(len(runs)) if len(runs) > 1 else None
            rows.append(
                {
                    "curve": curve,
                    "label": label,
                    "percent": found.mean,
                    "interval_95": half,
                    "stored_bits": mean_std(bits).mean,
                    "percent_by_run": list(percents),
                    "stored_bits_by_run": list(bits),
                }
            )
    reference = runs[0]["fp32"]
    return {
        "network": network,
        "metric": runs[0]["metric"],
        "percent_fp32": reference,
        "runs": len(runs),
        "needed_bits": needed(rows, reference),
        "points": rows,
    }


def needed(rows: list[dict[str, Any]], reference: float) -> dict[str, float | None]:
    """Fewest stored bits of each curve whose mean is within POINTS of FP32; None where no point is."""
    found: dict[str, float | None] = dict.fromkeys(CURVES)
    for row in rows:
        best = found[row["curve"]]
        if row["percent"] >= reference - POINTS and (best is None or row["stored_bits"] < best):
            found[row["curve"]] = row["stored_bits"]
    return found


def draw(results: list[dict[str, Any]], options: Options) -> None:
    """One panel per network."""
    figure, panels = axes(len(results), width=5.8, height=4.8)
    for axis, result in zip(panels, results, strict=True):
        reference = result["percent_fp32"]
        for curve in CURVES:
            rows = sorted((r for r in result["points"] if r["curve"] == curve), key=lambda r: r["stored_bits"])
            name, color, marker, line = _STYLES[curve]
            axis.errorbar(
                [r["stored_bits"] for r in rows],
                [r["percent"] for r in rows],
                [r["interval_95"] or 0.0 for r in rows],
                color=color, marker=marker, linestyle=line, markersize=4, capsize=2, linewidth=1.3, label=name,
            )  # fmt: skip
        axis.axhline(reference, color="black", linewidth=0.8, label="FP32")
        axis.axhline(reference - POINTS, color="black", linewidth=0.8, linestyle="--", label=f"FP32 - {POINTS}")
        lowest = reference - (8 if result["metric"] == "test accuracy" else 30)
        axis.set_ylim(lowest, reference + 0.1 * (reference - lowest))
        axis.set_xscale("log", base=2)
        axis.set_xlim(*((0.7, 8.0) if result["metric"] == "test accuracy" else (1.4, 10.0)))
        ticks = [t for t in (0.75, 1, 1.5, 2, 3, 4, 6, 8) if axis.get_xlim()[0] <= t]
        axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axis.set_xlabel("stored bits per activation")
        axis.set_ylabel(f"{result['metric']}, %")
        data = "photo crops" if result["network"] == "efficientnet_lite0" else "digits"
        title = {"resnet32": "ResNet-32", "mobilenetv2": "MobileNetV2"}.get(result["network"], "EfficientNet-Lite0")
        axis.set_title(f"{title} on {data}\n{result['runs']} calibrations")
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=4)
    save(figure, options, "stored_bits")


def table(result: dict[str, Any]) -> None:
    """Print one network."""
    rows: list[Sequence[Any] | None] = []
    for curve in CURVES:
        for row in (r for r in result["points"] if r["curve"] == curve):
            half = "" if row["interval_95"] is None else f"± {row['interval_95']:.2f}"
            rows.append((curve, row["label"], f"{row['stored_bits']:.3f}", f"{row['percent']:.2f}", half))
        best = result["needed_bits"][curve]
        rows.append((curve, f"within {POINTS}", "-" if best is None else f"{best:.2f}", "", ""))
        rows.append(None)
    title = f"{result['network']}: {result['metric']} %, FP32 {result['percent_fp32']:.2f}, {result['runs']} runs"
    show(title, ("curve", "setting", "stored bits", "%", "95%"), rows, text=2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print, draw and write."""
    started = time.perf_counter()
    options = parse(__doc__, arguments, runs=(5, 2), networks=NETWORKS)
    if options.data is not None:
        raise SystemExit("stored_bits runs on stand-ins only: --data is not read")
    path = options.out / "stored_bits.json"
    kept = json.loads(path.read_text())["networks"] if options.network and path.is_file() else []
    networks = (options.network,) if options.network else NETWORKS
    jobs = [(network, run, options.quick) for network in networks for run in range(options.runs)]
    found = run_jobs(evaluate, jobs, options, "run")
    results = {r["network"]: r for r in kept}
    for k, network in enumerate(networks):
        results[network] = summarize(network, found[k * options.runs : (k + 1) * options.runs])
    ordered = [results[network] for network in NETWORKS if network in results]
    for result in ordered:
        table(result)
    draw(ordered, options)
    write(options, "stored_bits", {"goal_points": POINTS, "networks": ordered}, started)


if __name__ == "__main__":
    main()
