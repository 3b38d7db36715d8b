"""The rotation of keys by their position (Su et al., 2021), undone before they are packed and done again behind.

A component that has one mean and one spread at all positions needs fewer bits than a pair that its position turns. This
is a change of coordinates and nothing more: a wrong angle costs bits, not exactness.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Turn(NamedTuple):
    """Angles of tokens.

    Attributes:
        cos, sin: (n, tokens) float32, contiguous.
        at: column of the token that comes first.
    """

    cos: Tensor
    sin: Tensor
    at: int = 0

    def behind(self, tokens: int) -> Turn:
        """Of what follows so many tokens."""
        return self._replace(at=self.at + tokens)


def turn(frequencies: tuple[float, ...], positions: Tensor) -> Turn:
    """Angles of positions (T,), for n frequencies in radians per token."""
    angle = torch.tensor(frequencies, dtype=torch.float64)[:, None] * positions.double()
    return Turn(angle.cos().float(), angle.sin().float())


def rotated(x: Tensor, by: Turn, back: bool = False) -> Tensor:
    """(..., D, T) vectors whose components d and d + n are turned by the angles, or back by them."""
    n, tokens = len(by.cos), slice(by.at, by.at + x.shape[-1])
    if not n:
        return x
    cos, sin = by.cos[:, tokens].to(x.device), by.sin[:, tokens].to(x.device)
    a, b, sin = x[..., :n, :], x[..., n : 2 * n, :], -sin if back else sin
    return torch.cat([a * cos - b * sin, a * sin + b * cos, x[..., 2 * n :, :]], -2)
