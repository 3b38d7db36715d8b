"""Smallest, largest and selected values of rows, in one pass over memory: what `ranges` makes extents of.

Requirements this file meets:

- Comparisons of integers, which vectorise, in place of those of floats: the key of a float is its bit pattern, the
  lower 31 bits flipped where it is negative. Keys are in the order of the values (-0 below 0, NaN beyond infinity).
- Order statistics are exact, without a sort: a sample of the row brackets the rank, one vectorised pass collects what
  lies in the bracket and counts what lies above, and selection goes on there. A bracket that missed becomes the whole
  row.
- A row is in the second-level cache when it is read again.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from .compiling import kernel
from .memory import compress_between
from .vectors import float_value

_u = np.uint64
_LEAST, _MOST = np.int32(-(2**31)), np.int32(2**31 - 1)
_SAMPLE = 128
_FEW = 256  # keys among which selection is faster than another bracket
_INFINITY = np.int32(0x7F800000)  # its bits and its key; ~ gives the key of -inf


@njit(inline="always")
def key(bits):  # type: ignore[no-untyped-def]
    """The key of a float32 with these bits, int32; its own inverse."""
    return np.int32(bits ^ ((bits >> np.int32(31)) & _MOST))


@kernel
def _ends(x, begin, end):  # type: ignore[no-untyped-def]
    """Smallest and largest key of x[begin:end]."""
    low, high = _MOST, _LEAST
    for i in range(_u(begin), _u(end)):
        k = key(x[i])
        low = k if k < low else low
        high = k if k > high else high
    return low, high


@njit(inline="always")
def _value(k):  # type: ignore[no-untyped-def]
    """The bits of the value with this key; 0, never -0."""
    return np.int32(0) if k == np.int32(-1) else key(k)


@kernel
def extremes(x, low, high, inner, free, count, along, first, last):  # type: ignore[no-untyped-def]
    """The smallest and the largest value of each group.

    Args:
        x: (N,) int32, the bits of float32 values, in rows as `fake_quantize.fake_quantize` has them.
        low, high: (M,) int32, written: bits of float32, meaningless where a value is NaN.
        first, last: the range of samples that is looked at.

    Returns:
        0, or 1 where a value is not finite, or 3 where one is NaN.
    """
    rows, groups = (free, inner) if along else (free * count, count)
    low[first * groups : last * groups] = _MOST
    high[first * groups : last * groups] = _LEAST
    for row in range(first * rows, last * rows):
        begin = row * inner
        if along:
            at = row // free * inner
            for i in range(inner):
                k = key(x[_u(begin + i)])
                low[_u(at + i)] = min(low[_u(at + i)], k)
                high[_u(at + i)] = max(high[_u(at + i)], k)
        else:
            at = row // rows * count + row % count
            least, most = _ends(x, begin, begin + inner)
            low[at], high[at] = min(low[at], least), max(high[at], most)
    least, most = _MOST, _LEAST
    for group in range(first * groups, last * groups):
        least, most = min(least, low[group]), max(most, high[group])
        low[group], high[group] = _value(low[group]), _value(high[group])
    if least < ~_INFINITY or most > _INFINITY:
        return 3
    return 1 if least == ~_INFINITY or most == _INFINITY else 0


@kernel
def _smallest(a, count, rank):  # type: ignore[no-untyped-def]
    """What sorting would put at a[rank], of keys a[:count], and how many keys are not larger.

    By bisection of the range: no branch depends on the keys, of which each step of quickselect mispredicts half.
    """
    least, most = a[0], a[0]
    for i in range(_u(count)):
        least, most = min(least, a[i]), max(most, a[i])
    low, high = np.int64(least), np.int64(most)
    within = count
    while low < high:
        middle = np.int32((low + high) >> 1)
        found = np.int32(0)
        for i in range(_u(count)):
            found = np.int32(found + np.int32(a[i] <= middle))
        enough = found > rank
        within = np.int64(found) if enough else within
        low, high = low if enough else np.int64(middle) + 1, np.int64(middle) if enough else high
    return np.int32(low), within


@kernel
def _collect(x, begin, size, mask, low, high, out):  # type: ignore[no-untyped-def]
    """Keys in [low, high) of the row into out; how many, and how many are >= high."""
    found, above = 0, 0
    blocks = size // 16
    for block in range(blocks):
        counts = compress_between(x, begin + 16 * block, mask, low, high, out, found)
        found += counts >> 16
        above += counts & 0xFFFF
    for i in range(begin + 16 * blocks, begin + size):
        k = key(x[i] & mask)
        if k >= high:
            above += 1
        elif k >= low:
            out[found] = np.int32(x[i] & mask)
            found += 1
    return found, above


@kernel
def _above(x, begin, size, mask, bound):  # type: ignore[no-untyped-def]
    """The smallest key of the row beyond a key."""
    least = _MOST
    for i in range(_u(begin), _u(begin + size)):
        k = key(x[i] & mask)
        least = k if k > bound and k < least else least
    return least


@kernel
def _bracket(x, begin, size, mask, rank, alike, sample):  # type: ignore[no-untyped-def]
    """Keys low < high that probably have the rank between them: order statistics of a sample.

    Args:
        alike: many values are: then one value and the next.
    """
    stride = size // _SAMPLE
    for i in range(_SAMPLE):  # one value of each stretch, at changing places: images have periods
        sample[i] = key(x[begin + i * stride + ((i * 40503 & 0xFFFF) * stride >> 16)] & mask)
    share = (rank + 0.5) / size
    spread = 3.5 * math.sqrt(share * (1 - share) * _SAMPLE) + 2
    lowest, highest = int(share * _SAMPLE - spread), int(share * _SAMPLE + spread)
    low, high = _LEAST, _MOST
    if lowest >= 0 or alike:
        low, _ = _smallest(sample, _SAMPLE, max(lowest, 0))
    if alike:
        high = low
    elif highest < _SAMPLE:
        high, _ = _smallest(sample, _SAMPLE, highest)
    return low, max(high, np.int32(low + 1))


@kernel
def _select(x, begin, size, mask, rank, sample, room, out):  # type: ignore[no-untyped-def]
    """The keys of ranks `rank` and `rank` + 1 (ascending, from 0) of a row, into out.

    What is left of the row goes from one half of `room`, (2, size + 16), to the other.
    """
    source, start, left, bits, offset, turn = x, begin, size, mask, 0, 0
    poor = same = False
    while left > _FEW and not same:
        low, high = _bracket(source, start, left, bits, rank - offset, poor, sample)
        found, above = _collect(source, start, left, bits, low, high, room[turn])
        below = left - found - above
        if rank - offset < below:
            found, above = _collect(source, start, left, bits, _LEAST, low, room[turn])
        elif rank - offset >= below + found:
            offset += below + found
            found, above = _collect(source, start, left, bits, high, _MOST, room[turn])
        else:
            offset += below
            same = high == low + 1
        poor = found > left // 2
        source, start, left, bits, turn = room[turn], 0, found, np.int32(-1), 1 - turn
    following = min(rank + 1, size - 1)
    inside = following - offset < left
    if same:
        out[:] = low
    else:
        if left == size:
            left, _ = _collect(x, begin, size, mask, _LEAST, _MOST, room[0])
            source = room[0]
        for i in range(left):
            source[i] = key(source[i])
        out[0], within = _smallest(source, left, rank - offset)
        out[1] = out[0] if within > following - offset else _MOST
        if inside and out[1] == _MOST:
            for i in range(_u(left)):
                k = source[i]
                out[1] = k if k > out[0] and k < out[1] else out[1]
    if not inside:
        out[1] = _above(x, begin, size, mask, out[0])


@kernel
def select(x, size, mask, ranks, shares, kinds, out, first, last):  # type: ignore[no-untyped-def]
    """Quantiles of rows: the order statistic at a rank, and a share of the way to the next one.

    Args:
        x: (N,) int32, the bits of float32 values: rows of `size` values side by side.
        mask: int32, laid over the bits: 0x7fffffff for magnitudes, -1 for the values.
        ranks: (R,) int64, ascending from 0; shares: (R,) float32, in [0, 1).
        kinds: (R,) int64; 1: negative values count as 0; -1: the result is negated; 0: neither.
        out: (rows, R) float32, written.
        first, last: the range of rows.

    Returns:
        whether a value is NaN: then `out` is meaningless.
    """
    room, sample, found = np.empty((2, size + 16), np.int32), np.empty(_SAMPLE, np.int32), np.empty(2, np.int32)
    for row in range(first, last):
        least, most = _ends(x, row * size, (row + 1) * size)
        if least < ~_INFINITY or most > _INFINITY:
            return True
        for r in range(ranks.size):
            if ranks[r] == size - 1:  # magnitudes are their own keys
                found[:] = most if mask == -1 else max(key(most) & mask, key(least) & mask)
            else:
                _select(x, row * size, size, mask, ranks[r], sample, room, found)
            if kinds[r] == 1:
                found[0], found[1] = max(found[0], np.int32(0)), max(found[1], np.int32(0))
            value = np.float32(float_value(_value(found[0])))
            value += (float_value(_value(found[1])) - value) * shares[r]
            out[row, r] = -value if kinds[r] == -1 else value
    return False
