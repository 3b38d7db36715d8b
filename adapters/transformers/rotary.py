"""The rotation of keys by their position (Su et al., 2021), undone before they are packed and done again behind.

A component that has one mean and one spread at all positions needs fewer bits than a pair that its position turns. This
is a change of coordinates and nothing more: a wrong angle costs bits, not exactness.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_AT_A_TIME = 1024  # positions


class Turn(NamedTuple):
    """Angles of tokens: cosines and sines, (tokens, n) float32, contiguous."""

    cos: Tensor
    sin: Tensor

    def behind(self, tokens: int) -> Turn:
        """Of what follows so many tokens."""
        return Turn(self.cos[tokens:], self.sin[tokens:])


def turn(frequencies: tuple[float, ...], positions: Tensor) -> Turn:
    """Angles of positions (T,), for n frequencies in radians per token."""
    of = torch.tensor(frequencies, dtype=torch.float64)
    made = Turn(torch.empty(len(positions), len(of)), torch.empty(len(positions), len(of)))
    for at in range(0, len(positions), _AT_A_TIME):  # float64 is twice as large as what is kept
        angle = positions[at : at + _AT_A_TIME].double()[:, None] * of
        made.cos[at : at + _AT_A_TIME], made.sin[at : at + _AT_A_TIME] = angle.cos(), angle.sin()
    return made


def rotated(x: Tensor, by: Turn, back: bool = False) -> Tensor:
    """(..., D, T) vectors whose components d and d + n are turned by the first T angles, or back by them."""
    n, tokens = by.cos.shape[1], x.shape[-1]
    if not n:
        return x
    cos, sin = by.cos[:tokens].T.to(x.device), by.sin[:tokens].T.to(x.device)
    a, b, sin = x[..., :n, :], x[..., n : 2 * n, :], -sin if back else sin
    return torch.cat([a * cos - b * sin, a * sin + b * cos, x[..., 2 * n :, :]], -2)
