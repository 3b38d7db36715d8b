"""Linear regression from features to statistics: the paper's least squares, and ridge in log space.

float64 throughout. Pure functions: no module, no file.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .radial import STRENGTH

_LAMBDAS = tuple(10.0**e for e in torch.arange(-6, 2.5, 0.5).tolist())


class Fit(NamedTuple):
    """A linear model y = x @ weight + bias, and its leave-one-out predictions.

    weight: (K, P). bias: (P,). held_out: (M, P), each row predicted without its sample. error, base: (P,), mean
    squared leave-one-out error of the model, and of the plain mean.
    """

    weight: Tensor
    bias: Tensor
    held_out: Tensor
    error: Tensor
    base: Tensor


def rank(features: Tensor) -> int:
    """Rank of a matrix whose columns were scaled to unit length."""
    scale = features.norm(dim=0).clamp(min=1e-300)
    return int(torch.linalg.matrix_rank(features / scale, rtol=1e-8))


def least_squares(features: Tensor, targets: Tensor, intercept: bool) -> Fit:
    """Ordinary least squares (QPP paper, eq. 14 and 15).

    Args:
        features: (M, K), M > K, full rank (with the column of ones, if there is an intercept).
        targets: (M, P).
        intercept: fit a bias.
    """
    design = torch.cat([features, torch.ones_like(features[:, :1])], 1) if intercept else features
    scale = design.norm(dim=0)
    basis, triangle = torch.linalg.qr(design / scale)
    solution = torch.linalg.solve_triangular(triangle, basis.T @ targets, upper=True) / scale[:, None]
    leverage = (basis**2).sum(1, keepdim=True)
    fitted = design @ solution
    held_out = targets - (targets - fitted) / (1 - leverage).clamp(min=1e-9)
    weight, bias = (solution[:-1], solution[-1]) if intercept else (solution, torch.zeros_like(solution[0]))
    return Fit(weight, bias, held_out, _mse(targets, held_out), _base(targets))


def ridge(features: Tensor, targets: Tensor, groups: Tensor, radial: Tensor | None = None) -> Fit:
    """Ridge regression on standardised features; of each target, lambda and the use of `radial` by leave-one-out.

    Args:
        features: (M, K), constant columns get no weight.
        targets: (M, P).
        groups: (M,) integers; rows of one number (a sample and its augmented version) are left out together.
        radial: (M, D), more features, penalised less by the factor `radial.STRENGTH` and not standardised.

    Returns:
        with weight (K + D, P).
    """
    mean, centre = features.mean(0), targets.mean(0)
    spread = features.std(0)
    live = spread > 1e-9 * (1 + mean.abs())
    rate = torch.where(live, 1 / torch.where(live, spread, torch.ones_like(spread)), 0.0)
    designs = [(features - mean) * rate]
    if radial is not None:
        mean, rate = torch.cat([mean, radial.mean(0)]), torch.cat([rate, torch.full_like(radial[0], STRENGTH**0.5)])
        designs.append((torch.cat([features, radial], 1) - mean) * rate)
    best_error = torch.full_like(centre, torch.inf)
    weight, held_out = torch.zeros(len(mean), targets.shape[1]).to(targets), targets.clone()
    wanted = targets - centre
    for design in designs:
        left, values, right = torch.linalg.svd(design, full_matrices=False)
        projected = left.T @ wanted
        for factor in _LAMBDAS:
            shrink = values**2 / (values**2 + factor * len(features))
            residual = wanted - left @ (shrink[:, None] * projected)
            left_out = targets - _without_group(left, shrink, residual, groups)
            error = _mse(targets, left_out)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            coefficients = right.T @ ((shrink / values.clamp(min=1e-300))[:, None] * projected)
            coefficients = nn.functional.pad(coefficients, (0, 0, 0, len(mean) - len(coefficients)))
            weight = torch.where(better, coefficients, weight)
            held_out = torch.where(better, left_out, held_out)
    weight = weight * rate[:, None]
    return Fit(weight, centre - mean @ weight, held_out, best_error, _base(targets))


def _without_group(left: Tensor, shrink: Tensor, residual: Tensor, groups: Tensor) -> Tensor:
    """Residuals of rows predicted without their group: (I - H_gg)^-1 r_g, H the hat matrix with the mean in it."""
    count = len(left)
    hat = (left * shrink) @ left.T + 1.0 / count
    order = groups.argsort(stable=True)
    _, sizes = torch.unique_consecutive(groups[order], return_counts=True)
    starts = sizes.cumsum(0) - sizes
    out = residual / (1 - hat.diagonal())[:, None].clamp(min=1e-6)
    for size in sizes.unique().tolist():
        if size == 1:
            continue
        members = order[starts[sizes == size, None] + torch.arange(size, device=order.device)]
        blocks = hat[members[:, :, None], members[:, None, :]]
        system = torch.eye(size, dtype=hat.dtype, device=hat.device) - blocks
        out[members.reshape(-1)] = torch.linalg.solve(system, residual[members]).flatten(0, 1)
    return out


def _mse(targets: Tensor, predictions: Tensor) -> Tensor:
    return ((targets - predictions) ** 2).mean(0)


def _base(targets: Tensor) -> Tensor:
    count = len(targets)
    return ((targets - targets.mean(0)) ** 2).mean(0) * (count / max(count - 1, 1)) ** 2
