"""What goes wrong in FX says which layer, which value, and what to do."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from dqa_plugins import DQA, DenseSparse, Direct, NoisyQuant
from dqa_plugins.adapters.fx import get_qconfig, get_qconfig_mapping, hooks
from dqa_plugins.errors import (
    FrameworkMismatch,
    InvalidArgument,
    NonFiniteInput,
    NotAMethod,
    UncalibratedQuantizer,
    UnsupportedCombination,
)
from tests.nets import build, inputs


@pytest.mark.parametrize(
    "method", [DQA(), Direct(qparams="dynamic"), NoisyQuant(amplitude=0.5), DenseSparse()], ids=str
)
def test_converting_without_calibration_raises_and_names_the_layer(method: Any) -> None:
    prepared = prepare_fx(build("residual"), get_qconfig_mapping(method), inputs("residual"))
    with pytest.raises(UncalibratedQuantizer, match=r"'input\.0' \(.*\) was frozen or converted without"):
        convert_fx(prepared)


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "1 NaN"), (float("inf"), "1 Inf")])
def test_bad_values_in_calibration_data_name_the_layer(value: float, word: str) -> None:
    prepared = prepare_fx(build("residual"), get_qconfig_mapping(DQA()), inputs("residual"))
    (x,) = inputs("residual")
    x[1, 0, 0, 0] = value
    with pytest.raises(NonFiniteInput, match=f"'input.0'.*{word}"):
        prepared(x)


def test_an_inner_layer_that_overflows_is_named() -> None:
    net = build("residual")
    with torch.no_grad():
        net.conv2.weight.fill_(float("inf"))
    prepared = prepare_fx(net, get_qconfig_mapping(DQA()), inputs("residual"))
    with pytest.raises(NonFiniteInput, match="'bn2'"):
        prepared(*inputs("residual"))


@pytest.mark.parametrize("wrong", ["dqa", DQA, 4, None, object()])
def test_something_that_is_no_method(wrong: Any) -> None:
    with pytest.raises(NotAMethod):
        get_qconfig(wrong)


def test_a_qconfig_is_no_method() -> None:
    with pytest.raises(NotAMethod, match="takes a method"):
        get_qconfig_mapping(get_qconfig(DQA()))  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [1, 9, 2.5, "8", True])
def test_weight_bits_out_of_range(bits: Any) -> None:
    with pytest.raises(InvalidArgument, match="weight_bits"):
        get_qconfig_mapping(DQA(), weight_bits=bits)


def test_an_unknown_weight_scheme() -> None:
    with pytest.raises(InvalidArgument, match="weight_scheme='tensor'"):
        get_qconfig_mapping(DQA(), weight_scheme="tensor")


def test_skip_of_a_layer_that_does_not_exist() -> None:
    with pytest.raises(InvalidArgument, match="'conv9'"):
        prepare_fx(build("residual"), get_qconfig_mapping(DQA(), skip=("conv9",)), inputs("residual"))
    with pytest.raises(InvalidArgument, match="tuple"):
        get_qconfig_mapping(DQA(), skip="first")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.ao.quantization.fx.convert", "_replace_observer_with_quantize_dequantize_node"),
        ("torch.ao.quantization.quantize_fx", "prepare"),
        ("torch.ao.quantization.quantize_fx", "_fuse_fx"),
    ],
)
def test_a_hook_that_torch_lacks(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(importlib.import_module(module), name)
    with pytest.raises(FrameworkMismatch, match=rf"{name} is gone in torch"):
        hooks.install()


def test_a_hook_with_other_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    quantize_fx = importlib.import_module("torch.ao.quantization.quantize_fx")
    monkeypatch.setattr(quantize_fx, "prepare", lambda model, example_inputs: None)
    with pytest.raises(FrameworkMismatch, match="prepare takes"):
        hooks.install()


def test_installing_twice_wraps_once() -> None:
    quantize_fx = importlib.import_module("torch.ao.quantization.quantize_fx")
    before = quantize_fx.prepare
    hooks.install()
    assert quantize_fx.prepare is before


def test_without_the_hook_fx_is_stopped_instead_of_placing_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    convert = importlib.import_module("torch.ao.quantization.fx.convert")
    name = "_replace_observer_with_quantize_dequantize_node"
    monkeypatch.setattr(convert, name, getattr(convert, name).__wrapped__)
    prepared = prepare_fx(build("residual"), get_qconfig_mapping(DQA()), inputs("residual"))
    prepared(*inputs("residual"))
    with pytest.raises(FrameworkMismatch, match="asked for int8 qparams"):
        convert_fx(prepared)


@pytest.mark.parametrize("method", [DQA(bits=3), DenseSparse(), Direct(granularity="channel")], ids=str)
def test_dead_inputs_give_zeros_not_nan(method: Any) -> None:
    prepared = prepare_fx(build("residual"), get_qconfig_mapping(method), inputs("residual"))
    (x,) = inputs("residual")
    prepared(torch.zeros_like(x))
    converted = convert_fx(prepared)
    with torch.no_grad():
        assert torch.isfinite(converted(torch.zeros_like(x))).all()


def test_more_than_99_percent_zeros() -> None:
    prepared = prepare_fx(build("residual"), get_qconfig_mapping(DenseSparse(bits=3)), inputs("residual"))
    (x,) = inputs("residual")
    x = x * (torch.arange(x.numel()).reshape(x.shape) % 500 == 0)
    prepared(x)
    with torch.no_grad():
        assert torch.isfinite(convert_fx(prepared)(x)).all()


class WritesThroughAView(torch.nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.how = torch.nn.Conv2d(3, 3, 1), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        y = x * 1.5
        if self.how == "dropped":
            y.view(y.shape[0], 3, -1).add_(1.0)
        else:
            y = y.view(y.shape[0], 3, 16).add_(1.0).view(y.shape[0], 3, 4, 4)
        return y + x


def test_a_write_through_a_view_that_torch_fx_drops_is_refused() -> None:
    """Dead code for torch.fx, so that stock FX drops it too; a write that it keeps is quantized as it is."""
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    fine = get_qconfig_mapping(DQA(bits=8, extra_bits=8, ratio=1.0), weight_bits=None)
    with pytest.raises(UnsupportedCombination, match=r"'add\.0' \(add_\) writes in place through a view.*PT2E"):
        prepare_fx(WritesThroughAView("dropped").eval(), fine, (x,))
    model = WritesThroughAView("read").eval()
    with torch.no_grad():
        prepared = prepare_fx(model, fine, (x,))
        prepared(x)
        torch.testing.assert_close(convert_fx(prepared)(x), model(x), rtol=0, atol=1e-2)
