"""Features against numpy, and independence of the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dqa_plugins import DenseSparse
from dqa_plugins.qpp.features import Summary, channel_features, outside, site_features
from dqa_plugins.qpp.record import SampleRecord
from dqa_plugins.ranges import statistic


def test_the_papers_features() -> None:
    x = torch.randn(3, 4, 6, 5)
    found = site_features(x, "paper")
    flat = x.flatten(1).double().numpy()
    for column, level in enumerate((0.9, 0.99, 0.999)):
        np.testing.assert_allclose(found[:, column], np.quantile(flat, level, axis=1), rtol=1e-5)
    np.testing.assert_allclose(found[:, 3], flat.mean(1), rtol=1e-6)
    np.testing.assert_allclose(found[:, 4], flat.max(1))


@given(shape=st.lists(st.integers(1, 7), min_size=1, max_size=4), half=st.booleans())
@pytest.mark.parametrize("mode", ["paper", "extended"])
def test_a_sample_does_not_depend_on_its_batch(mode: str, shape: list[int], half: bool) -> None:
    x = torch.randn(5, *shape).to(torch.float16 if half else torch.float32)
    together = site_features(x, mode)
    alone = torch.cat([site_features(row[None], mode) for row in x])
    assert torch.isfinite(together).all()
    assert torch.equal(together.float(), alone.float())


def test_logarithms_of_nothing_are_finite() -> None:
    x = torch.zeros(2, 3, 4, 4)
    assert torch.isfinite(site_features(x, "extended")).all()
    assert torch.isfinite(Summary(1)(x, torch.zeros(2, 1, 1))).all()


def test_exposure_moves_the_logarithms_alone() -> None:
    """Twice the exposure adds log 2 to each logarithm; what is relative stays."""
    x = torch.rand(4, 1, 16, 16) + 0.1
    change = site_features(2 * x, "extended") - site_features(x, "extended")
    torch.testing.assert_close(change[:, :5], torch.full((4, 5), np.log(2), dtype=torch.float64))
    torch.testing.assert_close(change[:, 13:], torch.zeros(4, 7, dtype=torch.float64), atol=1e-6, rtol=0)


def test_many_channels_are_averaged_in_groups() -> None:
    x = torch.rand(2, 130, 3, 3)
    found = channel_features(x, 1)
    assert found.shape == (2, 128)
    means = x.double().mean((2, 3))
    groups = np.arange(130) * 64 // 130
    grouped = np.stack([means[:, groups == g].mean(1) for g in range(64)], 1)
    expected = np.log(grouped + 1e-3 * grouped.mean(1, keepdims=True))
    np.testing.assert_allclose(found[:, :64], expected, rtol=1e-9)


def test_outside_counts_strictly() -> None:
    x = torch.tensor([[-2.0, -1.0, 0.0, 1.0, 2.0]])
    assert outside(x, torch.tensor([[[1.0], [1.0]]]), 1).tolist() == [2.0]
    assert outside(x, torch.tensor([[[1.5]]]), 1).tolist() == [2.0]


@pytest.mark.parametrize("signed", [True, False])
def test_shares_between_tail_points_are_close_to_the_counts(signed: bool) -> None:
    """Replaying another prediction from the record, against counting in the tensor itself."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 8, 20, 20, generator=generator) * torch.linspace(0.5, 2, 6).reshape(-1, 1, 1, 1)
    x = x if signed else x.relu()
    method = DenseSparse(signed=signed)
    record = SampleRecord()
    values = statistic(x, method, 1)
    record.observe(x, torch.arange(6), torch.zeros(6, 5, dtype=torch.float64), values, "tensor", 1, 1)
    for factor in (0.8, 1.0, 1.2):
        wanted = outside(x, values * factor, 1) / x[0].numel()
        torch.testing.assert_close(record.share_beyond(values * factor), wanted, rtol=0.15, atol=3e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_before_it_is_squared(dtype: torch.dtype) -> None:
    x = (torch.rand(3, 4, 6, 5, generator=torch.Generator().manual_seed(0)) * 60_000).to(dtype)
    assert torch.equal(channel_features(x, 1), channel_features(x.float(), 1))
    assert torch.isfinite(channel_features(x, 1)).all()


@pytest.mark.parametrize("scale", [1e20, 1e38])
def test_features_of_values_whose_squares_overflow_are_finite(scale: float) -> None:
    x = (torch.rand(3, 4, 6, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1) * scale
    assert torch.isfinite(site_features(x, "extended")).all()
    assert torch.isfinite(Summary(1)(x, torch.full((3, 2, 1), scale))).all()
