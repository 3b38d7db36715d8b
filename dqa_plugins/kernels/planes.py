"""Fixed-width bit packing in byte planes: the layout of every part of a code that is not entropy coded.

S bytes hold one plane; `width` planes hold 8 S values: value i lies in column i % S and row i // S, and a column's
eight values of `width` bits fill its `width` bytes, row 0 lowest (docs/storage_format.md, "Packed part"). All columns
do the same shifts, so eight of them are done at once in a 64-bit word, and the loops vectorise.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .compiling import kernel
from .memory import load64, store64

_u = np.uint64
_ONES = np.uint64(0x0101010101010101)


@njit(inline="always")
def _every(byte):  # type: ignore[no-untyped-def]
    """A word with this value in each byte."""
    return _ONES * _u(byte)


@kernel
def part_of(low, high, wide, shift, bits, count, out):  # type: ignore[no-untyped-def]
    """out = (q >> shift) & (2^bits - 1), uint8, bits <= 8.

    Args:
        low, high: uint8, the bytes of q; high is used if `wide`.
        count: values; up to 8 more are written.
    """
    keep = _every(((1 << bits) - 1) & 255)
    if shift < 8:
        right = _u(shift)
        own = _every(255 >> shift) & keep
        for i in range(0, count, 8):
            store64(out, i, (load64(low, i) >> right) & own)
        if wide and shift + bits > 8:
            left = _u(8 - shift)
            rest = _every((255 << (8 - shift)) & 255) & keep
            for i in range(0, count, 8):
                store64(out, i, load64(out, i) | ((load64(high, i) << left) & rest))
    else:
        right = _u(shift - 8)
        own = _every(255 >> (shift - 8)) & keep
        for i in range(0, count, 8):
            store64(out, i, (load64(high, i) >> right) & own)


@kernel
def merge_part(part, shift, count, low, high, wide):  # type: ignore[no-untyped-def]
    """q |= part << shift, for the bytes low and high of q (high is used if `wide`); up to 8 values more."""
    if shift < 8:
        left = _u(shift)
        own = _every((255 << shift) & 255)
        for i in range(0, count, 8):
            store64(low, i, load64(low, i) | ((load64(part, i) << left) & own))
        if wide and shift > 0:
            right = _u(8 - shift)
            rest = _every(255 >> (8 - shift))
            for i in range(0, count, 8):
                store64(high, i, load64(high, i) | ((load64(part, i) >> right) & rest))
    else:
        left = _u(shift - 8)
        own = _every((255 << (shift - 8)) & 255)
        for i in range(0, count, 8):
            store64(high, i, load64(high, i) | ((load64(part, i) << left) & own))


@kernel
def pack_planes(values, width, columns, out, position):  # type: ignore[no-untyped-def]
    """Pack 8 * columns uint8 values below 2^width into width * columns bytes; returns the next position."""
    words = columns // 8 * 8
    for byte in range(width):
        target = position + byte * columns
        row = (8 * byte) // width  # the row that this byte starts in
        start = 8 * byte - row * width
        source = row * columns
        right = _u(start)
        keep = _every((255 >> start) & 255)
        for i in range(0, words, 8):
            store64(out, target + i, (load64(values, source + i) >> right) & keep)
        for i in range(words, columns):
            out[target + i] = values[source + i] >> start
        filled = width - start
        while filled < 8:
            row += 1
            source = row * columns
            left = _u(filled)
            keep = _every((255 << filled) & 255)
            for i in range(0, words, 8):
                more = (load64(values, source + i) << left) & keep
                store64(out, target + i, load64(out, target + i) | more)
            for i in range(words, columns):
                out[target + i] |= (np.int64(values[source + i]) << filled) & 255
            filled += width
    return position + width * columns


@kernel
def unpack_planes(source, position, width, columns, out):  # type: ignore[no-untyped-def]
    """Inverse of `pack_planes`: 8 * columns values of uint8; returns the position behind the planes."""
    words = columns // 8 * 8
    mask = (1 << width) - 1
    for row in range(8):
        target = row * columns
        byte = (row * width) // 8
        start = row * width - 8 * byte
        first = position + byte * columns
        second = first + columns
        right = _u(start)
        keep = _every((255 >> start) & mask)
        if start + width <= 8:
            for i in range(0, words, 8):
                store64(out, target + i, (load64(source, first + i) >> right) & keep)
            for i in range(words, columns):
                out[target + i] = (np.int64(source[first + i]) >> start) & mask
        else:
            left = _u(8 - start)
            rest = _every((255 << (8 - start)) & mask)
            for i in range(0, words, 8):
                value = (load64(source, first + i) >> right) & keep
                store64(out, target + i, value | ((load64(source, second + i) << left) & rest))
            for i in range(words, columns):
                value = (np.int64(source[first + i]) >> start) | (np.int64(source[second + i]) << (8 - start))
                out[target + i] = value & mask
    return position + width * columns
