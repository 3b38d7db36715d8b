"""From statistics to quantization parameters: scale, or the thresholds a and b.

A qparams source answers one question: which statistic does this sample use?
"static": the one reduced over calibration; "dynamic": its own; QPP: one predicted from the network's input.
From there on all sources share the functions below.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .methods import DenseSparse, Method, NoisyQuant


class QParams(NamedTuple):
    """Quantization parameters of one tensor: a scale, or two thresholds. The unused fields are None."""

    scale: Tensor | None
    lower: Tensor | None = None
    upper: Tensor | None = None

    def map(self, function: object) -> QParams:
        """Apply a function to each parameter that is there."""
        return QParams(*(None if p is None else function(p) for p in self))  # type: ignore[operator]


def scale_divisor(method: Method, signed: bool) -> int:
    """Number of steps in max|x|: 2^(n-1) signed, 2^n unsigned, 2^(n-1) - 1 in NoisyQuant's script."""
    if isinstance(method, NoisyQuant) and not method.full_range:
        return int(2 ** (method.bits - 1) - 1)
    return int(2 ** (method.bits - 1) if signed else 2**method.bits)


def from_extents(method: Method, extents: Sequence[Tensor], signed: bool, factor: Tensor | None = None) -> QParams:
    """Qparams of the statistics of a tensor.

    Args:
        method: whose qparams.
        extents: as `statistics.extents` gave them, (..., G) each; those recorded while the sign was open serve too.
        signed: resolved.
        factor: () or (G,), multiplies the range (clip="mse").

    Returns:
        parameters of shape (..., G), in the dtype of the extents.
    """
    if isinstance(method, DenseSparse):
        if not signed:
            return QParams(None, torch.zeros_like(extents[-1]), extents[-1])
        return QParams(None, -extents[0], extents[1])
    if factor is not None:
        extents = [extent * factor for extent in extents]
    if method.uses_range:
        return QParams(None, -extents[0], extents[1])
    return QParams(extents[0] / scale_divisor(method, signed))


def valid(found: QParams) -> QParams:
    """Predicted parameters with which one can quantize: a scale above zero, b above a.

    Args:
        found: of shape (..., G).
    """
    if found.scale is not None:
        return QParams(found.scale.clamp(min=1e-30))
    lower, upper = found.lower, found.upper
    if lower is None or upper is None:
        raise TypeError("two thresholds are needed")
    return QParams(None, lower, torch.maximum(upper, lower + lower.abs() * 1e-6 + 1e-30))


def lay_out(parameter: Tensor, x: Tensor, channel_axis: int, *, per_sample: bool) -> Tensor:
    """Reshape a parameter so that it broadcasts against x.

    Args:
        parameter: (G,) static or (B, G) per sample, G = 1 or C.
        x: (B, ...).
        channel_axis: where the C channels lie, if G > 1.
        per_sample: True for (B, G).
    """
    axis = channel_axis % x.ndim
    shape = [1] * x.ndim
    shape[axis] = parameter.shape[-1]
    if per_sample:
        shape[0] = -1
    return parameter.reshape(shape)
