"""Per-sample statistics of an activation: what qparams are made of.

Everything here is a pure function of one tensor, per sample and per group, where the groups are the whole sample
(granularity "tensor", G = 1) or its channels (G = C). All of them export to ONNX with a dynamic batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .functional import compute_dtype
from .methods import DenseSparse, Method


def grouped(x: Tensor, granularity: str, channel_axis: int) -> Tensor:
    """View x, (B, ...), as (B, G, N): G groups of N values per sample, in the compute dtype."""
    x = x.to(compute_dtype(x.dtype))
    if granularity == "tensor":
        return x.flatten(1).unsqueeze(1)
    return x.movedim(channel_axis, 1).flatten(2) if x.ndim > 2 else x.unsqueeze(2)


def quantiles(x: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Quantiles over the last axis by linear interpolation, exact for any number of values.

    Order statistics come from `topk`, on whichever side is shorter: several times faster than torch.quantile for
    levels near 0 and 1, without its limit of 2^24 values and without its float16 gap.

    Args:
        x: (..., N) float32 or float64, N >= 1.
        levels: in [0, 1].

    Returns:
        (..., len(levels)): v_lo + (v_hi - v_lo) * fraction, with position level * (N - 1).
    """
    count = x.shape[-1]
    positions = [min(max(level, 0.0), 1.0) * (count - 1) for level in levels]
    low = [math.floor(p) for p in positions]
    upper = [p for p in low if p >= count // 2]
    lower = [min(p + 1, count - 1) for p in low if p < count // 2]
    descending = torch.topk(x, count - min(upper), dim=-1).values if upper else None
    ascending = torch.topk(x, max(lower) + 1, dim=-1, largest=False).values if lower else None
    found = []
    for position, rank in zip(positions, low, strict=True):
        following = min(rank + 1, count - 1)
        if rank >= count // 2 and descending is not None:
            first, second = descending[..., count - 1 - rank], descending[..., count - 1 - following]
        elif ascending is not None:
            first, second = ascending[..., rank], ascending[..., following]
        found.append(first + (second - first) * (position - rank))
    return torch.stack(found, dim=-1)


def statistic_size(method: Method) -> int:
    """S, the number of values that `statistic` gives per sample and group."""
    if isinstance(method, DenseSparse):
        return 3
    return 2 if method.uses_range else 1


def statistic(x: Tensor, method: Method, signed: bool | None, channel_axis: int) -> Tensor:
    """The per-sample statistic behind a method's qparams.

    Every entry is oriented so that a larger one means a wider range; so maxima over samples merge by `max`.

    Args:
        x: (B, ...) floating point.
        method: whose statistic.
        signed: as resolved, None while calibrating: a statistic that serves both outcomes.
        channel_axis: used where method.granularity is "channel".

    Returns:
        (B, S, G) in the compute dtype. S = 1: the maximum or quantile of |x| (of x where signed is False).
        S = 2 (asymmetric Direct): -a, b. S = 3 (DenseSparse): -a and b of a signed tensor, b of an unsigned one.
    """
    values = grouped(x, method.granularity, channel_axis)
    if isinstance(method, DenseSparse):
        half, full = method.density / 2, method.density
        if signed is None:
            low, high, top = quantiles(values, (half, 1 - half, 1 - full)).unbind(-1)
        elif signed:
            low, high = quantiles(values, (half, 1 - half)).unbind(-1)
            top = high
        else:
            top = quantiles(values, (1 - full,)).squeeze(-1)
            low, high = torch.zeros_like(top), top
        return torch.stack([-low, high, top], dim=1)
    if method.uses_range:
        if isinstance(method.clip, float):
            low, high = quantiles(values, (1 - method.clip, method.clip)).unbind(-1)
        else:
            low, high = values.amin(-1), values.amax(-1)
        if method.signed is False:
            low = torch.zeros_like(low)
        return torch.stack([-low, high], dim=1)
    # signed None: |x| equals x wherever the tensor later turns out to be unsigned
    magnitude = values.clamp(min=0) if signed is False else values.abs()
    if isinstance(method.clip, float):
        return quantiles(magnitude, (method.clip,)).squeeze(-1).unsqueeze(1)
    return magnitude.amax(-1).unsqueeze(1)
