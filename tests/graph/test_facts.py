"""Facts about networks: names, axes, constants, norms, aliases, readers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace
from torch.nn import functional as F

from dqa_plugins.errors import DuplicateSites
from dqa_plugins.graph.aliases import written_later
from dqa_plugins.graph.axes import channel_axes
from dqa_plugins.graph.constants import CONSTANT, INTEGER, MASK, masked_logits, no_activations, norm_internals
from dqa_plugins.graph.names import SiteNames, require_unique
from dqa_plugins.graph.operations import OPERATIONS, Operation, Value, canonical, facts
from dqa_plugins.graph.readers import geometry, next_linear, weight_rows

from .nets import axis_behind, described, network


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("Conv2d", "conv2d"),
        ("conv2d", "conv2d"),
        ("ConvBnReLU2d", "conv2d"),
        ("ConvAddReLU2d", "conv2d"),
        ("LinearReLU", "linear"),
        ("BNReLU2d", "batchnorm2d"),
        ("iadd", "add"),
        ("__radd__", "add"),
        ("add_", "add"),
        ("truediv", "div"),
        ("true_divide", "div"),
        ("itruediv", "div"),
        ("AdaptiveAvgPool2d", "adaptiveavgpool2d"),
        ("leaky_relu_", "leakyrelu"),
        ("round", "round"),
        ("index_put_", "indexput"),
    ],
)
def test_an_operation_has_one_name_however_it_is_spelled(spelling: str, name: str) -> None:
    assert canonical(spelling) == name


def test_the_table_holds_its_own_names_only() -> None:
    """A name that no spelling leads to would never be found."""
    assert [name for name in OPERATIONS if canonical(name) != name and canonical(name) not in OPERATIONS] == []
    assert facts("frobnicate").kind == "other"


def test_names_are_given_once_whatever_modules_are_called() -> None:
    """A Sequential called `add` and the functional addition, a module `relu.1` and the second call of `relu`."""
    names = SiteNames(("add.0", "relu", "relu.1"))
    given = [
        names.operation("", "add"),
        names.module("add.0"),
        names.module("relu"),
        names.module("relu"),
        names.module("relu.1"),
        names.operation("", "iadd"),
    ]
    assert given == ["add.1", "add.0", "relu", "relu.2", "relu.1", "add.2"]


def test_names_that_are_given_twice_are_refused() -> None:
    require_unique(["a", "b"])
    with pytest.raises(DuplicateSites, match="'a'"):
        require_unique(["a", "b", "a"])


def axes(operations: list[Any]) -> dict[str, tuple[int, bool]]:
    """{site: (axis, told)}."""
    found = channel_axes(operations, no_activations(operations))
    return {op.value_name(value): (found[value].axis, found[value].told) for op in operations for value in op.outputs}


def of(model: nn.Module, *shape: int) -> dict[str, tuple[int, bool]]:
    return axes(described(model.eval(), (torch.randn(*shape),)))


def test_a_linear_layer_behind_the_input_says_that_channels_are_last() -> None:
    found = of(nn.Sequential(nn.Identity(), nn.GELU(), nn.Linear(6, 4)), 2, 5, 6)
    assert found["input.0"] == found["1"] == found["2"] == (-1, True)
    assert of(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), 2, 3, 8, 8)["input.0"] == (1, True)


def test_where_nothing_tells_it_is_said() -> None:
    assert of(nn.GELU(), 2, 5, 6)["input.0"] == (1, False)
    scores = axes(network("language"))
    assert scores["attention.softmax.0"] == (1, False)  # heads: the last axis holds tokens
    assert scores["attention.matmul.1"] == (-1, True)


@pytest.mark.parametrize("act", [nn.LeakyReLU(), nn.ELU(), nn.PReLU(), nn.GELU(), nn.Hardswish(), nn.Softplus()])
def test_activations_hand_the_axis_on(act: nn.Module) -> None:
    assert of(nn.Sequential(nn.Linear(6, 6), act), 2, 5, 6)["1"] == (-1, True)


class Moves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.pos = nn.Conv2d(3, 5, 1), nn.Linear(5, 7), nn.Parameter(torch.zeros(1, 16, 5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).permute(0, 2, 3, 1)
        t = self.pos + self.conv(x).flatten(2).transpose(1, 2)
        return self.fc(t)[:, 0].unsqueeze(1) + F.gelu(self.fc(y)).transpose(1, 3).mean((2, 3)).unsqueeze(1)


def test_axes_follow_transposes_views_and_reductions() -> None:
    found = of(Moves(), 2, 3, 4, 4)
    assert found["conv"] == (1, True)
    assert found["permute.0"] == (-1, True)
    assert found["flatten.0"] == (1, True)
    assert found["add.0"] == (-1, True), "the parameter does not count"
    assert found["transpose.1"] == (1, True)
    assert found["mean.0"] == (1, True)
    assert found["fc"] == (-1, True)


@pytest.mark.parametrize("producer", ["Linear", "layer_norm", "Embedding", "matmul", "LSTM"])
def test_the_default_axis_behind_layers(producer: str) -> None:
    assert axis_behind(producer) == -1
    assert axis_behind("Conv2d") == 1


def test_parameters_positions_and_masks_are_no_activations() -> None:
    operations = network("language")
    names = {value: op.value_name(value) for op in operations for value in op.outputs}
    found = {names[value]: reason for value, reason in no_activations(operations).items()}
    assert found["learned"] == found["positions"] == CONSTANT
    assert found["input.0"] == INTEGER
    assert found["sub.0"] == MASK
    assert not {"tokens", "mul.0", "norm1.mul.1", "lstm", "head"} & found.keys()


def test_the_inside_of_norms_is_found_and_their_results_are_not_in_it() -> None:
    operations = network("language")
    found = {op.site for op in norm_internals(operations, no_activations(operations))}
    inside = "norm1.pow.0 norm1.mean.0 norm1.add.0 norm1.rsqrt.0 norm1.mul.0 norm2.sub.0 norm2.mul.0 norm2.div.0"
    assert set(inside.split()) <= found
    assert not found & {"norm1.mul.1", "norm2.add.1", "mul.0", "add.0", "add.1"}


def test_additions_in_front_of_a_softmax_are_logits() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return torch.softmax((x * 2 + mask).view(2, 3) + 1 + x, -1) + x

    operations = described(Masked(), (torch.randn(2, 3), torch.randn(2, 3)))
    assert [op.site for op in operations if op in masked_logits(operations)] == ["add.0", "add.1", "add.2"]


def test_a_squeeze_and_a_plain_mean_are_no_norm() -> None:
    assert not norm_internals(network("vision"), {})


def test_writes_that_a_copy_would_lose() -> None:
    operations = network("in_place")
    names = {value: op.value_name(value) for op in operations for value in op.outputs}
    assert {names[value] for value in written_later(operations)} == {"first", "getitem.0"}


def test_the_next_linear_layer_and_its_geometry() -> None:
    """Through a dropout; of modules and of aten operators alike."""
    conv = nn.Conv2d(3, 4, (1, 3), 2, dilation=(1, 2))
    net = nn.Sequential(nn.ReLU(), nn.Dropout(), conv, nn.ReLU()).eval()
    x = torch.randn(2, 3, 4, 6)
    for graph in (symbolic_trace(net), torch.export.export(net, (x,)).module()):
        assert isinstance(graph, GraphModule)
        relu = next(n for n in graph.graph.nodes if "relu" in str(n.target) or str(n.target) == "0")
        layer = next_linear(relu.users, graph)
        assert layer is not None
        assert geometry(layer, graph) == ((1, 3), (1, 2), (2, 2))
        assert torch.equal(weight_rows(layer, graph), conv.weight.flatten(1))
        assert next_linear(layer.users, graph) is None


@pytest.mark.parametrize("turned", [False, True])
def test_the_last_axis_of_any_operand_counts(turned: bool) -> None:
    """A sum of what a convolution and what a Linear made: the last axis, whichever comes first."""
    image, tokens, made, mapped, both = (Value(k, (2, 6, 6)) for k in range(5))
    operations = [
        Operation("", "input", "input.0", outputs=(image,), site="input.0"),
        Operation("", "input", "input.1", outputs=(tokens,), site="input.1"),
        Operation("Conv1d", "module", "conv", inputs=(image,), outputs=(made,), site="conv"),
        Operation("Linear", "module", "fc", inputs=(tokens,), outputs=(mapped,), site="fc"),
        Operation(
            "add", "function", "", inputs=(mapped, made) if turned else (made, mapped), outputs=(both,), site="add.0"
        ),
    ]
    axes = channel_axes(operations)
    assert [axes[v].axis for v in (made, mapped, both)] == [1, -1, -1]
