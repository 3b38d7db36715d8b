"""Tensors to kernels: which tensors kernels serve, how their memory is laid out, and what goes in and out.

Kernels serve eager mode on CPUs. Whoever traces, exports, compiles, differentiates forward or transforms (functorch)
finds plain aten operations, and so do tensor subclasses and other devices.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import operator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import forward_ad

from ..rounding import StraightThrough, narrow, wants_gradient
from .threads import PARTS, share, torch_threads

PARALLEL = 2**18  # values below which one thread is used
_BLOCK = 4096  # values; threads change places at multiples of it
_PLAIN = (Tensor, torch.nn.Parameter)
_NARROW = (torch.float16, torch.bfloat16)

Array = NDArray[Any]


def usable(x: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32, *_NARROW)) -> bool:
    """True where kernels may take the place of aten operations on x, a tensor of these dtypes, in eager mode."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in _PLAIN
        and x.is_cpu
        and x.dtype in dtypes
        and x.layout is torch.strided
        and x.numel() > 0
        and not x.is_neg()
        and not torch.jit.is_tracing()
        and forward_ad._current_level < 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._len_torch_dispatch_stack() == 0
    )


class Rows(NamedTuple):
    """Memory as rows of `inner` values: samples * free * channels of them, or samples * free where `along`.

    A group is a channel of a sample; where `along`, that is a position in the rows of a sample.
    """

    inner: int
    free: int
    channels: int
    along: bool
    samples: int


@lru_cache(None)
def _kernel(module: str, name: str = "") -> Any:
    """A kernel, imported when it is first used: of the module's name, or another one."""
    return getattr(importlib.import_module(f".{module}", __package__), name or module)


