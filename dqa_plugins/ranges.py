"""From a tensor to its statistics, and from statistics to qparams: per sample, and per group of values.

Groups are the whole sample (granularity "tensor", G = 1) or its channels (G = C). Everything here is pure, and exports
to ONNX with a dynamic batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .grid import QParams
from .kernels import eager
from .method import Extent, Method
from .rounding import cast, compute_dtype


def grouped(x: Tensor, granularity: str, channel_axis: int) -> Tensor:
    """View x, (B, ...), as (B, G, N): G groups of N values per sample, in the compute dtype."""
    x = cast(x, compute_dtype(x.dtype))
    if granularity == "tensor":
        return x.flatten(1).unsqueeze(1)
    return x.movedim(channel_axis, 1).flatten(2) if x.ndim > 2 else x.unsqueeze(2)


def quantiles(x: Tensor, levels: tuple[float, ...]) -> tuple[Tensor, ...]:
    """Quantiles over the last axis by linear interpolation, exact for any number of values.

    Order statistics come from a kernel, or from `topk`, on whichever side is shorter: several times faster than
    torch.quantile for levels near 0 and 1, without its limit of 2^24 values and without its float16 gap.

    Args:
        x: (..., N) float32 or float64, N >= 1.
        levels: in [0, 1].

    Returns:
        one (...) tensor per level: v_lo + (v_hi - v_lo) * fraction, at position level * (N - 1).
    """
    if x.dtype is torch.float32 and eager.usable(x):
        wanted = tuple(Extent("upper", level) for level in levels)
        by_kernel = eager.order_statistics(x.reshape(-1, x.shape[-1]), wanted)
        if by_kernel is not None:
            return tuple(value.reshape(x.shape[:-1]) for value in by_kernel.unbind(1))
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
    """The extents that a method's qparams are made of.

    Args:
        x: (B, ...) floating point.
        method: whose.
        signed: as resolved, None while calibrating.
        channel_axis: used where method.granularity is "channel".

    Returns:
        (B, G) in the compute dtype for each of `method.statistic(signed)`.
    """
    wanted = method.statistic(signed)
    if eager.usable(x):
        axis = channel_axis % x.ndim if method.granularity == "channel" else None
        ends = None if all(_within(extent) for extent in wanted) else eager.extremes(x, axis)
        if (by_kernel := _by_kernel(x, wanted, axis, ends)) is not None:
            return by_kernel
    sources = {_SOURCES.get(extent.of, "value") for extent in wanted}
    found: dict[Extent, Tensor] = {}
    for source in sorted(sources):
        # the magnitude comes before the group axis: OpenVINO 2026.4 computes a reduction over an unsqueezed tensor's
        # |x| wrongly, in silence
        values = x.abs() if source == "magnitude" else x.clamp(min=0) if source == "positive" else x
        mine = [extent for extent in wanted if _SOURCES.get(extent.of, "value") == source]
        if source != "value" and x.ndim == 2 and method.granularity == "channel":
            # one value per channel: reducing an axis of size 1 is what OpenVINO 2026.4 (from ONNX) gets wrong
            found.update((extent, cast(values, compute_dtype(x.dtype))) for extent in mine)
        else:
            found.update(_measure(grouped(values, method.granularity, channel_axis), mine))
    return tuple(found[extent] for extent in wanted)


_SOURCES = {"magnitude": "magnitude", "positive": "positive"}


def _measure(values: Tensor, wanted: Sequence[Extent]) -> dict[Extent, Tensor]:
    """values: (B, G, N); (B, G) for each extent."""
    inner = [extent.level for extent in wanted if extent.of != "zero" and 0 < extent.level < 1]
    between = dict(zip(inner, quantiles(values, tuple(inner)), strict=True)) if inner else {}
    found = {}
    for extent in wanted:
        if extent.of == "zero":
            found[extent] = torch.zeros_like(values[..., 0])
            continue
        end = between.get(extent.level)
        if end is None:
            end = values.amax(-1) if extent.level == 1 else values.amin(-1)
        found[extent] = -end if extent.of == "lower" else end
    return found


def _within(extent: Extent) -> bool:
    """Whether an extent is an order statistic that the ends do not tell."""
    return 0 < extent.level < 1 and extent.of != "zero"


def _by_kernel(
    x: Tensor, wanted: Sequence[Extent], axis: int | None, ends: eager.Extremes | None
) -> tuple[Tensor, ...] | None:
    """`extents` of the ends of each group, if they are known, and of order statistics; None: a value is NaN."""
    found = {}
    if ends is not None:
        if ends.nan:
            return None
        found = {extent: end for extent in wanted if (end := _end(extent, ends)) is not None}
    for magnitude in (True, False):
        mine = tuple(extent for extent in wanted if extent not in found and (extent.of == "magnitude") == magnitude)
        if mine:
            values = eager.order_statistics(eager.by_group(x, axis), mine)
            if values is None:
                return None
            found.update(zip(mine, values.reshape(len(x), -1, len(mine)).unbind(2), strict=True))
    return tuple(found[extent] for extent in wanted)


def _end(extent: Extent, ends: eager.Extremes) -> Tensor | None:
    """The extent if the smallest and the largest value tell it."""
    if extent.of == "zero":
        return torch.zeros_like(ends.low)
    if extent.of == "lower":
        return -ends.low if extent.level == 0 else None
    if extent.level != 1:
        return None
    if extent.of == "magnitude":
        return torch.maximum(ends.high, -ends.low)
    return ends.high.clamp(min=0) if extent.of == "positive" else ends.high


class Measured(NamedTuple):
    """What calibration asks of a batch: (B, S, G), see `statistic`, and the smallest value, ()."""

    values: Tensor
    minimum: Tensor


def measure(x: Tensor, method: Method, channel_axis: int) -> Measured | None:
    """The statistic of a batch and its smallest value, in one pass where kernels serve it; None: a value is not finite.

    Args:
        x: (B, ...) floating point, with values.
        method: whose statistic.
        channel_axis: used where method.granularity is "channel".
    """
    if not eager.usable(x):
        finite = bool(torch.isfinite(x).all())
        return Measured(statistic(x, method, channel_axis), x.amin()) if finite else None
    axis = channel_axis % x.ndim if method.granularity == "channel" else None
    ends = eager.extremes(x, axis)
    if not ends.finite:
        return None
    found = _by_kernel(x, method.statistic(method.signed), axis, ends)
    return None if found is None else Measured(torch.stack(found, 1), ends.low.amin())


def statistic(x: Tensor, method: Method, channel_axis: int) -> Tensor:
    """What calibration records of a batch: `extents` while the sign is not known yet, stacked.

    Returns:
        (B, S, G) in the compute dtype.
    """
    return torch.stack(extents(x, method, method.signed, channel_axis), dim=1)


def resolved(method: Method, recorded: Sequence[Tensor], signed: bool) -> tuple[Tensor, ...]:
    """Of extents recorded while the sign was open, those of a sign."""
    kinds = method.statistic(method.signed)
    if len(recorded) != len(kinds):
        return tuple(recorded)
    # |x| equals x wherever a tensor turned out to be unsigned
    alike = [Extent("magnitude", extent.level) if extent.of == "positive" else extent for extent in kinds]
    wanted = [Extent("magnitude", e.level) if e.of == "positive" else e for e in method.statistic(signed)]
    return tuple(recorded[alike.index(extent)] for extent in wanted)


def qparams_of(method: Method, found: Sequence[Tensor], signed: bool, factor: Tensor | None = None) -> QParams:
    """Qparams of the extents of a tensor.

    Args:
        method: whose qparams.
        found: as `extents` gave them, (..., G) each; those recorded while the sign was open serve too.
        signed: resolved.
        factor: () or (G,), multiplies the range (clip="mse").

    Returns:
        parameters of shape (..., G), in the dtype of the extents.
    """
    found = resolved(method, found, signed)
    if factor is not None:
        # calibrated in float64, used in float32: the tensor at hand decides
        found = tuple(extent * cast(factor, extent.dtype) for extent in found)
    if not method.uses_range:
        return QParams(found[0] / method.steps(signed))
    if len(found) == 1:
        return QParams(None, torch.zeros_like(found[0]), found[0])
    return QParams(None, -found[0], found[1])


def valid(found: QParams) -> QParams:
    """Predicted parameters with which one can quantize: a scale above zero, b above a.

    Args:
        found: of shape (..., G).
    """
    if found.scale is not None:
        return QParams(found.scale.clamp(min=1e-30))
    lower, upper = found.thresholds
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
