"""The arithmetic of a Grid in one pass over memory: what `Grid.fake_quantize` computes, bit for bit.

Requirements this file meets:

- Loops over contiguous memory that vectorise: constant parameters where a channel's values lie side by side, vectors
  of parameters where its channels do (channels_last, tokens).
- Division stays division: x * (1 / step) rounds to the other side at ties.
- NaN passes through: the clamps are comparisons that it fails.
- nogil and no thread pool of its own: callers run ranges of values in as many threads as they like.
"""

from __future__ import annotations

import numpy as np

from .compiling import kernel

# rows of a table of parameters, (ROWS, M) float32
STEP, DIVISOR, LOW, HIGH, ZERO_POINT, BIAS, LOWER, UPPER = range(8)
ROWS = 8

_u = np.uint64


@kernel(error_model="numpy")
def _alike(x, out, begin, end, p, full):  # type: ignore[no-untyped-def]
    """out[begin:end] of x[begin:end], which share the parameters p, (ROWS,)."""
    step, divisor, low, high = p[STEP], p[DIVISOR], p[LOW], p[HIGH]
    zero, bias, lower, upper = p[ZERO_POINT], p[BIAS], p[LOWER], p[UPPER]
    if full:
        for i in range(_u(begin), _u(end)):
            v = x[i]
            q = np.rint((v + bias) / divisor) + zero
            q = low if q < low else q
            q = high if q > high else q
            r = (q - zero) * step - bias
            r = v if v < lower else r
            out[i] = v if v > upper else r
    else:
        for i in range(_u(begin), _u(end)):
            q = np.rint(x[i] / divisor)
            q = low if q < low else q
            q = high if q > high else q
            out[i] = q * step


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
    """out[begin:end] = the quantized values of x[begin:end].

    Memory is rows of `inner` values. If not `along`, row r has the parameters (r // (free * count)) * count + r % count
    of the table; else its values have those from (r // free) * inner on, one each.

    Args:
        x: (N,) float32 in the order of memory.
        out: (N,) float32, written; another array than x.
        table: (ROWS, M) float32.
        full: whether zero point, bias or the kept range are used.
    """
    period = free * count
    while begin < end:
        row = begin // inner
        stop = min((row + 1) * inner, end)
        if along:
            at = row // free * inner + begin - row * inner
            _each(x, out, begin, stop - begin, table, at, full)
        else:
            _alike(x, out, begin, stop, table[:, row // period * count + row % count], full)
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
