"""Per-sample statistics of an activation: what qparams are made of.

Everything here is a pure function of one tensor, per sample and per group, where the groups are the whole sample
(granularity "tensor", G = 1) or its channels (G = C). All of them export to ONNX with a dynamic batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .grid import cast, compute_dtype
from .methods import DenseSparse, Method


def grouped(x: Tensor, granularity: str, channel_axis: int) -> Tensor:
    """View x, (B, ...), as (B, G, N): G groups of N values per sample, in the compute dtype."""
    x = cast(x, compute_dtype(x.dtype))
    if granularity == "tensor":
        return x.flatten(1).unsqueeze(1)
    return x.movedim(channel_axis, 1).flatten(2) if x.ndim > 2 else x.unsqueeze(2)


def quantiles(x: Tensor, levels: tuple[float, ...]) -> tuple[Tensor, ...]:
    """Quantiles over the last axis by linear interpolation, exact for any number of values.

    Order statistics come from `topk`, on whichever side is shorter: several times faster than torch.quantile for
    levels near 0 and 1, without its limit of 2^24 values and without its float16 gap.

    Args:
        x: (..., N) float32 or float64, N >= 1.
        levels: in [0, 1].

    Returns:
        one (...) tensor per level: v_lo + (v_hi - v_lo) * fraction, at position level * (N - 1).
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
    return tuple(found)


def extents(x: Tensor, method: Method, signed: bool | None, channel_axis: int) -> tuple[Tensor, ...]:
    """The per-sample statistics behind a method's qparams.

    Each is oriented so that a larger value means a wider range; so maxima over samples merge by `max`.

    Args:
        x: (B, ...) floating point.
        method: whose statistic.
        signed: as resolved, None while calibrating: statistics that serve both outcomes.
        channel_axis: used where method.granularity is "channel".

    Returns:
        S tensors (B, G) in the compute dtype. S = 1: the maximum or quantile of |x| (of x where signed is False).
        S = 2: -a and b, asymmetric Direct and signed DenseSparse. DenseSparse also: b alone where signed is False;
        -a and b of a signed tensor and b of an unsigned one (S = 3) while signed is None.
    """
    if not method.uses_range:
        # signed None: |x| equals x wherever the tensor later turns out to be unsigned. The magnitude comes before the
        # group axis: OpenVINO 2026.4 computes a reduction over an unsqueezed tensor's |x| wrongly, in silence
        magnitude = x.clamp(min=0) if signed is False else x.abs()
        if x.ndim == 2 and method.granularity == "channel":
            # one value per channel: reducing an axis of size 1 is what OpenVINO 2026.4 (from ONNX) gets wrong
            return (cast(magnitude, compute_dtype(x.dtype)),)
        values = grouped(magnitude, method.granularity, channel_axis)
        return quantiles(values, (method.clip,)) if isinstance(method.clip, float) else (values.amax(-1),)
    values = grouped(x, method.granularity, channel_axis)
    if isinstance(method, DenseSparse):
        half, full = method.density / 2, method.density
        if signed is False:
            return (quantiles(values, (1 - full,))[0],)
        low, *rest = quantiles(values, (half, 1 - half) if signed else (half, 1 - half, 1 - full))
        return (-low, *rest)
    if isinstance(method.clip, float):
        low, high = quantiles(values, (1 - method.clip, method.clip))
    else:
        low, high = values.amin(-1), values.amax(-1)
    return (torch.zeros_like(low) if method.signed is False else -low, high)


def statistic(x: Tensor, method: Method, channel_axis: int) -> Tensor:
    """What calibration records of a batch: `extents` while the sign is not known yet, stacked.

    Returns:
        (B, S, G) in the compute dtype.
    """
    found = extents(x, method, method.signed, channel_axis)
    return torch.stack(found, dim=1)
