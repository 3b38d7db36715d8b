"""Quantizer and layer together against float64, over shapes, geometries, signs and engines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from dqa_plugins.errors import UnsupportedCombination
from dqa_plugins.grid import Grid
from dqa_plugins.runtime import engine, set_engine
from dqa_plugins.runtime.layers import Int8Conv2d, Int8Linear
from dqa_plugins.runtime.quantizer import Int8Quantizer


@pytest.fixture(autouse=True)
def _engine() -> Iterator[None]:
    yield
    set_engine(None)


def weight(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randint(-127, 128, shape, dtype=torch.int8), torch.rand(shape[0]) / 100 + 1e-4, torch.randn(shape[0])


def grid(x: Tensor, density: float, signed: bool, bits: int = 8) -> Grid:
    """Dense+Sparse with a share outside."""
    flat = x.flatten()
    upper = torch.quantile(flat, 1 - density / (2 if signed else 1))
    lower = torch.quantile(flat, density / 2) if signed else torch.zeros(())
    return Grid.affine(lower.reshape([1] * x.ndim), upper.reshape([1] * x.ndim), bits, keep=True)


def check(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max() + 1e-30))


@st.composite
def geometries(draw: Any) -> dict[str, Any]:
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    kernel = [draw(st.integers(1, 4)), draw(st.integers(1, 4))]
    dilation = [draw(st.integers(1, 3)), draw(st.integers(1, 3))]
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    padding = [draw(st.integers(0, 2)), draw(st.integers(0, 2))]
    size = [max(1, r - 2 * p) + draw(st.integers(0, 6)) for r, p in zip(reach, padding, strict=True)]
    return {
        "batch": draw(st.integers(1, 3)),
        "channels": groups * draw(st.integers(1, 9)),
        "outputs": groups * draw(st.sampled_from([1, 3, 16, 21, 64, 83])),
        "kernel": kernel,
        "size": size,
        "geometry": ([draw(st.integers(1, 3)), draw(st.integers(1, 3))], padding, dilation, groups),
    }


@settings(max_examples=40, deadline=None)
@given(geometries(), st.floats(0, 0.1), st.booleans(), st.sampled_from(["onednn", "float"]), st.integers(0, 999))
def test_convolutions_of_any_geometry(
    shape: dict[str, Any], density: float, signed: bool, kind: str, seed: int
) -> None:
    """Grouped, strided, dilated, depthwise, 1x1, uneven: dense part and outliers together."""
    torch.manual_seed(seed)
    x = torch.randn(shape["batch"], shape["channels"], *shape["size"])
    x = x if signed else x.relu()
    groups = shape["geometry"][-1]
    codes, scale, bias = weight(shape["outputs"], shape["channels"] // groups, *shape["kernel"])
    layer = Int8Conv2d(codes, scale, bias, "conv", *shape["geometry"])
    made = grid(x, density, signed)
    set_engine(kind)
    found = layer(Int8Quantizer("site", made, channels_last=True)(x))
    whole = codes.double() * scale.double().reshape(-1, 1, 1, 1)
    check(found, F.conv2d(made.fake_quantize(x).double(), whole, bias.double(), *shape["geometry"]))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=0, max_size=2),
    st.integers(1, 70),
    st.integers(1, 70),
    st.booleans(),
    st.sampled_from(["onednn", "float"]),
)
def test_linears_of_any_rank(inner: list[int], channels: int, outputs: int, signed: bool, kind: str) -> None:
    torch.manual_seed(channels)
    x = torch.randn(3, *inner, channels)
    x = x if signed else x.relu()
    codes, scale, bias = weight(outputs, channels)
    made = grid(x, 0.05, signed)
    set_engine(kind)
    found = Int8Linear(codes, scale, bias, "linear")(Int8Quantizer("site", made, channels_last=False)(x))
    whole = codes.double() * scale.double().unsqueeze(1)
    check(found, F.linear(made.fake_quantize(x).double(), whole, bias.double()))


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("bits", [2, 8])
def test_the_sum_and_the_values_of_the_pass(relu: bool, bits: int) -> None:
    """One pass gives the bytes and what readers in float get, outliers in place."""
    torch.manual_seed(0)
    x, other = torch.randn(2, 5, 9, 7), torch.randn(2, 5, 9, 7)
    total = (x + other).relu() if relu else x + other
    made = grid(total, 0.1, not relu, bits)
    quantizer = Int8Quantizer("site", made, channels_last=True, added=True, relu=relu, values=True)
    q = quantizer(x, other)
    assert q.values is not None
    assert q.codes is not None
    torch.testing.assert_close(q.values, made.fake_quantize(total), rtol=1e-6, atol=1e-6)
    assert q.outliers is not None
    assert len(q.outliers.positions) == int(made.outside(total).sum())  # type: ignore[union-attr]
    expected = (made.codes(total) - made.codes(total).clamp(0, 2**bits - 1)).abs().max()
    assert expected == 0
    inside = ~made.outside(total)  # type: ignore[operator]
    assert torch.equal(q.codes[inside].int(), made.codes(total)[inside])


def test_dqa_codes_share_a_grid() -> None:
    """Channels of delta / 2^m: bytes are multiples of 2^(M - m)."""
    x = torch.randn(2, 4, 6, 6)
    step = torch.tensor([1 / 8, 1 / 16, 1 / 8, 1 / 64]).reshape(1, 4, 1, 1)
    high = torch.tensor([7.0, 15.0, 7.0, 63.0]).reshape(1, 4, 1, 1)
    made = Grid(step, -high - 1, high)
    q = Int8Quantizer("site", made, channels_last=True, values=True)(x)
    assert q.codes is not None
    assert torch.equal((q.codes.float() - float(q.zeros[0])) * q.scales[0], made.fake_quantize(x))
    assert torch.equal(q.values, made.fake_quantize(x))  # type: ignore[arg-type]


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(UnsupportedCombination, match="engines are"):
        set_engine("cuda")
    assert engine() in ("onednn", "float")


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("channels", [False, True])
def test_bytes_of_a_convolution_are_those_of_the_quantizer_behind(relu: bool, channels: bool) -> None:
    """Weights of negative and zero scales, too: batch norms are folded into them."""
    torch.manual_seed(0)
    codes, scale, bias = weight(6, 8, 3, 3)
    scale[:2] = torch.tensor([-0.002, 0.0])
    layer = Int8Conv2d(codes, scale, bias, "conv", [1, 1], [1, 1], [1, 1], 1)
    step = torch.full((1, 6, 1, 1), 0.2)
    low = high = torch.ones(1, 6, 1, 1)
    if channels:  # DQA: four bits, some three more
        step, low, high = step * torch.tensor([1, 0.125] * 3).reshape(1, 6, 1, 1), -8 * low, 7 * high
        low, high = (v * torch.tensor([1.0, 8.0] * 3).reshape(1, 6, 1, 1) for v in (low, high))
    coarse = Grid(step, low, high) if channels else Grid(torch.tensor(0.2), -128, 127)
    behind = Int8Quantizer("behind", coarse, channels_last=True, relu=relu, values=True)
    front = Int8Quantizer("front", Grid(torch.tensor(0.1), 0, 255), channels_last=True)
    with torch.no_grad():
        q = front(torch.rand(2, 8, 9, 9) * 20)
        expected = behind(layer(q))
        layer.then = behind
        found = layer(q)
    assert layer._to_bytes(q, behind) is not None
    assert (found.codes != expected.codes).float().mean() <= 0.01  # at ties
    same = found.codes == expected.codes
    assert torch.equal(found.values[same], expected.values[same])
    assert (found.scales, found.zeros) == (expected.scales, expected.zeros)
