"""From statistics to quantization parameters: scale, or the thresholds a and b.

A qparams source answers one question: which statistic does this sample use?
"static": the one reduced over calibration; "dynamic": its own. (Predicted ones come from the input of the network.)
From there on all sources share the functions below.
"""

from __future__ import annotations

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


def from_statistic(method: Method, values: Tensor, signed: bool, factor: Tensor | None = None) -> QParams:
    """Qparams of a statistic.

    Args:
        method: whose qparams.
        values: (..., S, G) as `statistics.statistic` or `CalibrationRecord.reduced` gave them.
        signed: resolved.
        factor: () or (G,), multiplies the range (clip="mse").

    Returns:
        parameters of shape (..., G), in the dtype of values.
    """
    if isinstance(method, DenseSparse):
        if not signed:
            upper = values[..., 2, :]
            return QParams(None, torch.zeros_like(upper), upper)
        return QParams(None, -values[..., 0, :], values[..., 1, :])
    if factor is not None:
        values = values * factor
    if method.uses_range:
        return QParams(None, -values[..., 0, :], values[..., 1, :])
    return QParams(values[..., 0, :] / scale_divisor(method, signed))


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
