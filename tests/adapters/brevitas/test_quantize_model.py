"""quantize_model: Brevitas' own layers where the judge says (the contract is tests/adapters/test_conformance.py)."""

from __future__ import annotations

import brevitas.nn as qnn
import pytest
import torch
from torch import Tensor, nn

from dqa_plugins import DQA, QPP, Direct, NoisyQuant, iter_quantizers
from dqa_plugins.adapters.brevitas import quantize_model
from dqa_plugins.errors import InvalidArgument, UnsupportedCombination, UnsupportedInput
from dqa_plugins.export import to_exported_program
from tests.adapters.brevitas.nets import data, float_net

X = data(2, 3, 10, 10)


def test_layers_of_brevitas() -> None:
    """An activation module that is called once becomes Brevitas' layer; other tensors get a QuantIdentity."""
    model = quantize_model(float_net(), DQA(bits=6), X, weight_bits=4)
    assert type(model.act) is type(model.block.relu1) is qnn.QuantReLU
    assert type(model.stem) is qnn.QuantConv2d
    assert type(model.fc) is qnn.QuantLinear
    assert type(model.quant_input_0) is type(model.quant_block_bn2) is qnn.QuantIdentity
    weight = model.block.conv1.quant_weight().value
    assert all(len(channel.unique()) <= 2**4 for channel in weight)
    assert len(weight.unique()) > 2**4, "a scale per channel"


@pytest.mark.parametrize("bits", [1, 9, 4.5, True, "8"])
def test_weight_bits_that_cannot_be(bits: object) -> None:
    with pytest.raises(InvalidArgument, match="weight_bits"):
        quantize_model(float_net(), DQA(), X, weight_bits=bits)  # type: ignore[arg-type]


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.sum() > 0 else x


def test_a_model_that_cannot_be_traced_names_the_way_out() -> None:
    with pytest.raises(UnsupportedInput, match=r"cannot trace Branching.*substitute_layers"):
        quantize_model(Branching().eval(), DQA(), [torch.randn(2, 4)])


def test_the_objective_of_the_next_layer_is_refused() -> None:
    with pytest.raises(UnsupportedCombination, match="objective='output'"):
        quantize_model(float_net(), {"act": NoisyQuant(objective="output")}, X)


def test_predictions_of_a_traced_model_are_exported() -> None:
    """torch.export runs a GraphModule without its forward hooks, in which the predictions begin."""
    model = quantize_model(float_net(), DQA(qparams=QPP(sites=("input",))), data(4, 3, 10, 10))
    assert isinstance(model, torch.fx.GraphModule)
    with torch.no_grad():
        assert torch.equal(to_exported_program(model, X[0]).module()(X[0]), model(X[0]))


class Shared(nn.Module):
    """One ReLU behind two layers, an addition of both. (B, 3, H, W) -> (B, 4, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.relu = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.b(self.relu(self.a(x))))


def test_a_module_called_twice_has_a_quantizer_for_each_call() -> None:
    model = quantize_model(Shared().eval(), DQA(), X)
    assert [name for name, _ in iter_quantizers(model)] == ["input.0", "relu", "relu.1"]
    assert type(model.relu) is nn.ReLU


def test_a_mapping_chooses_weights_too() -> None:
    model = quantize_model(float_net(), {"": Direct(bits=8), "block": None}, X)
    assert type(model.block.conv1) is nn.Conv2d
    assert type(model.stem) is qnn.QuantConv2d
    names = [name for name, _ in iter_quantizers(model)]
    assert [name for name in names if name.startswith("block.")] == ["block.relu2"], "which the pool reads quantized"
