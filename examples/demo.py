"""The demo: ResNet-32 on handwritten digits, quantized by every method through plain prepare_fx / convert_fx.

    python -m examples.demo                # a table in the terminal, out/demo/demo.png, out/demo/demo.json

Every layer but the first and the last is quantized, weights to 8 bits, no retraining. One network per method and bit
width is exported to ONNX, run in ONNX Runtime and compared with torch on all 797 test digits.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from tqdm import tqdm

from dqa_plugins import DQA, DenseSparse, Direct, Method, NoisyQuant
from dqa_plugins.adapters.fx import get_qconfig_mapping
from dqa_plugins.export import onnxruntime_session, to_onnx
from dqa_plugins.report import activation_report
from examples.benchmarks.machine import machine
from examples.networks import load
from examples.networks.digits import calibration_subset, load_split
from examples.quiet import quiet_hosts
from examples.reproductions.common import code_version
from examples.reproductions.style import style

BITS = (2, 3, 4)
CALIBRATION = 256  # training images


EXPORTED = ("Direct", "NoisyQuant", "DQA", "Dense+Sparse")


def variants(bits: int) -> dict[str, Method]:
    """The settings compared at one bit width. "signed" is the DQA paper's range; the others choose at calibration."""
    return {
        "Direct, signed": Direct(bits=bits, signed=True),
        "NoisyQuant, signed": NoisyQuant(bits=bits, signed=True),
        "DQA, signed": DQA(bits=bits, signed=True),
        "Direct": Direct(bits=bits),
        "NoisyQuant": NoisyQuant(bits=bits),
        "DQA": DQA(bits=bits),
        "Dense+Sparse": DenseSparse(bits=bits),
        "Direct, per channel": Direct(bits=bits, granularity="channel"),
        "DQA, per channel": DQA(bits=bits, granularity="channel"),
    }


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """(797, 10): the outputs on all images, in batches."""
    return torch.cat([model(batch) for batch in images.split(128)])


def quantize(model: nn.Module, method: Method, calibration: Tensor) -> nn.Module:
    """What a user of torch.ao writes; only the QConfigMapping is ours."""
    mapping = get_qconfig_mapping(method, skip=("first", "last"))
    prepared = prepare_fx(model, mapping, (calibration[:2],))
    logits(prepared, calibration)
    return convert_fx(prepared)


def noise_found(model: nn.Module) -> str | None:
    """How many NoisyQuant sites found a noise that helps."""
    sites = [m for m in model.modules() if hasattr(m, "noise") and isinstance(m.method, NoisyQuant)]
    return f"{sum(bool(site.noise.any()) for site in sites)} of {len(sites)}" if sites else None


def measure(name: str, bits: int) -> dict[str, Any]:
    """One row of the table. Runs in a process of its own, on one thread."""
    torch.set_num_threads(1)
    quiet_hosts()
    split = load_split()
    model = load("resnet32")[0]
    expected = logits(model, split.test_images)
    calibration, _ = calibration_subset(split, CALIBRATION)
    quantized = quantize(model, variants(bits)[name], calibration)
    output = logits(quantized, split.test_images)
    top1 = output.argmax(1)
    row = {
        "method": name,
        "bits": bits,
        "bits_per_activation": activation_report(quantized, [split.test_images[:128]]).bits_per_activation,
        "accuracy": 100 * float((top1 == split.test_labels).double().mean()),
        "agreement_fp32": 100 * float((top1 == expected.argmax(1)).double().mean()),
        "sites_with_noise": noise_found(quantized),
    }
    if name in EXPORTED:
        with tempfile.TemporaryDirectory() as folder:
            run = onnxruntime_session(to_onnx(quantized, split.test_images[:2], f"{folder}/model.onnx"), threads=1)
        ort = torch.cat([run(batch)[0] for batch in split.test_images.split(128)])
        row["ort_same_top1"] = 100 * float((ort.argmax(1) == top1).double().mean())
        row["ort_median_difference"] = float((ort - output).abs().amax(1).median())
        row["ort_max_difference"] = float((ort - output).abs().max())
    return row