@lru_cache(4096)
def _rows(shape: tuple[int, ...], stride: tuple[int, ...], by_sample: bool, axis: int | None) -> Rows | None:
    """The rows of a tensor whose groups differ by sample, by channel; None: its memory is in no such order."""
    order = sorted((d for d in range(len(shape)) if shape[d] > 1), key=lambda d: -stride[d])
    expected = 1
    for d in reversed(order):
        if stride[d] != expected:
            return None
        expected *= shape[d]
    kinds = ["s" if by_sample and d == 0 else "c" if d == axis else "f" for d in order]
    sizes: list[tuple[str, int]] = []
    for kind, d in zip(kinds, order, strict=True):
        if kind == "f" and sizes and sizes[-1][0] == "f":
            sizes[-1] = ("f", sizes[-1][1] * shape[d])
        else:
            sizes.append((kind, shape[d]))
    pattern = "".join(kind for kind, _ in sizes)
    found = dict(zip(pattern, (size for _, size in sizes), strict=True))
    samples, count = found.get("s", 1), found.get("c", 1)
    if pattern in ("c", "fc", "sc", "sfc"):
        return Rows(count, found.get("f", 1), 1, True, samples)
    if "c" not in pattern:
        return Rows(found.get("f", 1), 1, 1, False, samples) if pattern in ("", "f", "s", "sf") else None
    if pattern not in ("cf", "fcf", "scf", "sfcf"):
        return None
    inner = sizes[-1][1]
    return Rows(inner, expected // (inner * count * samples), count, False, samples)


def _dense(x: Tensor, by_sample: bool, axis: int | None) -> tuple[Tensor, Rows]:
    """x in float32 and its rows; a copy where its memory is in no order that they have."""
    y = x.detach()
    y = y if y.dtype is torch.float32 else y.float()
    rows = _rows(y.shape, y.stride(), by_sample, axis)
    if rows is None:
        y = y.contiguous()
        rows = _rows(y.shape, y.stride(), by_sample, axis)
    if rows is None:
        raise AssertionError(f"contiguous memory has rows: {tuple(x.shape)}, axis {axis}")
    return y, rows


def flat(x: Tensor) -> Array:
    """The values of a tensor without gaps, in the order of its memory."""
    found: Array = x.as_strided((x.numel(),), (1,)).numpy()
    return found


def _ranges(total: int, size: int) -> list[tuple[int, int]]:
    """Cuts 0 .. total, in units of `size` values each, for the threads of a pass."""
    threads = torch_threads()
    if threads == 1:
        return [(0, total)]
    step = max(1, _BLOCK // size)
    parts = min(PARTS * threads, -(-total // step))
    edges = [min(total, -(-total * i // (parts * step)) * step) for i in range(parts + 1)]
    return [(first, last) for first, last in itertools.pairwise(edges) if first < last]


def _run(kernel: Any, arguments: tuple[Any, ...], total: int, size: int = 1) -> list[Any]:
    """kernel(*arguments, first, last) over 0 .. total, in as many threads as torch uses; what it returned."""
    if total * size < PARALLEL:
        return [kernel(*arguments, 0, total)]
    ranges = _ranges(total, size)
    return share(lambda i: kernel(*arguments, *ranges[i]), len(ranges), torch_threads())


# ---------------------------------------------------------------- fake quantization


class Table:
    """The parameters of a Grid, as the kernel reads them.

    Args:
        values: (8, B or 1, C or 1) float32, see `kernels.fake_quantize`.
        axis: of the C channels in the tensor, not negative.
        full: whether zero point, bias or the kept range are used.
        keeps: whether the kept range is.
    """

    def __init__(self, values: Array, axis: int, full: bool, keeps: bool) -> None:
        self.values, self.axis, self.full, self.keeps = values, axis, full, keeps
        self._tiled: dict[int, Array] = {1: values.reshape(len(values), -1)}

    def lay_out(self, rows: Rows) -> tuple[Array, Rows]:
        """(8, M) values and the rows that they serve; short rows of channels are joined to longer ones."""
        turns = 1
        while rows.along and rows.free % (2 * turns) == 0 and rows.inner * turns < 512:
            turns *= 2
        if turns not in self._tiled:
            shape = (*self.values.shape[:2], turns, rows.inner)
            self._tiled[turns] = np.broadcast_to(self.values[:, :, None], shape).reshape(len(self.values), -1)
        return self._tiled[turns], rows._replace(
            inner=rows.inner * turns, free=rows.free // turns if turns > 1 else rows.free
        )


def table_of(x: Tensor, parameters: tuple[Tensor | float | None, ...]) -> Table | None:
    """The table of a Grid.

    Args:
        x: the tensor that it quantizes.
        parameters: step, divisor, low, high, zero point, bias, a and b, that broadcast against x; None: not used.

    Returns:
        None where a parameter is not float32, or differs along other axes than the batch and one more.
    """
    shape, axes = x.shape, set[int]()
    found: list[Any] = []
    for p in parameters:
        if isinstance(p, Tensor):
            if p.dtype is not torch.float32 or not p.is_cpu or p.ndim > x.ndim:
                return None
            sizes = (1,) * (x.ndim - p.ndim) + tuple(p.shape)
            differing = [d for d, size in enumerate(sizes) if size != 1]
            if any(sizes[d] != shape[d] for d in differing):
                return None
            axes.update(d for d in differing if d > 0)
            found.append(p.detach().numpy().reshape(sizes[0] if sizes else 1, -1))
        else:
            found.append(p)
    if len(axes) > 1:
        return None
    step, divisor, low, high, zero, bias, lower, upper = found
    outer = max([a.shape[0] for a in found if isinstance(a, np.ndarray)])
    count = max([a.shape[1] for a in found if isinstance(a, np.ndarray)])
    values = np.empty((8, outer, count), np.float32)
    values[0], values[2], values[3] = step, low, high
    values[1] = np.where(values[0] > 0, values[0], np.float32(math.inf)) if divisor is None else divisor
    values[4], values[5] = 0 if zero is None else zero, 0 if bias is None else bias
    values[6], values[7] = (-math.inf, math.inf) if lower is None else (lower, upper)
    keeps = lower is not None
    return Table(values, axes.pop() if axes else 0, keeps or zero is not None or bias is not None, keeps)


def derive(unit: Table, axis: int, extents: Tensor, steps: float, *, ranged: bool, predicted: bool) -> Table:
    """The table of samples with these extents, as `ranges.qparams_of` and `Method.grid` have it.

    Args:
        unit: the Grid of scale 1; where `ranged`, a Grid of any range.
        axis: of the C channels, not negative.
        extents: (B, S, G) float32, see `tables.derive` for the rest.
    """
    known = np.ascontiguousarray(extents.detach().numpy())
    out = np.empty((len(unit.values), len(known), max(known.shape[2], unit.values.shape[2])), np.float32)
    _kernel("tables", "derive")(unit.values, known, np.float32(steps), ranged, unit.keeps, predicted, out)
    return Table(out, axis, unit.full, unit.keeps)


def fake_quantize(x: Tensor, table: Table) -> Tensor:
    """What `Grid.fake_quantize` gives: the quantized values of x in its dtype, with a straight-through gradient."""
    values = _pass(x, table)
    x_hat = narrow(values, x.dtype)
    if table.keeps and x.dtype in _NARROW:  # narrowing made them finite
        x_hat = torch.where(x.detach().isinf() & values.isinf(), x.detach(), x_hat)
    if not wants_gradient(x):
        return x_hat
    straight = torch.ones_like(x_hat, dtype=torch.bool) if table.keeps else _inside(x, table)
    result: Tensor = StraightThrough.apply(x, x_hat, straight)
    return result


def _pass(x: Tensor, table: Table) -> Tensor:
    """The quantized values of x, float32, without gradient; their memory in the order of that of x."""
    _, samples, channels = table.values.shape
    y, rows = _dense(x, samples > 1, table.axis if channels > 1 else None)
    out = torch.empty_like(y)
    values, rows = table.lay_out(rows)
    # addresses: two arrays made of tensors take as long as a small layer
    _run(_kernel("fake_quantize"), (y.data_ptr(), out.data_ptr(), values, *rows[:4], table.full), y.numel())
    return out if out.stride() == x.stride() else torch.empty_like(x, dtype=y.dtype).copy_(out)


def _inside(x: Tensor, table: Table) -> Tensor:
    """bool, the shape of x: where the clamp leaves the code alone."""
    _, samples, channels = table.values.shape
    y, rows = _dense(x, samples > 1, table.axis if channels > 1 else None)
    out = torch.empty_like(y, dtype=torch.bool)
    values, rows = table.lay_out(rows)
    _run(_kernel("fake_quantize", "inside"), (flat(y), flat(out), values, *rows[:4]), y.numel())
    return out


# ---------------------------------------------------------------- statistics


class Extremes(NamedTuple):
    """Smallest and largest value of each group, (B, G) float32; whether all values are finite, whether one is NaN."""

    low: Tensor
    high: Tensor
    finite: bool
    nan: bool


def extremes(x: Tensor, axis: int | None) -> Extremes:
    """Of each sample of x, (B, ...), or of each channel along `axis` of each sample, in one pass.

    Args:
        x: as `usable`; a NaN makes `low` and `high` meaningless.
        axis: not negative; None: a group is a sample.
    """
    y, rows = _dense(x, True, axis)
    ends = np.empty((2, x.shape[0] * (1 if axis is None else x.shape[axis])), np.int32)
    arguments = (flat(y).view(np.int32), ends[0], ends[1], *rows[:4])
    flags = functools.reduce(
        operator.or_, _run(_kernel("observe", "extremes"), arguments, rows.samples, y.numel() // rows.samples)
    )
    low, high = torch.from_numpy(ends.view(np.float32).reshape(2, x.shape[0], -1)).unbind(0)
    return Extremes(low, high, flags == 0, flags > 1)


@lru_cache(4096)
def _positions(wanted: tuple[tuple[str, float], ...], size: int) -> tuple[np.int32, Array, Array, Array]:
    """What `observe.select` takes: mask, ranks, shares and kinds."""
    places = [min(max(level, 0.0), 1.0) * (size - 1) for _, level in wanted]
    ranks = [math.floor(place) for place in places]
    kinds = [{"positive": 1, "lower": -1}.get(of, 0) for of, _ in wanted]
    shares = np.array([place - rank for place, rank in zip(places, ranks, strict=True)], np.float32)
    mask = np.int32(0x7FFFFFFF if wanted[0][0] == "magnitude" else -1)
    return mask, np.array(ranks, np.int64), shares, np.array(kinds, np.int64)


def order_statistics(rows: Tensor, wanted: tuple[tuple[str, float], ...]) -> Tensor | None:
    """Exact quantiles by linear interpolation, without a sort.

    Args:
        rows: (R, N) float32; a row has no gaps, or is copied.
        wanted: extents (of, level), see `method.Extent`: all of magnitudes, or none.

    Returns:
        (R, wanted) float32; None: a value is NaN.
    """
    rows = rows.detach().contiguous()
    count, size = rows.shape
    found = np.empty((count, len(wanted)), np.float32)
    nan = _run(
        _kernel("observe", "select"), (flat(rows).view(np.int32), size, *_positions(wanted, size), found), count, size
    )
    return None if any(nan) else torch.from_numpy(found)


def sums(x: Tensor, axis: int | None, lower: Tensor, upper: Tensor) -> Tensor:
    """Of each channel along `axis` of each sample of x, (B, ...); None: of each sample. In one pass.

    Args:
        lower, upper: (B, G) float32, G = 1 or the channels: the range that values are counted outside of.

    Returns:
        (B, C or 1, 4) float64: sum, sum of magnitudes, sum of squares, number of values outside.
    """
    y, rows = _dense(x, True, axis)
    found = np.empty((x.shape[0], 1 if axis is None else x.shape[axis], 4))
    ends = (np.ascontiguousarray(end.detach().numpy()) for end in (lower, upper))
    _run(_kernel("predict", "sums"), (flat(y), *ends, found, *rows[:4]), rows.samples, y.numel() // rows.samples)
    return torch.from_numpy(found)


def by_group(x: Tensor, axis: int | None) -> Tensor:
    """x, (B, ...), as (B * G, N) float32: the values of each group, in any order; a view where memory allows."""
    y, rows = _dense(x, True, axis)
    if axis is None:
        return y.as_strided((rows.samples, rows.inner), (rows.inner, 1))
    if rows.along or rows.free > 1:
        return y.movedim(axis, 1).flatten(2).flatten(0, 1) if x.ndim > 2 else y.reshape(-1, 1)
    return y.as_strided((y.numel() // rows.inner, rows.inner), (rows.inner, 1))
