"""torch.ao FX: mix methods and bit widths in one network, see what each activation costs, export.

    python -m examples.fx_digits

Real digits, offline, under a minute.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from dqa_plugins import DQA, DenseSparse, Direct, iter_quantizers
from dqa_plugins.adapters.fx import get_qconfig, get_qconfig_mapping
from dqa_plugins.export import onnxruntime_session, to_onnx
from dqa_plugins.report import activation_report
from examples.networks import load
from examples.networks.digits import calibration_subset, load_split
from examples.networks.scores import accuracy
from examples.quiet import quiet_hosts


def main() -> None:
    quiet_hosts()
    model, _ = load("resnet32")
    split = load_split()
    calibration, _ = calibration_subset(split, 256)

    mapping = get_qconfig_mapping(DQA(bits=3, granularity="channel"), skip=("first", "last"))
    mapping.set_module_name("blocks.0.conv1", get_qconfig(DenseSparse(bits=3)))  # outliers stay in float
    mapping.set_module_name("blocks.14.relu2", get_qconfig(Direct(bits=8)))  # the name of a fused ReLU works too

    prepared = prepare_fx(model, mapping, (calibration[:2],))
    with torch.no_grad():
        for batch in calibration.split(64):
            prepared(batch)
    quantized = convert_fx(prepared)

    for name, quantizer in list(iter_quantizers(quantized))[:4]:
        print(f"{name}: {type(quantizer.method).__name__}, {'signed' if quantizer.signed else 'unsigned'}")
    report = activation_report(quantized, [split.test_images[:128]])
    print(report)
    print(f"float {accuracy(model, split.test_images, split.test_labels):.2f} %")
    print(f"quantized {accuracy(quantized, split.test_images, split.test_labels):.2f} %")

    with tempfile.TemporaryDirectory() as folder:
        run = onnxruntime_session(to_onnx(quantized, calibration[:2], Path(folder) / "digits.onnx"))
        images = split.test_images[:128]
        with torch.no_grad():
            same = run(images)[0].argmax(1) == quantized(images).argmax(1)
    print(f"ONNX Runtime: same answer on {int(same.sum())} of {len(images)} images")


if __name__ == "__main__":
    main()
