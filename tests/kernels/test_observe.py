"""Ends and order statistics against torch's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dqa_plugins.kernels import eager
from dqa_plugins.ranges import grouped, quantiles
from tests.kernels.plain import plain
from tests.kernels.test_fake_quantize import tensors


@given(tensors(), st.data())
def test_ends_of_samples_and_channels(x: Tensor, data: st.DataObject) -> None:
    if not x.numel() or x.ndim < 2:
        return
    axis = data.draw(st.none() | st.integers(1, x.ndim - 1))
    found = eager.extremes(x, axis)
    assert found.finite == bool(x.isfinite().all())
    assert found.nan == bool(x.isnan().any())
    if not found.nan:
        rows = grouped(x, "tensor" if axis is None else "channel", axis or 1)
        assert torch.equal(found.low, rows.amin(-1))
        assert torch.equal(found.high, rows.amax(-1))


def distributions() -> dict[str, Tensor]:
    """Rows of 30,000 values that are hard for a sample: ties, two values, periods, sorted, one outlier, constants."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(2, 30_000, generator=generator)
    return {
        "normal": normal,
        "relu": normal.relu(),
        "two values": (normal > 1.5).float(),
        "mostly ties": torch.where(normal.abs() < 1.2, 0.5, normal),
        "three ties": normal.sign() * (normal.abs() > 0.9),
        "images": (normal * 20).round() / 20,
        "sorted": normal.sort().values,
        "period": (torch.arange(60_000).reshape(2, -1) % 117).float(),
        "outlier": torch.cat([torch.full((2, 29_999), -1.0), torch.full((2, 1), 1e30)], 1),
        "constant": torch.full((2, 30_000), -2.0),
        "infinite": torch.where(normal > 2, torch.inf, normal),
        "small": normal * 1e-42,
    }


@pytest.mark.parametrize("name", distributions())
@pytest.mark.parametrize("magnitude", [False, True])
def test_order_statistics_of_hard_rows(name: str, magnitude: bool) -> None:
    rows = distributions()[name]
    expected = (rows.abs() if magnitude else rows).sort().values
    last = rows.shape[1] - 1
    ranks = (0, 1, last // 100, last // 5, last // 2, 4 * last // 5, last - last // 100, last - 2, last - 0.5, last)
    levels = [(rank + share) / last for rank in ranks for share in (0, 0.25)]
    found = eager.order_statistics(rows, tuple(("magnitude" if magnitude else "upper", level) for level in levels))
    assert found is not None
    for i, level in enumerate(levels):
        place = min(level, 1) * last
        value, following = expected[:, int(place)], expected[:, min(int(place) + 1, last)]
        assert torch.allclose(found[:, i], value + (following - value) * (place - int(place)), 0, 0, True), level


@given(size=st.integers(1, 3000), values=st.integers(1, 50), seed=st.integers(0, 99), level=st.floats(0, 1))
def test_quantiles_are_those_of_the_plain_path(size: int, values: int, seed: int, level: float) -> None:
    x = torch.randint(-values, values, (3, size), generator=torch.Generator().manual_seed(seed)) / 7
    assert torch.equal(quantiles(x, (level,))[0], plain(lambda: quantiles(x, (level,)))[0])


def test_more_values_than_torch_quantile_takes() -> None:
    x = torch.arange(2**24 + 2**20, dtype=torch.int32).flip(0).float().unsqueeze(0)
    position = 0.999 * (x.shape[1] - 1)
    assert abs(float(quantiles(x, (0.999,))[0]) - position) <= 2  # float32 has even numbers only there
