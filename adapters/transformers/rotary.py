"""The rotation of keys by their position (Su et al., 2021), undone before they are packed and done again behind.

A component that has one mean and one spread at all positions needs fewer bits than a pair that its position turns. This
is a change of coordinates and nothing more: a wrong angle costs bits, not exactness.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Turn(NamedTuple):
    """Angles of tokens: cosines and sines, (tokens, n) float32, contiguous."""

    cos: Tensor
    sin: Tensor

    def behind(self, tokens: int) -> Turn:
        """Of what follows so many tokens."""
        return Turn(self.cos[tokens:], self.sin[tokens:])


def turn(frequencies: tuple[float, ...], positions: Tensor) -> Turn:
    """Angles of positions (T,), for n frequencies in radians per token."""
    angle = positions.double()[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    return Turn(angle.cos().float(), angle.sin().float())


def rotated(x: Tensor, by: Turn, back: bool = False) -> Tensor:
    """(..., D, T) vectors whose components d and d + n are turned by the first T angles, or back by them."""
    n, tokens = by.cos.shape[1], x.shape[-1]
    if not n:
        return x
    cos, sin = by.cos[:tokens].T.to(x.device), by.sin[:tokens].T.to(x.device)
    a, b, sin = x[..., :n, :], x[..., n : 2 * n, :], -sin if back else sin
    return torch.cat([a * cos - b * sin, a * sin + b * cos, x[..., 2 * n :, :]], -2)