def show(rows: list[dict[str, Any]], fp32: float) -> None:
    """The table in the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"ResNet-32 on scikit-learn digits, 797 test images; FP32 accuracy {fp32:.2f}%")
    for column in ("bits", "method", "accuracy %", "agrees with FP32 %", "bits / activation"):
        table.add_column(column, justify="left" if column == "method" else "right")
    table.add_column("ONNX Runtime: same top-1 %", justify="right")
    table.add_column("logit difference, median / max", justify="right")
    previous = None
    for row in rows:
        if previous not in (None, row["bits"]):
            table.add_section()
        previous = row["bits"]
        exported = "ort_same_top1" in row
        table.add_row(
            str(row["bits"]),
            row["method"],
            f"{row['accuracy']:.2f}",
            f"{row['agreement_fp32']:.2f}",
            f"{row['bits_per_activation']:.2f}",
            f"{row['ort_same_top1']:.2f}" if exported else "",
            f"{row['ort_median_difference']:.1e} / {row['ort_max_difference']:.1e}" if exported else "",
        )
    Console(width=130).print(table)


def plot(rows: list[dict[str, Any]], fp32: float, path: Path) -> None:
    """Accuracy against bits per activation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for name in dict.fromkeys(row["method"] for row in rows):
        points = sorted((r["bits_per_activation"], r["accuracy"]) for r in rows if r["method"] == name)
        for axes in panels:
            axes.plot(*zip(*points, strict=True), label=name, **style(name))
    for axes, ends in zip(panels, ((0, 102), (90, 100)), strict=True):
        axes.axhline(fp32, color="grey", linewidth=1, label="FP32")
        axes.set(xlabel="bits per activation, side information included", ylabel="test accuracy, %", ylim=ends)
        axes.grid(alpha=0.3)
    panels[1].set_title("above 90%")
    figure.suptitle("ResNet-32 on digits: activations of all layers but the first and last quantized, weights 8 bits")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the PNG and the JSON")
    parser.add_argument("--bits", type=int, nargs="+", default=list(BITS))
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes, one thread each")
    parser.add_argument("--no-progress", action="store_true")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    quiet_hosts()
    started = time.perf_counter()
    split = load_split()
    top1 = logits(load("resnet32")[0], split.test_images).argmax(1)
    fp32 = 100 * float((top1 == split.test_labels).double().mean())
    jobs = [(name, bits) for bits in options.bits for name in variants(bits)]
    jobs.sort(key=lambda job: job[0] not in EXPORTED)  # the long ones first
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(measure, *job) for job in jobs]
        done = as_completed(futures)
        rows = [f.result() for f in tqdm(done, total=len(jobs), unit="network", disable=options.no_progress)]
    order = {(name, bits): k for k, (name, bits) in enumerate((n, b) for b in options.bits for n in variants(b))}
    rows.sort(key=lambda row: order[row["method"], row["bits"]])
    show(rows, fp32)
    plot(rows, fp32, options.out / "demo.png")
    report = {"network": "resnet32", "fp32_accuracy": fp32, "seconds": time.perf_counter() - started, "rows": rows}
    report |= {"code": code_version(), "seeds": [0], "machine": {**machine(), "threads": 1}}
    (options.out / "demo.json").write_text(json.dumps(report, indent=1))
    for row in rows:
        if row["sites_with_noise"] and row["method"] == "NoisyQuant":
            print(f"NoisyQuant, {row['bits']} bits: a noise that lowers the error at {row['sites_with_noise']} sites.")
    print(f"{options.out / 'demo.png'}, {options.out / 'demo.json'}; {report['seconds']:.0f} s")


if __name__ == "__main__":
    main()
