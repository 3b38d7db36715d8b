"""What the ready-made mappings (`dqa_qconfig` and its like) should quantize: first and last layer, scale per channel?

    python -m examples.reproductions.default_settings

Every method at 4 bits, weights at 8, in torch.ao FX: on all layers or on all but the first and the last, with one scale
per tensor or per channel. Accuracy on the test part of the digits, of networks that ship with their weights.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from dqa_plugins import DQA, QPP, DenseSparse, Direct, NoisyQuant
from dqa_plugins.adapters.fx import get_qconfig_mapping
from dqa_plugins.report import activation_report
from examples.networks import load
from examples.networks.digits import calibration_subset, load_split
from examples.networks.scores import accuracy
from examples.reproductions.common import parse, run_jobs, show, write

NETWORKS = ("resnet32", "mobilenetv2", "vit")
METHODS = {
    "direct_qconfig": Direct(bits=4),
    "dqa_qconfig": DQA(bits=4),
    "noisyquant_qconfig": NoisyQuant(bits=4),
    "dense_sparse_qconfig": DenseSparse(bits=4),
    "qpp_qconfig": DenseSparse(bits=4, qparams=QPP()),
}
SKIPS: dict[str, tuple[str, ...]] = {"all layers": (), "all but first and last": ("first", "last")}


def cell(network: str, name: str, granularity: Any, skip: str, samples: int) -> dict[str, Any]:
    """One network, method and setting."""
    model, _ = load(network)
    split = load_split()
    calibration, _ = calibration_subset(split, samples)
    mapping = get_qconfig_mapping(METHODS[name].replace(granularity=granularity), skip=SKIPS[skip])
    prepared = prepare_fx(model, mapping, (calibration[:2],))
    with torch.no_grad():
        for batch in calibration.split(64):
            prepared(batch)
    quantized = convert_fx(prepared)
    bits = activation_report(quantized, [split.test_images[:128]]).bits_per_activation
    score = accuracy(quantized, split.test_images, split.test_labels)
    return {
        "network": network,
        "mapping": name,
        "granularity": granularity,
        "layers": skip,
        "accuracy_percent": score,
        "bits_per_activation": bits,
    }


def main(arguments: list[str] | None = None) -> None:
    started, chosen = time.perf_counter(), parse(__doc__, arguments, runs=(1, 1))
    settings = itertools.product(NETWORKS[:1] if chosen.quick else NETWORKS, METHODS, ("tensor", "channel"), SKIPS)
    jobs = [(*setting, 256) for setting in settings if setting[1:3] != ("qpp_qconfig", "channel")]
    cells = run_jobs(cell, jobs, chosen, unit="setting")
    write(chosen, "default_settings", {"cells": cells, "samples": 256, "bits": 4, "seed": 0}, started)
    for network in dict.fromkeys(found["network"] for found in cells):
        rows = [list(found.values())[1:] for found in cells if found["network"] == network]
        show(f"{network}, digits", ("mapping", "granularity", "layers", "accuracy %", "bits"), rows, text=3)


if __name__ == "__main__":
    main()
