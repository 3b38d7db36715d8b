"""Grids of dynamic and predicted quantizers, one for each sample, as the pass over it needs them.

In torch a grid is made of some twenty operations on tensors of one element, which take as long as a small layer. Here
the same float32 arithmetic runs on numbers. Whether it is the same is tried on many statistics, bit for bit: a method
that makes its grid in another way keeps the torch operations.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dqa_plugins.grid import Grid
from dqa_plugins.quantizer import ActivationQuantizer
from dqa_plugins.ranges import extents, qparams_of, valid

from .codes import ByteGrid, Floats, byte_grid

_HALF, _ONE, _ZERO = np.float32(0.5), np.float32(1), np.float32(0)
_TINY, _SHARE = np.float32(1e-30), np.float32(1e-6)


def samples(grid: Grid, batch: int) -> list[Grid]:
    """The grid of each sample."""

    def one(b: int) -> Grid:
        return grid.map(lambda p: p[b] if p.ndim and p.shape[0] == batch else p)

    return [one(b) for b in range(batch)]


def range_plan(lower: np.float32, upper: np.float32, top: np.float32, keep: bool) -> ByteGrid | str:
    """`byte_grid` of `Grid.affine`."""
    step = max(upper * _HALF - lower * _HALF, _ZERO) / (top * _HALF)
    if not np.isfinite(step) or (step > 0 and not np.isfinite(_ONE / step)):
        return "its grid is not finite"
    zero = np.rint(-lower / step) if step > 0 else _ZERO
    if not 0 <= zero <= top:
        return "its range excludes zero, which padding needs as a code"
    if step == 0 and (lower != 0 or not keep):
        return "its range is empty"
    inverse, byte = _ONE / step if step > 0 else np.float32(1e30), np.int32(zero)
    one = (inverse, _ZERO, -zero, top - zero, byte, step)
    if not keep:
        return ByteGrid(one, None, float(step), byte)
    ends = ((np.int32(0), -zero * step), (np.int32(top), (top - zero) * step))
    return ByteGrid(one, None, float(step), byte, (lower, upper), ends)


def scale_plan(unit: ByteGrid, scale: np.float32) -> ByteGrid | str:
    """The grid of a scale from that of scale 1, as `Grid.scaled`."""
    _, shift, low, high, zero, step = unit.tensor
    step = step * scale
    if not 0 <= step < np.inf or (step > 0 and not np.isfinite(_ONE / step)):
        return "its grid is not finite"
    channels = unit.channels
    if channels is not None:
        channels = channels.copy()
        channels[4] *= scale
        with np.errstate(divide="ignore", over="ignore"):
            channels[0] = np.where(channels[4] > 0, _ONE / channels[4], _ZERO)
        channels[1] *= scale
    one = (_ONE / step if step > 0 else _ZERO, shift * scale, low, high, zero, step)
    return replace(unit, tensor=one, channels=channels, scale=float(np.float32(unit.scale) * scale))


class SampleGrids:
    """Makes the grids of a quantizer with one dynamic or predicted scale, or range, for each sample.

    Args:
        quantizer: frozen, granularity "tensor".
    """

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        self.quantizer = quantizer
        method, self.predicted = quantizer.method, quantizer.predictor is not None
        self.wanted = method.statistic(quantizer.signed)
        self.steps = np.float32(method.steps(quantizer.signed))
        self.unit = None if method.uses_range else byte_grid(quantizer.unit_grid)
        self.top = np.float32(2**method.bits - 1)
        self.keep = method.uses_range and self._in_torch(np.ones((1, len(self.wanted)), np.float32))[0].keep is not None
        self.quick = self._alike()

    def _alike(self) -> bool:
        """Whether `_quick` gives what torch gives."""
        random = np.random.default_rng(0)
        tried = (random.standard_normal((256, len(self.wanted))) * random.exponential(1, (256, 1))).astype(np.float32)
        tried[:128] = np.abs(tried[:128])
        if self.unit is not None:
            tried = np.abs(tried)
        for column, extent in enumerate(self.wanted):
            if extent.of == "zero":
                tried[:, column] = 0
        for row, grid in zip(tried, self._in_torch(tried), strict=True):
            ours, theirs = self._quick(row), byte_grid(grid)
            if isinstance(ours, str) or isinstance(theirs, str):
                if isinstance(ours, str) and isinstance(theirs, str):
                    continue
                return False
            same = (ours.scale, ours.keep, ours.ends) == (theirs.scale, theirs.keep, theirs.ends)
            if ours.channels is None:
                same = same and theirs.channels is None and ours.tensor == theirs.tensor
            else:
                same = same and theirs.channels is not None and np.array_equal(ours.channels, theirs.channels)
            if not same:
                return False
        return True

    def _in_torch(self, statistic: Floats) -> list[Grid]:
        """The grids of (B, S) statistics, by the method."""
        quantizer, method = self.quantizer, self.quantizer.method
        found = torch.from_numpy(statistic).unsqueeze(2).unbind(1)
        qparams = qparams_of(method, found, quantizer.signed, quantizer.clip_factor)
        if self.predicted:
            qparams = valid(qparams)
        if qparams.scale is None:
            grid = method.grid(qparams, quantizer.signed, quantizer.vectors)
        else:
            grid = quantizer.unit_grid.scaled(qparams.scale)
        return samples(grid, len(statistic))

    def _quick(self, statistic: Floats) -> ByteGrid | str:
        """The grid of one sample, (S,)."""
        if self.unit is not None:
            scale = statistic[0] / self.steps
            return (
                self.unit
                if isinstance(self.unit, str)
                else scale_plan(self.unit, max(scale, _TINY) if self.predicted else scale)
            )
        lower, upper = (_ZERO, statistic[0]) if len(statistic) == 1 else (-statistic[0], statistic[1])
        if self.predicted:
            upper = max(upper, lower + abs(lower) * _SHARE + _TINY)
        return range_plan(lower, upper, self.top, self.keep)

    def __call__(
        self, x: Tensor, other: Tensor | None, floor: np.float32, prediction: Tensor | None = None
    ) -> list[ByteGrid | str]:
        """The grids of max(x + other, floor).

        Args:
            x, other: (B, ...) float32, in one memory format without gaps.
            prediction: (B, S, 1), where qparams are predicted.
        """
        method = self.quantizer.method
        if prediction is not None:
            statistic = prediction.squeeze(2).numpy()
        elif all(extent.level == 1 or extent.of == "zero" for extent in self.wanted):
            statistic = self._extremes(x, other, floor)
        else:
            y = x if other is None else x + other
            y = y.clamp(min=float(floor)) if np.isfinite(floor) else y
            statistic = torch.cat(extents(y, method, self.quantizer.signed, 1), 1).numpy()
        if method.scope == "batch":
            statistic = np.broadcast_to(statistic.max(0), statistic.shape)
        if self.quick:
            return [self._quick(row) for row in statistic]
        return [byte_grid(grid) for grid in self._in_torch(np.ascontiguousarray(statistic))]

    def _extremes(self, x: Tensor, other: Tensor | None, floor: np.float32) -> Floats:
        """The extents of level 1 of each sample, (B, S)."""
        from dqa_plugins.kernels.int8 import extremes

        size = x.numel() // len(x)
        first, second = x.data_ptr(), 0 if other is None else other.data_ptr()
        rows = []
        for b in range(len(x)):
            least, most = extremes(first + 4 * b * size, second and second + 4 * b * size, floor, size)
            ends = {"magnitude": max(-least, most), "positive": max(most, 0.0), "upper": most, "lower": -least}
            rows.append([ends.get(extent.of, 0.0) for extent in self.wanted])
        return np.array(rows, np.float32)
