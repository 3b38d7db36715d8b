"""Site names and their order."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dqa_plugins import DQA, ActivationQuantizer, Direct, iter_quantizers
from dqa_plugins.graph.names import SiteNames
from tests.compare import calibrated
from tests.graph.nets import axis_behind


class OutOfOrder(nn.Module):
    """Registered as c, a, b; executed as a, b, c."""

    def __init__(self) -> None:
        super().__init__()
        self.c = ActivationQuantizer(Direct(), name="blocks.c")
        self.a = ActivationQuantizer(DQA(), name="blocks.a")
        self.b = ActivationQuantizer(Direct())
        self.unused = ActivationQuantizer(Direct(), name="never")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x)))


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in iter_quantizers(model)]


def test_quantizers_come_in_order_of_first_execution():
    """Unexecuted ones last; those placed by hand without a name are called by their path."""
    model = OutOfOrder()
    model(torch.randn(2, 4, 3, 3))
    assert names(model) == ["blocks.a", "b", "blocks.c", "never"]
    model(torch.randn(2, 4, 3, 3))
    assert names(model) == ["blocks.a", "b", "blocks.c", "never"]


def test_the_order_survives_freezing_copies_and_state_dicts():
    model = OutOfOrder()
    model(torch.randn(2, 4, 3, 3))
    for q in (model.a, model.b, model.c):
        q.freeze()
    assert names(model)[:3] == ["blocks.a", "b", "blocks.c"]
    assert names(copy.deepcopy(model)) == names(model)
    other = OutOfOrder()
    other.load_state_dict(model.state_dict())
    assert names(other) == names(model)


def test_a_shared_quantizer_comes_once():
    q = ActivationQuantizer(Direct(), name="shared")
    model = nn.ModuleList([q, nn.Sequential(q)])
    assert [(name, found) for name, found in iter_quantizers(model)] == [("shared", q)]


def test_a_model_without_quantizers_and_a_bare_quantizer():
    assert names(nn.Linear(2, 2)) == []
    q = calibrated(Direct(), [torch.randn(2, 3)])
    assert [(name, found) for name, found in iter_quantizers(q)] == [("site", q)]


@pytest.mark.parametrize(
    "producer", ["Linear", "LayerNorm", "Embedding", "linear", "layer_norm", "embedding", "matmul"]
)
def test_channels_are_last_behind_linear_layers(producer):
    assert axis_behind(producer) == -1


@pytest.mark.parametrize("producer", ["Conv2d", "ReLU", "add", "BatchNorm2d", "cat", ""])
def test_channels_are_axis_one_elsewhere(producer):
    assert axis_behind(producer) == 1


def test_operations_are_numbered_within_their_module():
    """`<enclosing module>.<op>.<k>`; in-place forms count as the operation itself."""
    sites = SiteNames()
    assert sites.operation("blocks.0", "add") == "blocks.0.add.0"
    assert sites.operation("blocks.0", "iadd") == "blocks.0.add.1"
    assert sites.operation("blocks.0", "add_") == "blocks.0.add.2"
    assert sites.operation("blocks.0", "cat") == "blocks.0.cat.0"
    assert sites.operation("blocks.1", "add") == "blocks.1.add.0"
    assert sites.operation("", "add") == "add.0"
    assert sites.operation("", "imul") == "mul.0"


def test_modules_keep_their_name_and_repeated_calls_get_a_number():
    sites = SiteNames()
    assert [sites.module("blocks.0.relu") for _ in range(3)] == ["blocks.0.relu", "blocks.0.relu.1", "blocks.0.relu.2"]
    assert sites.module("blocks.1.relu") == "blocks.1.relu"
