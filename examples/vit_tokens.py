"""Tokens: a small vision transformer on digits. Behind Linear and LayerNorm the channels are the last axis.

    python -m examples.vit_tokens

Real digits, offline, under a minute. Dense+Sparse keeps the outliers of the residual stream in float.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from dqa_plugins import DQA, DenseSparse, Direct, NoisyQuant
from dqa_plugins.adapters.fx import get_qconfig_mapping
from examples.networks import load
from examples.networks.digits import calibration_subset, load_split
from examples.networks.scores import accuracy
from examples.quiet import quiet_hosts


def main(bits: Sequence[int] = (6, 4, 3)) -> None:
    quiet_hosts()
    model, _ = load("vit")
    split = load_split()
    calibration, _ = calibration_subset(split, 256)
    print(f"float {accuracy(model, split.test_images, split.test_labels):.2f} %")
    for width in bits:
        for method in (Direct(bits=width), NoisyQuant(bits=width), DQA(bits=width), DenseSparse(bits=width)):
            prepared = prepare_fx(model, get_qconfig_mapping(method, skip=("first", "last")), (calibration[:2],))
            with torch.no_grad():
                for batch in calibration.split(64):
                    prepared(batch)
            quantized = convert_fx(prepared)
            score = accuracy(quantized, split.test_images, split.test_labels)
            print(f"{width} bits, {type(method).__name__}: {score:.2f} %")


if __name__ == "__main__":
    main()
