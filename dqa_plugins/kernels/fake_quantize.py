"""The arithmetic of a Grid in one pass over memory: what `Grid.fake_quantize` computes, bit for bit.

Requirements this file meets:

- Vectors over contiguous memory: constant parameters where a channel's values lie side by side, be they nine, vectors
  of parameters where its channels do (channels_last, tokens).
- Division stays division: x * (1 / step) rounds to the other side at ties.
- NaN passes through: the clamps are comparisons that it fails.
- nogil and no thread pool of its own: callers run ranges of values in as many threads as they like.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from .compiling import kernel
from .vectors import LANES, quantize_full, quantize_plain, values_at

# rows of a table of parameters, (ROWS, M) float32
STEP, DIVISOR, LOW, HIGH, ZERO_POINT, BIAS, LOWER, UPPER = range(8)
ROWS = 8

_u = np.uint64


@njit(error_model="numpy", inline="always")
def _one(v, step, divisor, low, high, zero, bias, lower, upper, full):  # type: ignore[no-untyped-def]
    """The quantized value of v."""
    q = np.rint((v + bias) / divisor) + zero if full else np.rint(v / divisor)
    q = low if q < low else q
    q = high if q > high else q
    r = (q - zero) * step - bias if full else q * step
    return v if full and (v < lower or v > upper) else r


@kernel(error_model="numpy")
def _alike(x, out, begin, end, inner, free, count, table, full):  # type: ignore[no-untyped-def]
    """out[begin:end] of x[begin:end], in rows that share their parameters; arguments as `fake_quantize`."""
    period = free * count
    row = begin // inner
    at, c, left = row // period * count + row % count, row % count, period - row % period
    while begin < end:
        step, divisor, low, high = table[STEP, at], table[DIVISOR, at], table[LOW, at], table[HIGH, at]
        zero, bias, lower, upper = table[ZERO_POINT, at], table[BIAS, at], table[LOWER, at], table[UPPER, at]
        row += 1
        stop = min(row * inner, end)
        # the last vector of a row reaches into the next ones, whose values are written again
        last = min(stop, end - LANES + 1)
        while begin < last:
            if full:
                quantize_full(x, out, begin, step, divisor, low, high, zero, bias, lower, upper)
            else:
                quantize_plain(x, out, begin, step, divisor, low, high, zero, bias, lower, upper)
            begin += LANES
        for i in range(begin, stop):
            out[i] = _one(x[i], step, divisor, low, high, zero, bias, lower, upper, full)
        begin, c, left = stop, c + 1, left - 1
        if c < count:
            at += 1
        else:
            at, c = at + 1 - count, 0
        if left == 0:
            at, left = at + count, period


@kernel(error_model="numpy")
def _each(x, out, begin, size, table, at, full):  # type: ignore[no-untyped-def]
    """out[begin : begin + size] of x there; value i has the parameters table[:, at + i]."""
    x, out = x[begin : begin + size], out[begin : begin + size]
    step, divisor = table[STEP, at : at + size], table[DIVISOR, at : at + size]
    low, high = table[LOW, at : at + size], table[HIGH, at : at + size]
    zero, bias = table[ZERO_POINT, at : at + size], table[BIAS, at : at + size]
    lower, upper = table[LOWER, at : at + size], table[UPPER, at : at + size]
    if full:
        # two loops: in one there would be more arrays than LLVM compares before it vectorises
        for i in range(size):
            q = np.rint((x[i] + bias[i]) / divisor[i]) + zero[i]
            q = low[i] if q < low[i] else q
            out[i] = high[i] if q > high[i] else q
        for i in range(size):
            r = (out[i] - zero[i]) * step[i] - bias[i]
            r = x[i] if x[i] < lower[i] else r
            out[i] = x[i] if x[i] > upper[i] else r
    else:
        for i in range(size):
            q = np.rint(x[i] / divisor[i])
            q = low[i] if q < low[i] else q
            q = high[i] if q > high[i] else q
            out[i] = q * step[i]


@kernel(error_model="numpy")
def fake_quantize(x, out, table, inner, free, count, along, full, begin, end):  # type: ignore[no-untyped-def]
    """Values begin to end of `out` = the quantized ones of x.

    Memory is rows of `inner` values. If not `along`, row r has the parameters (r // (free * count)) * count + r % count
    of the table; else its values have those from (r // free) * inner on, one each.

    Args:
        x: address of float32 values in the order of memory.
        out: address of as many, written; other memory than that of x.
        table: (ROWS, M) float32.
        full: whether zero point, bias or the kept range are used.
    """
    x, out = carray(values_at(x, np.float32), end), carray(values_at(out, np.float32), end)
    if not along:
        _alike(x, out, begin, end, inner, free, count, table, full)
        return
    while begin < end:
        row = begin // inner
        stop = min((row + 1) * inner, end)
        _each(x, out, begin, stop - begin, table, row // free * inner + begin - row * inner, full)
        begin = stop


@kernel(error_model="numpy")
def inside(x, out, table, inner, free, count, along, begin, end):  # type: ignore[no-untyped-def]
    """out[begin:end] = whether the clamp leaves the code alone, bool; arguments as `fake_quantize`."""
    period = free * count
    for i in range(begin, end):
        row = i // inner
        p = row // free * inner + i - row * inner if along else row // period * count + row % count
        q = np.rint((x[i] + table[BIAS, p]) / table[DIVISOR, p]) + table[ZERO_POINT, p]
        out[i] = q >= table[LOW, p] and q <= table[HIGH, p]
