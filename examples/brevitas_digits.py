"""Brevitas: substitute the activations of a trained ResNet-32, calibrate, train for one epoch, export to QCDQ ONNX.

    python -m examples.brevitas_digits

Real digits, offline, within a minute on two cores. At two bits per activation calibration alone is not enough.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnxruntime
import torch
from brevitas.export import export_onnx_qcdq
from brevitas.graph.calibrate import calibration_mode
from torch import nn

from dqa_plugins import DQA, Direct
from dqa_plugins.adapters.brevitas import substitute_layers
from examples.networks import load
from examples.networks.digits import calibration_subset, load_split
from examples.networks.scores import accuracy
from examples.quiet import quiet_hosts


def main() -> None:
    quiet_hosts()
    onnxruntime.set_default_logger_severity(3)
    torch.manual_seed(0)
    split = load_split()
    model, _ = load("resnet32")
    print(f"float: {accuracy(model, split.test_images, split.test_labels):.1f} %")

    substitute_layers(model, {nn.ReLU: DQA(bits=2), "relu1": Direct(bits=8)})
    with torch.no_grad(), calibration_mode(model):
        for batch in calibration_subset(split, 256)[0].split(64):
            model(batch)
    print(f"DQA, 2 bits: {accuracy(model.eval(), split.test_images, split.test_labels):.1f} %")

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    for chosen in torch.randperm(len(split.train_images)).split(50):
        loss = nn.functional.cross_entropy(model(split.train_images[chosen]), split.train_labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"after one epoch: {accuracy(model.eval(), split.test_images, split.test_labels):.1f} %")

    with tempfile.TemporaryDirectory() as folder:
        path, images = str(Path(folder) / "digits.onnx"), split.test_images[:64]
        export_onnx_qcdq(model, images, path, dynamo=False)
        session = onnxruntime.InferenceSession(path)
        guess = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0].argmax(1)
    print(f"QCDQ ONNX: same answer on {int((torch.from_numpy(guess) == model(images).argmax(1)).sum())} of 64 images")


if __name__ == "__main__":
    main()
