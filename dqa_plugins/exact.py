"""Sums of float64 numbers without rounding: the result does not depend on their order, nor on who added what first.

A sum is held as parts whose exact total it is: its nearest float64, then the nearest to what is left, and so on. Sums
of float32 statistics nearly always fit one part; float64 ones take two or three.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def exact_sum(values: Tensor) -> Tensor:
    """Sum over the first axis.

    Args:
        values: (N, ...) float64, N >= 1.

    Returns:
        (P, ...) float64 parts, the largest first; P = 1 wherever one float64 holds every sum. The parts are a function
        of the exact sum alone. A sum that is not finite is one part.
    """
    total, exact = values, True
    while len(total) > 1:
        half = len(total) // 2
        left, right = total[:half], total[half : 2 * half]
        found = left + right
        moved = found - left  # what was added to the left summand: error-free transformation (Knuth)
        exact = exact and not bool(((left - (found - moved)) + (right - moved)).any())
        total = torch.cat([found, total[2 * half :]])
    if not exact and bool(torch.isfinite(values.abs().sum(0)).all()):
        return _parts(values)
    return total + 0.0  # no sum is -0.0


def _parts(values: Tensor) -> Tensor:
    columns = [_column(column) for column in values.flatten(1).T.tolist()]
    length = max(map(len, columns))
    padded = [column + [0.0] * (length - len(column)) for column in columns]
    found = torch.tensor(padded, dtype=torch.float64, device=values.device).T
    return found.reshape(length, *values.shape[1:])


def _column(values: list[float]) -> list[float]:
    """The parts of one sum (math.fsum rounds correctly)."""
    parts: list[float] = []
    while left := math.fsum([*values, *(-part for part in parts)]):
        parts.append(left)
    return parts or [0.0]
