"""Convolutions with what follows them: the same as PyTorch's, within rounding, on every shape they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dqa_plugins.kernels import lanes
from dqa_plugins.ranking import convolution as c

WINOGRAD = [
    {"in_channels": 16, "out_channels": 16, "padding": 1},
    {"in_channels": 16, "out_channels": 48, "padding": 1, "bias": False},
    {"in_channels": 32, "out_channels": 16, "padding": 0},
    {"in_channels": 16, "out_channels": 16, "padding": (2, 0)},
    {"in_channels": 16, "out_channels": 16, "padding": (5, 3)},
    {"in_channels": 96, "out_channels": 80, "padding": 1},
]
PACKED = [
    {"in_channels": 16, "out_channels": 16, "padding": 1, "stride": 2},
    {"in_channels": 16, "out_channels": 32, "padding": (0, 2), "stride": (1, 2), "bias": False},
    {"in_channels": 16, "out_channels": 16, "padding": 1, "groups": 16},
    {"in_channels": 16, "out_channels": 32, "padding": 1, "groups": 4},
    {"in_channels": 16, "out_channels": 16, "padding": 2, "dilation": 2},
    {"in_channels": 5, "out_channels": 7, "padding": 1},
]


def conv(settings: dict[str, Any], kernel: int = 3) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(**{"kernel_size": kernel, **settings}).requires_grad_(False)


def error(found: Tensor, exact: Tensor) -> float:
    """Largest error relative to the largest value."""
    assert found.shape == exact.shape
    return float((found.double() - exact).abs().max() / exact.abs().max())


@pytest.fixture(autouse=True)
def few_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["compiled products", "library"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to multiply; without AVX-512 the compiled one is slow, but right."""
    monkeypatch.setattr(lanes, "wide", lambda: request.param == "compiled products")


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("size", [(4, 4), (8, 8), (7, 5), (3, 17), (3, 3)])
@pytest.mark.parametrize("settings", WINOGRAD + PACKED)
def test_equals_the_sum_in_double_precision(settings: dict[str, Any], size: tuple[int, int]) -> None:
    layer = conv(settings)
    x = torch.randn(9, layer.in_channels, *size, generator=torch.Generator().manual_seed(1))
    exact = layer.double()(x.double())
    layer.float()
    run = c.convolution(layer)
    assert type(run) is (c.Winograd if settings in WINOGRAD else c.Packed)
    addend = torch.randn(exact.shape, generator=torch.Generator().manual_seed(2))
    before = addend.clone()
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        assert error(run(given, None, False), exact) < 4e-6
        assert error(run(given, None, True), exact.relu()) < 4e-6
        assert error(run(given, addend, False), exact + addend) < 4e-6
        assert error(run(given, addend, True), (exact + addend).relu()) < 4e-6
    assert torch.equal(addend, before)


@pytest.mark.parametrize("kernel", [1, 2, 5])
def test_other_kernels(kernel: int) -> None:
    layer = conv({"in_channels": 16, "out_channels": 16, "padding": kernel // 2}, kernel)
    x = torch.randn(3, 16, 6, 6)
    run = c.convolution(layer)
    assert type(run) is c.Packed
    assert error(run(x, None, False), layer.double()(x.double())) < 4e-6


@pytest.mark.usefixtures("products")
def test_tiles_in_several_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """One piece, many, and a last one that is smaller; then fewer images with the memory of more."""
    layer = conv(WINOGRAD[1])
    run = c.Winograd(layer)
    x = torch.randn(70, 16, 9, 6)
    for working_set in (1, 2**30):
        monkeypatch.setattr(c, "WORKING_SET", working_set)
        for count in (70, 1, 33):
            exact = layer.double()(x[:count].double()).relu()
            layer.float()
            assert error(run(x[:count], None, True), exact) < 4e-6


def test_nan_stays() -> None:
    x = torch.randn(1, 16, 4, 4)
    x[0, 3, 1, 1] = torch.nan
    assert c.Winograd(conv(WINOGRAD[0]))(x, None, True).isnan().any()


def test_what_cannot_be_computed_otherwise_is_refused() -> None:
    same = conv({"in_channels": 16, "out_channels": 16, "padding": "same"})
    circular = conv({"in_channels": 16, "out_channels": 16, "padding": 1, "padding_mode": "circular"})
    hooked = conv(WINOGRAD[0])
    hooked.register_forward_hook(lambda *_: None)

    class Other(nn.Conv2d):
        pass

    others = [same, circular, hooked, conv(WINOGRAD[0]).double(), Other(16, 16, 3), nn.Linear(3, 3), nn.Conv1d(3, 3, 3)]
    assert [c.convolution(module) for module in others] == [None] * len(others)


def test_without_numba_or_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: Any, layer: Any) -> None:
        raise ImportError("numba")

    monkeypatch.setattr(c.Winograd, "__init__", missing)
    assert type(c.convolution(conv(WINOGRAD[0]))) is c.Packed
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert c.convolution(conv(WINOGRAD[0])) is None


def test_many_threads_take_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    assert type(c.convolution(conv(WINOGRAD[0]))) is c.Packed
