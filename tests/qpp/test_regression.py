"""Least squares against numpy, ridge's leave-one-out against fits that really leave out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dqa_plugins.qpp.regression import least_squares, rank, ridge


def data(rows: int, columns: int, targets: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    weight = torch.randn(columns, targets, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, targets, generator=generator, dtype=torch.float64)
    return features + 2, (features + 2) @ weight + 0.1 * noise + 3


@given(rows=st.integers(10, 40), columns=st.integers(1, 6), targets=st.integers(1, 3), seed=st.integers(0, 99))
@pytest.mark.parametrize("intercept", [False, True])
def test_least_squares_is_numpys(intercept: bool, rows: int, columns: int, targets: int, seed: int) -> None:
    features, wanted = data(rows, columns, targets, seed)
    fit = least_squares(features, wanted, intercept)
    design = np.hstack([features.numpy(), np.ones((rows, 1))]) if intercept else features.numpy()
    solution = np.linalg.lstsq(design, wanted.numpy(), rcond=None)[0]
    found = torch.cat([fit.weight, fit.bias[None]]) if intercept else fit.weight
    np.testing.assert_allclose(found.numpy(), solution, rtol=1e-7, atol=1e-9)


def test_leave_one_out_of_least_squares_really_leaves_out() -> None:
    features, wanted = data(12, 3, 2, 1)
    fit = least_squares(features, wanted, True)
    for row in range(12):
        keep = [i for i in range(12) if i != row]
        other = least_squares(features[keep], wanted[keep], True)
        torch.testing.assert_close(fit.held_out[row], features[row] @ other.weight + other.bias)


def test_ridge_leaves_out_a_sample_with_its_augmented_version() -> None:
    """The closed form against ridge of the same lambda on the remaining rows, centred on all of them."""
    features, wanted = data(20, 4, 1, 2)
    groups = torch.arange(10).repeat(2)
    fit = ridge(features, wanted, groups)
    mean, spread = features.mean(0), features.std(0)
    scaled = torch.cat([(features - mean) / spread, torch.ones(20, 1, dtype=torch.float64)], 1)
    errors = []
    for exponent in np.arange(-6, 2.5, 0.5):
        penalty = torch.diag(torch.tensor([10.0**exponent * 20] * 4 + [0.0], dtype=torch.float64))
        out = torch.empty_like(wanted)
        for group in range(10):
            keep = groups != group
            kept = scaled[keep]
            solution = torch.linalg.solve(kept.T @ kept + penalty, kept.T @ wanted[keep])
            out[~keep] = scaled[~keep] @ solution
        errors.append((float(((wanted - out) ** 2).mean()), out))
    best = min(errors, key=lambda entry: entry[0])
    torch.testing.assert_close(fit.held_out, best[1], rtol=1e-6, atol=1e-8)
    assert float(fit.error) == pytest.approx(best[0])
    assert float(fit.error) < float(fit.base)


def test_a_constant_feature_gets_no_weight() -> None:
    """It changes nothing: the fit is that of the other features."""
    features, wanted = data(20, 3, 1, 3)
    features[:, 1] = 7.0
    fit = ridge(features, wanted, torch.arange(20))
    without = ridge(features[:, [0, 2]], wanted, torch.arange(20))
    assert float(fit.weight[1]) == 0.0
    torch.testing.assert_close(fit.weight[[0, 2]], without.weight, rtol=1e-9, atol=0)
    torch.testing.assert_close(fit.bias, without.bias, rtol=1e-9, atol=0)
    torch.testing.assert_close(fit.held_out, without.held_out, rtol=1e-9, atol=0)


def test_rank_does_not_depend_on_units() -> None:
    features, _ = data(20, 3, 1, 4)
    assert rank(features * torch.tensor([1e-8, 1.0, 1e8])) == 3
    assert rank(torch.cat([features, features[:, :1] * 2], 1)) == 3


def test_groups_of_several_sizes_are_left_out_whole() -> None:
    """One sample lost its augmented version: the others are still left out with theirs."""
    features, wanted = data(20, 4, 1, 2)
    groups = torch.arange(10).repeat(2)
    whole = ridge(features, wanted, groups)
    uneven = ridge(features[:19], wanted[:19], groups[:19])
    alone = ridge(features[:19], wanted[:19], torch.arange(19))
    assert float((uneven.held_out - alone.held_out).abs().max()) > 1e-4
    torch.testing.assert_close(uneven.held_out[:9], whole.held_out[:9], rtol=0.05, atol=0.05)
