"""NoisyQuant(objective="output") and its official setting: the next linear layer of an aten graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from dqa_plugins import NoisyQuant, iter_quantizers
from dqa_plugins.adapters.fx import get_qconfig_mapping
from dqa_plugins.adapters.pt2e import PluginQuantizer


class Layers(nn.Module):
    """A strided convolution with batch norm, a dilated one, a grouped one, two linear layers around a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(2, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2 = nn.Conv2d(4, 4, (1, 3), padding=(0, 2), dilation=2)
        self.conv3 = nn.Conv2d(4, 4, 1, groups=2)
        self.fc1, self.drop, self.fc2 = nn.Linear(4, 5), nn.Dropout(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.fc2(self.drop(self.fc1(self.conv3(self.conv2(x)).mean((2, 3)))))


def model() -> nn.Module:
    """In eval mode, the batch norm with statistics of its own."""
    torch.manual_seed(0)
    net = Layers().eval()
    net.bn1.running_mean.normal_(0, 0.2)
    net.bn1.running_var.uniform_(0.5, 1.5)
    return net


def batches(count: int = 2) -> list[Tensor]:
    """(3, 2, 8, 12) each."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 2, 8, 12, generator=generator) for _ in range(count)]


METHODS = {
    "output": NoisyQuant(bits=4, objective="output", signed=True),
    "official": NoisyQuant.official(bits=4, clip_steps=50),
    "dynamic": NoisyQuant(bits=4, objective="output", qparams="dynamic"),
    "channel": NoisyQuant(bits=4, objective="output", granularity="channel", amplitude=1.0),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_search_is_that_of_fx(method: Any) -> None:
    """The same rows, the same (batch norm folded) weight, the same noise and factor, the same output: exactly."""
    x = batches()[0]
    fx = prepare_fx(model(), get_qconfig_mapping(method, weight_bits=None), (x,))
    program = torch.export.export(model(), (x,)).module()
    pt2e = prepare_pt2e(program, PluginQuantizer(weight_bits=None).set_global(method))
    for batch in batches():
        fx(batch), pt2e(batch)
    theirs, ours = dict(iter_quantizers(fx)), dict(iter_quantizers(pt2e))
    assert {s: q.consumer_geometry for s, q in ours.items()} == {s: q.consumer_geometry for s, q in theirs.items()}
    assert ours["input.0"].consumer_geometry == ((3, 3), (1, 1), (2, 2))
    assert ours["relu1"].consumer_geometry == ((1, 3), (2, 2), (1, 1))
    assert ours["conv2"].consumer_missing  # a grouped convolution follows
    assert ours["conv3"].consumer_missing  # the mean, which shares this quantizer
    assert ours["fc1"].consumer_geometry == ()  # the second linear layer, through the dropout
    assert ours["fc2"].consumer_missing
    fx, pt2e = convert_fx(fx), convert_pt2e(pt2e)
    theirs = dict(iter_quantizers(fx))
    for site, quantizer in iter_quantizers(pt2e):
        assert torch.equal(quantizer.noise, theirs[site].noise), site
        assert torch.equal(quantizer.factor, theirs[site].factor), site
    with torch.no_grad():
        assert torch.equal(pt2e(x), fx(x))


def test_quantized_weights_are_searched_as_float_ones() -> None:
    """Weights are quantized in the same convert; the search uses the float weight, whatever is converted first."""
    noises = []
    for bits in (None, 3):
        program = torch.export.export(model(), (batches()[0],)).module()
        quantizer = PluginQuantizer(weight_bits=bits).set_global(METHODS["output"])
        prepared = prepare_pt2e(program, quantizer)
        for batch in batches():
            prepared(batch)
        noises.append({site: q.noise for site, q in iter_quantizers(convert_pt2e(prepared))})
    assert all(torch.equal(noises[0][site], noises[1][site]) for site in noises[0])


def test_objectives_differ() -> None:
    """The weight is really used: the activation's own error asks for another noise."""
    found = []
    for objective in ("activation", "output"):
        method = NoisyQuant(bits=3, objective=objective)
        prepared = prepare_pt2e(
            torch.export.export(model(), (batches()[0],)).module(), PluginQuantizer().set_global(method)
        )
        for batch in batches():
            prepared(batch)
        found.append(dict(iter_quantizers(convert_pt2e(prepared)))["fc1"].noise)
    assert not torch.equal(*found)
