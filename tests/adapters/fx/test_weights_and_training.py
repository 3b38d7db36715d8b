"""Weights in FX: schemes and widths; training: prepare_qat_fx, then convert, numerics equal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

from dqa_plugins import DQA, DenseSparse, Direct, NoisyQuant, iter_quantizers
from dqa_plugins.adapters.fx import get_qconfig_mapping, quantized_weights
from dqa_plugins.export import to_exported_program
from tests.nets import NETS, build, inputs


def converted(name: str = "residual", method: Any = None, **options: Any) -> nn.Module:
    prepared = prepare_fx(build(name), get_qconfig_mapping(method or DQA(), **options), inputs(name))
    prepared(*inputs(name))
    return convert_fx(prepared)


def linear_weight(**options: Any) -> tuple[np.ndarray, np.ndarray]:
    model = converted(**options)
    weights = quantized_weights(model)
    after = weights["fc.weight"].dequantize() if weights else model.fc.weight.detach()
    return build("residual").fc.weight.detach().numpy(), after.numpy()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_channel_weights_are_symmetric_per_output_channel(bits: int) -> None:
    before, after = linear_weight(weight_bits=bits)
    limit = 2 ** (bits - 1) - 1
    scale = np.abs(before).max(1, keepdims=True) / np.float32(limit)
    codes = np.rint(before / scale)
    assert np.abs(codes).max() <= limit
    np.testing.assert_allclose(after, codes * scale, rtol=1e-6, atol=1e-7)


def test_qpp_weights_follow_equation_16() -> None:
    before, after = linear_weight(weight_scheme="qpp")
    step = (before.max() - before.min()) / np.float32(255)
    codes = np.rint(before / step)
    edge = (before == before.max()) | (before == before.min())
    np.testing.assert_allclose(after[~edge], (codes * step)[~edge], rtol=1e-5, atol=1e-7)
    assert np.abs(after - before).max() <= step * 1.001


def test_no_weight_bits_leaves_weights_float() -> None:
    before, after = linear_weight(weight_bits=None)
    assert np.array_equal(before, after)
    assert len(list(iter_quantizers(converted(weight_bits=None)))) == len(list(iter_quantizers(converted())))


def test_transposed_convolutions_take_their_own_axis() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, 2)).eval()
    x = torch.randn(2, 3, 4, 4)
    prepared = prepare_fx(net, get_qconfig_mapping(DQA(bits=8)), (x,))
    prepared(x)
    weight = quantized_weights(convert_fx(prepared))["2.weight"].dequantize()
    scale = net[2].weight.abs().amax((0, 2, 3), keepdim=True) / 127
    torch.testing.assert_close(weight, (net[2].weight / scale).round() * scale)


@pytest.mark.parametrize("name", NETS)
def test_exporting_weights_changes_no_bit(name: str) -> None:
    model = converted(name)
    x = inputs(name, seed=6)
    with torch.no_grad():
        assert torch.equal(to_exported_program(model, inputs(name)).module()(*x), model(*x))


@pytest.mark.parametrize(
    "method",
    [DQA(bits=3), Direct(bits=3, clip="mse"), NoisyQuant(bits=4, amplitude=0.3), DenseSparse(bits=3), DQA.paper(2)],
    ids=str,
)
def test_train_then_convert_gives_equal_numbers(method: Any) -> None:
    torch.manual_seed(0)
    prepared = prepare_qat_fx(build("residual").train(), get_qconfig_mapping(method), inputs("residual"))
    assert {q.state for _, q in iter_quantizers(prepared)} == {"qat"}
    optimizer = torch.optim.SGD(prepared.parameters(), 0.02)
    target = torch.tensor([0, 1, 2, 3] * 4)
    losses = []
    for step in range(12):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(prepared(*inputs("residual", batch=16, seed=step % 3)), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert np.mean(losses[-3:]) < np.mean(losses[:3]), losses
    prepared.eval()
    x = inputs("residual", batch=5, seed=11)
    with torch.no_grad():
        expected = prepared(*x)
        assert torch.equal(prepared(*x), expected), "eval moved a statistic"
        model = convert_fx(prepared)
        torch.testing.assert_close(model(*x), expected, rtol=1e-5, atol=1e-5)
    assert {q.state for _, q in iter_quantizers(model)} == {"frozen"}


def test_the_noise_is_searched_on_the_output_of_the_next_layer() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        net[1].weight[:, 8:] = 0  # half of the channels do not reach the output
    x = torch.randn(64, 12)
    errors = {}
    for objective in ("activation", "output"):
        method = NoisyQuant(bits=3, objective=objective, mean=None)
        prepared = prepare_fx(net, get_qconfig_mapping(method, weight_bits=None), (x,))
        prepared(x)
        (site,) = [q for n, q in iter_quantizers(convert_fx(prepared)) if n == "0"]
        y = net[0](x)
        errors[objective] = float(((site(y) - y) @ net[1].weight.T).square().sum())
    assert errors["output"] < errors["activation"]


def test_official_noisyquant_runs_in_front_of_convolutions_too() -> None:
    model = converted(method=NoisyQuant.official(bits=4, clip_steps=20))
    sites = dict(iter_quantizers(model))
    assert sites["relu"].factor.numel() == 1
    assert sites["relu"].noise.shape == (8,)
    assert 0 < float(sites["relu"].factor) <= 1


def test_batch_norms_train_in_front_of_float_weights() -> None:
    """torch.ao's QAT modules construct the observer of a weight with factory_kwargs."""
    x = inputs("residual")[0]
    prepared = prepare_qat_fx(build("residual").train(), get_qconfig_mapping(Direct(bits=8), weight_bits=None), (x,))
    prepared(x).sum().backward()
    with torch.no_grad():
        found, expected = convert_fx(prepared.eval())(x), build("residual")(x)
    assert not torch.equal(found, expected)
    assert found.shape == expected.shape
