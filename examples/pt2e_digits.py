"""torchao PT2E: three methods in one ResNet-32, calibrate, convert, save with torch.export, load and compare.

    python -m examples.pt2e_digits

Real digits, offline, half a minute on two cores. Weights in 8 bits, the first and last layer float.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from dqa_plugins import DQA, Direct, Method, NoisyQuant, iter_quantizers
from dqa_plugins.adapters.pt2e import PluginQuantizer
from examples.networks import load
from examples.networks.digits import calibration_subset, load_split
from examples.networks.scores import accuracy
from examples.quiet import quiet_hosts

BATCH = ({0: torch.export.Dim("batch", min=2, max=1024)},)


def quantize(method: Method) -> torch.fx.GraphModule:
    """ResNet-32 with a method everywhere, but NoisyQuant in the third group and 8 bits before the classifier."""
    calibration = calibration_subset(load_split(), 256)[0]
    model, _ = load("resnet32")
    exported = torch.export.export(model, (calibration[:64],), dynamic_shapes=BATCH).module()
    quantizer = PluginQuantizer(weight_bits=8, skip=("first", "last")).set_global(method)
    for index in range(10, 15):
        quantizer.set_module_name(f"blocks.{index}", NoisyQuant(bits=method.bits))
    quantizer.set_module_name("pool", Direct(bits=8))
    prepared = prepare_pt2e(exported, quantizer)
    with torch.no_grad():
        for batch in calibration.split(64):
            prepared(batch)
    return convert_pt2e(prepared)


def main() -> None:
    quiet_hosts()
    split = load_split()
    print(f"float: {accuracy(load('resnet32')[0], split.test_images, split.test_labels):.1f} %")
    for method in (Direct(bits=3), DQA(bits=3)):
        model = quantize(method)
        score = accuracy(model, split.test_images, split.test_labels)
        sites = len(list(iter_quantizers(model)))
        print(f"{type(method).__name__} and NoisyQuant, 3 bits, {sites} sites: {score:.1f} %")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path, images = Path(folder) / "digits.pt2", split.test_images[:64]
        torch.export.save(torch.export.export(model, (images,), dynamic_shapes=BATCH), path)
        same = torch.equal(torch.export.load(path).module()(split.test_images), model(split.test_images))
    print(f"the saved program gives {'the same' if same else 'other'} outputs for all {len(split.test_images)} images")


if __name__ == "__main__":
    main()
