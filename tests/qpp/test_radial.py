"""Radial basis functions against their formula, and what they are for: a response that bends."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dqa_plugins.qpp.features import site_features
from dqa_plugins.qpp.radial import CENTRES, WIDTH, plain, radial, radial_basis
from dqa_plugins.qpp.regression import ridge


def images(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, 12, 12, generator=generator) * torch.rand(count, 1, 1, 1, generator=generator)


def test_plain_features_are_in_units_of_the_tensor() -> None:
    x = images(5)
    found, flat = plain(site_features(x, "extended")).numpy(), x.flatten(1).double().numpy()
    np.testing.assert_allclose(found[:, 1], np.quantile(flat, 0.99, axis=1), rtol=1e-5)
    np.testing.assert_allclose(found[:, 4], flat.max(1), rtol=1e-6)
    np.testing.assert_allclose(found[:, -4], np.quantile(flat, 0.5, axis=1), rtol=1e-5)
    np.testing.assert_allclose(found[:, -2:], np.stack([flat.mean(1), flat.std(1)], 1), rtol=1e-5)


def test_functions_are_gaussians_of_standardised_features() -> None:
    features = site_features(images(200), "extended")
    basis = radial_basis(features)
    assert basis.centres.shape == (CENTRES, features.shape[1])
    points = plain(features).numpy()
    points = points / points.std(0, ddof=1)
    centres = points[np.round(np.linspace(0, 199, CENTRES)).astype(int)]
    squares = ((points[:, None] - centres) ** 2).mean(2)
    np.testing.assert_allclose(radial(features, basis.rate, basis.centres), np.exp(-WIDTH * squares), rtol=1e-6)


def test_combinations_are_orthonormal_under_the_kernel() -> None:
    features = site_features(images(60), "extended")
    basis = radial_basis(features)
    gram = radial(features, basis.rate, basis.centres)
    torch.testing.assert_close(
        basis.mix.T @ gram @ basis.mix, torch.eye(basis.mix.shape[1], dtype=torch.float64), atol=1e-6, rtol=0
    )


def test_constant_features_play_no_part() -> None:
    features = site_features(images(40).flatten(1), "extended")  # no height and width: no contrast
    basis = radial_basis(features)
    assert bool((basis.rate[5:13] == 0).all())
    assert bool((basis.rate[:5] > 0).all())


def test_they_vanish_away_from_all_samples() -> None:
    basis = radial_basis(site_features(images(60), "extended"))
    assert float(basis(site_features(1e6 * images(3, 1), "extended")).abs().max()) == 0.0


def test_a_bent_response_is_learnt_and_a_straight_one_left_linear() -> None:
    """A valley in brightness, as of channels that follow light and others that follow its absence."""
    features, others = (site_features(images(120, seed), "extended") for seed in (0, 1))
    basis = radial_basis(features)

    def error(target: Tensor, truth: Tensor, radials: Tensor | None) -> float:
        found = ridge(features, target[:, None], torch.arange(len(target)), radials)
        design = others if radials is None else torch.cat([others, basis(others)], 1)
        return float((design @ found.weight[:, 0] + found.bias[0] - truth).square().mean())

    def valley(f: Tensor) -> Tensor:
        return (plain(f)[:, 1] - 0.5).abs()

    wanted, truth = valley(features), valley(others)
    assert error(wanted, truth, basis(features)) < 0.5 * error(wanted, truth, None)
    straight = features[:, 1:2] + 0.3 * features[:, 15:16]
    found = ridge(features, straight, torch.arange(120), basis(features))
    assert bool((found.weight[features.shape[1] :] == 0).all())


def test_leave_one_out_counts_them() -> None:
    features = site_features(images(40), "extended")
    basis, wanted = radial_basis(features)(features), (plain(features)[:, 1:2] - 0.5).abs()
    both = ridge(features, wanted, torch.arange(40), basis)
    assert bool((both.error <= ridge(features, wanted, torch.arange(40)).error).all())
