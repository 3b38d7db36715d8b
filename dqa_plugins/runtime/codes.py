"""What travels from a lowered quantizer to the int8 layers that read it, and the grids that a byte can hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dqa_plugins.grid import Grid

Floats = NDArray[np.float32]


class Outliers(NamedTuple):
    """Values that stay in float: positions in the memory of the codes (int32), what those lack there (float32)."""

    positions: NDArray[np.int32]
    residuals: Floats


class Codes(NamedTuple):
    """A quantized tensor.

    Args:
        codes: uint8, (B, C, H, W) in channels_last or (..., C) contiguous; None where an exact fallback was taken:
            then `values` is what its readers compute with.
        scales: value of a step: one for all samples, or B of them.
        zeros: the byte of value 0, likewise.
        outliers: of Dense+Sparse.
        values: float32, the fake-quantized tensor, for readers in float; None if there are none.
    """

    codes: Tensor | None
    scales: list[float]
    zeros: list[Any]
    outliers: Outliers | None
    values: Tensor | None


@dataclass(frozen=True, eq=False)
class ByteGrid:
    """The grid of one tensor or sample, as a pass over it needs it.

    Args:
        tensor: what `kernels.int8.quantize` takes, from `inverse` to `step`.
        channels: what `kernels.int8.quantize_channels` takes, where channels differ; then `tensor` is not used.
        scale: of the byte; one byte more is so much more in value.
        zero: the byte of value 0.
        keep: thresholds of Dense+Sparse.
        ends: of Dense+Sparse: (byte, value) of the smallest and the largest code.
    """

    tensor: tuple[Any, ...]
    channels: Floats | None
    scale: float
    zero: np.int32
    keep: tuple[np.float32, np.float32] = (np.float32(-np.inf), np.float32(np.inf))
    ends: tuple[tuple[np.int32, np.float32], tuple[np.int32, np.float32]] | None = None


def byte_grid(grid: Grid, *, folded: bool = False) -> ByteGrid | str:
    """A grid in bytes, or why no byte holds it.

    Channels of steps delta / 2^m share the grid of the smallest one (DQA): their codes are whole multiples there.

    Args:
        grid: of one sample or of all, its tensors () or (C,) after dropping dimensions of size 1.
        folded: the steps of channels are folded into a depthwise weight: each channel keeps its own codes.
    """

    def array(value: Any) -> Floats:
        value = value.detach().numpy() if isinstance(value, Tensor) else np.asarray(value)
        found: Floats = value.astype(np.float32).reshape(-1)
        return found

    step, low, high = array(grid.step), array(grid.low), array(grid.high)
    zero_point = np.float32(0) if grid.zero_point is None else array(grid.zero_point)
    shift = np.zeros(1, np.float32) if grid.bias is None else array(grid.bias)
    low, high = low - zero_point, high - zero_point
    if not all(np.isfinite(v).all() for v in (step, low, high, shift)):
        return "its grid is not finite"
    used = step[step > 0]
    smallest = used.min() if used.size else np.float32(1)
    factor = np.where(step > 0, step / smallest, np.float32(1)).astype(np.float32)
    if folded:
        factor = np.ones_like(factor)
    elif not (np.frexp(factor)[0] == 0.5).all():
        return "its channels have steps of their own (granularity='channel'), which fit no common grid"
    first, last = float((low * factor).min()), float((high * factor).max())
    if last - first > 255:
        return f"its codes on the common grid take {int(last - first).bit_length()} bits, a byte has 8"
    if not (low.max() <= 0 <= high.min()):
        return "its range excludes zero, which padding needs as a code"
    # as torch's own quantizers: unsigned codes begin at 0, signed ones at their zero point
    zero = np.int32(-first)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(step > 0, np.float32(1) / step, np.float32(0)).astype(np.float32)
    if not np.isfinite(inverse).all():
        return "its step is too small to invert"
    parts = (inverse, shift, low, high, step, factor)
    size = max(v.size for v in parts)
    scale = 1.0 if folded else float(smallest)
    if grid.keep is None:
        one = (inverse[0], shift[0], low[0], high[0], zero, step[0])
        channels = np.stack([np.broadcast_to(v, size) for v in parts]).astype(np.float32) if size > 1 else None
        return ByteGrid(one, channels, scale, zero)
    keep = (array(grid.keep[0]), array(grid.keep[1]))
    if max(size, *(v.size for v in keep)) > 1:
        return "each channel has thresholds of its own (granularity='channel')"
    if not used.size:  # an empty range: all but zero is kept, and has to saturate to be found
        if shift[0] != 0:
            return "its range is empty and holds no zero"
        inverse, scale = np.full(1, 1e30, np.float32), 0.0
    low_end, high_end = ((np.int32(code + zero), code * step[0]) for code in (low[0], high[0]))
    one = (inverse[0], shift[0], low[0], high[0], zero, step[0])
    return ByteGrid(one, None, scale, zero, (keep[0][0], keep[1][0]), (low_end, high_end))
