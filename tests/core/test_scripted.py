"""Frozen static quantizers in torch.jit.script and torch.fx.symbolic_trace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dqa_plugins import DQA, ActivationQuantizer, DenseSparse, Direct, Method, NoisyQuant
from dqa_plugins.errors import UnsupportedCombination

METHODS = (
    Direct(bits=4),
    Direct(bits=5, symmetric=False),
    Direct(bits=3, granularity="channel"),
    DQA(bits=3),
    NoisyQuant(bits=4, amplitude=0.4),
    DenseSparse(bits=4, density=0.1),
)


def frozen(method: Method, axis: int = 1) -> ActivationQuantizer:
    quantizer = ActivationQuantizer(method, name="site", producer_axis=axis)
    torch.manual_seed(0)
    quantizer(torch.randn(8, 6, 6, 6))
    return quantizer.freeze()


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("axis", [1, -1])
def test_scripted_quantizers_give_the_same_values(method: Method, axis: int) -> None:
    quantizer = frozen(method, axis)
    scripted = torch.jit.script(quantizer)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        for shape in ((3, 6), (3, 6, 6), (2, 6, 5, 6)):
            x = (3 * torch.randn(shape)).to(dtype)
            x.view(-1)[0] = torch.finfo(dtype).max
            found, expected = scripted(x), quantizer(x)
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)
    if not quantizer.uses_channels:
        assert torch.equal(scripted(x.flatten()), quantizer(x.flatten()))


def test_models_are_scripted_as_copies() -> None:
    model = nn.Sequential(nn.Linear(6, 6), frozen(DQA(bits=3), -1))
    x = torch.randn(4, 6)
    assert torch.equal(torch.jit.script(copy.deepcopy(model))(x), model(x))
    assert isinstance(model[1], ActivationQuantizer)


def test_what_cannot_be_scripted_is_refused() -> None:
    with pytest.raises(UnsupportedCombination, match=r"torch\.jit\.script .* qparams='dynamic'"):
        torch.jit.script(frozen(Direct(qparams="dynamic")))
    with pytest.raises(UnsupportedCombination, match="state 'observe'"):
        torch.jit.script(ActivationQuantizer(Direct()))


def test_a_traced_quantizer_is_a_call_of_the_module() -> None:
    model = nn.Sequential(nn.Linear(6, 6), frozen(DQA(bits=3), -1))
    traced = torch.fx.symbolic_trace(model)
    assert [str(node.target) for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1"]
    assert traced.get_submodule("1") is model[1]
