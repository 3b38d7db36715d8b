"""Radial basis functions of a site's features: what the extended mode adds to a regression that is linear.

A threshold is no linear function of the features: biases set a floor to it in dark images, and the channels that
follow light and those that follow its absence take turns. Gaussians around calibration samples can bend; away from all
samples they vanish and leave the linear part.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .features import PAPER_FEATURES, SCALE, SLOPES, sum_of

CENTRES = 96  # samples that functions are centred on, at most
WIDTH = 0.3  # -log of the function one standard deviation away in every feature
STRENGTH = 1000.0  # prior variance of the radial part over that of one linear feature
LEAST = 1e-5  # smallest eigenvalue kept, relative to the largest
_LOGARITHMS = PAPER_FEATURES + SLOPES


class RadialBasis(NamedTuple):
    """exp(-|points * rate - centre|^2) for R centres, and the D combinations of them that are orthonormal.

    rate: (F,) float64. centres: (R, F) float64. mix: (R, D) float64.
    """

    rate: Tensor
    centres: Tensor
    mix: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """(M, F) features of the site to (M, D)."""
        return radial(features, self.rate, self.centres) @ self.mix


def plain(features: Tensor) -> Tensor:
    """The extended features in the units of the tensor: no logarithms, nothing relative.

    Args:
        features: (B, F) float64, see `features.site_features`.
    """
    values = features[:, :_LOGARITHMS].exp()
    return torch.cat([values, features[:, _LOGARITHMS:] * values[:, SCALE : SCALE + 1]], 1)


def radial(features: Tensor, rate: Tensor, centres: Tensor) -> Tensor:
    """The functions at the features of some samples.

    Args:
        features: (B, F) float64, extended.
        rate: (F,).
        centres: (R, F), in units of 1 / rate.

    Returns:
        (B, R) float64 in [0, 1].
    """
    # a sum, not a matrix product: its rounding would depend on the batch size
    distance = sum_of(((plain(features) * rate).unsqueeze(1) - centres).square())
    return (-distance).exp()


def radial_basis(features: Tensor) -> RadialBasis:
    """Functions around evenly spaced calibration samples (Nystroem's approximation of the Gaussian kernel).

    Args:
        features: (M, F) float64, extended. Constant ones play no part.
    """
    points = plain(features)
    spread = points.std(0)
    live = spread > 1e-9 * (1e-12 + points.abs().amax(0))
    scale = (WIDTH / live.sum().clamp(min=1)).sqrt()
    rate = torch.where(live, scale / torch.where(live, spread, torch.ones_like(spread)), 0.0)
    chosen = torch.linspace(0, len(points) - 1, min(CENTRES, len(points)), dtype=torch.float64).round().long()
    centres = points[chosen.to(points.device)] * rate
    values, vectors = torch.linalg.eigh(radial(features[chosen.to(points.device)], rate, centres))
    kept = values > LEAST * values[-1]
    return RadialBasis(rate, centres, vectors[:, kept] / values[kept].sqrt())
