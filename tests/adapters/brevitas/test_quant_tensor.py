"""return_quant_tensor=True: valid IntQuantTensors where the method has an integer grid, a typed error elsewhere."""

from __future__ import annotations

from typing import Any

import brevitas.nn as qnn
import pytest
import torch
from brevitas.quant import Int32Bias
from brevitas.quant_tensor import IntQuantTensor
from torch import Tensor, nn

from dqa_plugins import DQA, DenseSparse, Direct, Method, NoisyQuant, iter_quantizers
from dqa_plugins.adapters.brevitas import DQAAct, get_act_quant, substitute_layers
from dqa_plugins.errors import UnsupportedCombination
from tests.adapters.brevitas.nets import calibrate, data, float_net

GRIDS = [
    (Direct(), 4),
    (Direct(bits=2, signed=True), 2),
    (Direct(bits=8), 8),
    (Direct(bits=3, clip="mse"), 3),
    (DQA(), 7),
    (DQA(bits=3, extra_bits=2, signed=True), 5),
    (DQA(bits=8, extra_bits=3), 11),  # at 16 bits the accumulator no longer fits float32, in stock layers too
    (DQA(bits=3, ratio=0.0), 3),
    (DQA(bits=4, extra_bits=0), 4),
]


class Residual(nn.Module):
    """x -> q(conv(q(x))) + q(x), all of them QuantTensors on one grid."""

    def __init__(self, method: Method, channels: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q = qnn.QuantIdentity(act_quant=get_act_quant(method), return_quant_tensor=True)
        self.conv = qnn.QuantConv2d(
            channels, channels, 3, padding=1, weight_bit_width=4, bias_quant=Int32Bias, return_quant_tensor=True
        )

    def forward(self, x: Tensor) -> Any:
        a = self.q(x)
        return self.q(self.conv(a)) + a


@pytest.mark.parametrize(("method", "bit_width"), GRIDS, ids=str)
def test_valid_through_convolution_and_residual_add(method: Method, bit_width: int) -> None:
    batches = data(3, 8, 6, 6)  # as many channels in as out: where per-channel metadata would go wrong in silence
    model = calibrate(Residual(method), batches)
    ((_, quantizer),) = iter_quantizers(model)
    x = batches[1] * 1.5
    a = model.q(x)
    assert isinstance(a, IntQuantTensor)
    assert a.is_valid
    assert torch.equal(a.value, quantizer(x))
    assert a.scale.shape == a.zero_point.shape == a.bit_width.shape == ()
    assert (int(a.bit_width), a.signed) == (bit_width, quantizer.signed)
    assert torch.equal(a.int(float_datatype=True) * a.scale, a.value), "the integers are the values"
    conv = model.conv(a).detach()
    assert conv.is_valid
    # the accumulator is the convolution of the integers, exactly
    weight = model.conv.quant_weight()
    integers = nn.functional.conv2d(a.value.double() / a.scale, weight.value.double() / weight.scale, padding=1).round()
    bias = conv.value.double() / conv.scale - integers
    assert float((bias - bias.round()).abs().max()) < 0.01
    out = model(x)
    assert isinstance(out, IntQuantTensor)
    assert out.is_valid
    assert torch.equal(out.scale, a.scale)
    assert int(out.bit_width) == bit_width + 1


def test_the_grid_of_dqa_is_delta_over_two_to_the_m() -> None:
    model = calibrate(Residual(DQA(bits=3, extra_bits=2)), data(3, 8, 6, 6))
    ((_, quantizer),) = iter_quantizers(model)
    proxy = model.q.act_quant
    assert float(proxy.scale()) == float(quantizer.scale) / 4
    assert (float(proxy.bit_width()), float(proxy.zero_point())) == (5.0, 0.0)
    values = model.q(data(3, 8, 6, 6)[0]).int()
    coarse = values[:, quantizer.extra_bits == 0]
    assert coarse.numel()
    assert bool((coarse % 4 == 0).all()), "unimportant channels use every fourth step"


def test_allocated_bits_have_a_common_grid_too() -> None:
    model = calibrate(Residual(DQA(bits=4)), data(3, 8, 6, 6))
    ((_, quantizer),) = iter_quantizers(model)
    quantizer.set_extra_bits(torch.tensor([-3, -2, -1, 0, 1, 2, 3, 4]))
    out = model.q(data(3, 8, 6, 6)[0])
    assert out.is_valid
    assert int(out.bit_width) == 8
    quantizer.set_extra_bits(torch.tensor([-3, -2, -1, -1, -2, -3, -1, -1]))
    out = model.q(data(3, 8, 6, 6)[0])
    assert out.is_valid
    assert int(out.bit_width) == 3


def test_a_zero_point_of_asymmetric_direct() -> None:
    x = [batch + 0.7 for batch in data(3, 8, 6, 6)]
    model = nn.Sequential(qnn.QuantIdentity(act_quant=get_act_quant(Direct(symmetric=False)), return_quant_tensor=True))
    out = calibrate(model, x)(x[0])
    assert out.is_valid
    assert not out.signed
    assert float(out.zero_point) > 0
    assert bool((out.int() >= 0).all())
    assert bool((out.int() <= 15).all())


def test_an_all_zero_site_is_valid() -> None:
    model = nn.Sequential(qnn.QuantReLU(act_quant=DQAAct, return_quant_tensor=True))
    out = calibrate(model, [-torch.ones(2, 8, 4)])(-torch.ones(2, 8, 4))
    assert out.is_valid
    assert not out.value.any()


WITHOUT = [
    (NoisyQuant(), "noise of each channel"),
    (DenseSparse(), "outliers in float"),
    (DQA(qparams="dynamic"), "one per sample"),
    (Direct(granularity="channel"), "scales of each channel"),
]


@pytest.mark.parametrize(("method", "reason"), WITHOUT, ids=lambda case: getattr(case, "name", ""))
def test_a_method_without_integer_grid_says_so(method: Method, reason: str) -> None:
    with pytest.raises(UnsupportedCombination, match=f"QuantReLU.*{reason}.*return_quant_tensor=False"):
        qnn.QuantReLU(act_quant=get_act_quant(method), return_quant_tensor=True)
    with pytest.raises(UnsupportedCombination, match=f"'act'.*{reason}"):
        substitute_layers(float_net(), {"act": method}, return_quant_tensor=True)
    model = calibrate(nn.Sequential(qnn.QuantReLU(act_quant=get_act_quant(method))), data(2, 8, 4, 4))
    assert type(model(torch.randn(2, 8, 4, 4))) is Tensor
    with pytest.raises(UnsupportedCombination, match=reason):
        model[0].act_quant.scale()
    model[0].return_quant_tensor = True  # turned on afterwards
    with pytest.raises(UnsupportedCombination, match=f"'0'.*{reason}"):
        model(torch.randn(2, 8, 4, 4))


def test_a_bias_that_needs_an_input_scale_is_refused_by_name() -> None:
    model = nn.Sequential(qnn.QuantConv2d(3, 8, 3, input_quant=get_act_quant(DenseSparse()), bias_quant=Int32Bias))
    with pytest.raises(UnsupportedCombination, match=r"'0.input_quant'.*outliers in float"):
        calibrate(model, data(2, 3, 8, 8))(torch.randn(2, 3, 8, 8))


def test_quant_tensors_go_in() -> None:
    """A QuantTensor from a stock quantizer is unwrapped, not requantized by its metadata."""
    stock = qnn.QuantIdentity(bit_width=8, return_quant_tensor=True)
    model = nn.Sequential(stock, qnn.QuantReLU(act_quant=get_act_quant(DenseSparse())))
    out = calibrate(model, data(2, 8, 4, 4))(torch.randn(2, 8, 4, 4))
    assert type(out) is Tensor
