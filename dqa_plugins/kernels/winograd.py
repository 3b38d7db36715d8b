"""The transforms of a 3x3 convolution with stride 1 by Winograd's algorithm, F(4x4, 3x3), for channels-last tensors.

An output tile of 4x4 pixels takes 36 multiplications per pair of channels instead of 144: a tile of 6x6 pixels of the
input is transformed (`spread`), multiplied by the transformed weight (36 matrix products: `multiply`, or the
caller's), and transformed back (`collect`). `convolve` does it all, for machines where `multiply` is fast.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016), with the interpolation points 0, +-5/8,
+-3/2 and infinity instead of 0, +-1, +-2 and infinity: rounding errors are half as large, about twice those of the
direct sum.

Requirements this file meets:

- Channels are a multiple of 16 (`lanes`), height and width arbitrary: tiles at the border are cut.
- nogil and no thread pool of its own.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from . import lanes
from .lanes import load, positive, store

TILE = 4  # output pixels along each axis
SIDE = 6  # input pixels along each axis

_P, _Q = 5 / 8, 3 / 2
_POINTS = (0.0, _P, -_P, _Q, -_Q)
_p, _q, _p2, _q2, _p3, _q3 = map(np.float32, (_P, _Q, _P**2, _Q**2, _P**3, _Q**3))
_product, _sum = np.float32(_P**2 * _Q**2), np.float32(_P**2 + _Q**2)
_L = lanes.WIDTH
_ROW = SIDE * _L


def weight_transform() -> npt.NDArray[np.float64]:
    """The (6, 3) matrix that transforms the weight along one axis, to fit `spread` and `collect`."""
    transform = np.zeros((SIDE, 3))
    for i, point in enumerate(_POINTS):
        # the Lagrange denominator, which the input transform leaves out
        scale = 1 / np.prod([point - other for other in _POINTS if other != point])
        transform[i] = scale * np.array([1.0, point, point**2])
    transform[-1, -1] = 1
    return transform


@njit(inline="always")
def _forward(d0, d1, d2, d3, d4, d5):  # type: ignore[no-untyped-def]
    even_p, odd_p = d4 - _q2 * d2, _p * (d3 - _q2 * d1)
    even_q, odd_q = d4 - _p2 * d2, _q * (d3 - _p2 * d1)
    first = _product * d0 - _sum * d2 + d4
    last = _product * d1 - _sum * d3 + d5
    return first, even_p + odd_p, even_p - odd_p, even_q + odd_q, even_q - odd_q, last


@njit(inline="always")
def _backward(m0, m1, m2, m3, m4, m5):  # type: ignore[no-untyped-def]
    even_p, odd_p, even_q, odd_q = m1 + m2, m1 - m2, m3 + m4, m3 - m4
    y0 = m0 + even_p + even_q
    y1 = _p * odd_p + _q * odd_q
    y2 = _p2 * even_p + _q2 * even_q
    y3 = m5 + _p3 * odd_p + _q3 * odd_q
    return y0, y1, y2, y3


@njit(inline="always")
def _within(position, size):  # type: ignore[no-untyped-def]
    return position >= 0 and position < size


@njit(cache=True, nogil=True)
def spread(x, first, tiles, height, width, channels, pad_y, pad_x, v, plane):  # type: ignore[no-untyped-def]
    """Transform the input tiles first..first + tiles - 1, counted along each image, image after image.

    Args:
        x: (N, height, width, channels) float32, flat.
        pad_y, pad_x: zeros on each side.
        v: (36, tiles, channels) float32, flat. Written.
        plane: values in `v` from one of the 36 to the next; no high power of two, which caches do not like.
    """
    down, across = -(-(height + 2 * pad_y - 2) // TILE), -(-(width + 2 * pad_x - 2) // TILE)
    part = np.empty(SIDE * _ROW, np.float32)
    line = width * channels
    for number in range(tiles):
        row, tile = divmod(first + number, down * across)
        y, x0 = tile // across * TILE - pad_y, tile % across * TILE - pad_x
        for c in range(0, channels, _L):
            for j in range(SIDE):
                inside = _within(x0 + j, width)
                at = ((row * height + y) * width + x0 + j) * channels + c
                r0, r1, r2, r3, r4, r5 = _forward(
                    load(x, at, inside and _within(y, height)),
                    load(x, at + line, inside and _within(y + 1, height)),
                    load(x, at + 2 * line, inside and _within(y + 2, height)),
                    load(x, at + 3 * line, inside and _within(y + 3, height)),
                    load(x, at + 4 * line, inside and _within(y + 4, height)),
                    load(x, at + 5 * line, inside and _within(y + 5, height)),
                )
                k = j * _L
                store(part, k, r0)
                store(part, k + _ROW, r1)
                store(part, k + 2 * _ROW, r2)
                store(part, k + 3 * _ROW, r3)
                store(part, k + 4 * _ROW, r4)
                store(part, k + 5 * _ROW, r5)
            for i in range(SIDE):
                k = i * _ROW
                r0, r1, r2, r3, r4, r5 = _forward(
                    load(part, k, True),
                    load(part, k + _L, True),
                    load(part, k + 2 * _L, True),
                    load(part, k + 3 * _L, True),
                    load(part, k + 4 * _L, True),
                    load(part, k + 5 * _L, True),
                )
                k = i * SIDE * plane + number * channels + c
                store(v, k, r0)
                store(v, k + plane, r1)
                store(v, k + 2 * plane, r2)
                store(v, k + 3 * plane, r3)
                store(v, k + 4 * plane, r4)
                store(v, k + 5 * plane, r5)


@njit(cache=True, nogil=True)
def collect(m, plane, first, tiles, height, width, channels, bias, addend, add, relu, y):  # type: ignore[no-untyped-def]
    """Transform products back into the tiles first..first + tiles - 1 of y, and finish: + bias, + addend, ReLU.

    Args:
        m, plane: as in `spread`.
        height, width, channels: of the output.
        bias: (channels,) float32.
        addend: (N, height, width, channels) float32, flat; read if `add`.
        y: (N, height, width, channels) float32, flat. Written; may be `addend`.
    """
    down, across = -(-height // TILE), -(-width // TILE)
    part = np.empty(TILE * _ROW, np.float32)
    for number in range(tiles):
        row, tile = divmod(first + number, down * across)
        top, left = tile // across * TILE, tile % across * TILE
        for c in range(0, channels, _L):
            for j in range(SIDE):
                k = j * plane + number * channels + c
                y0, y1, y2, y3 = _backward(
                    load(m, k, True),
                    load(m, k + SIDE * plane, True),
                    load(m, k + 2 * SIDE * plane, True),
                    load(m, k + 3 * SIDE * plane, True),
                    load(m, k + 4 * SIDE * plane, True),
                    load(m, k + 5 * SIDE * plane, True),
                )
                k = j * _L
                store(part, k, y0)
                store(part, k + _ROW, y1)
                store(part, k + 2 * _ROW, y2)
                store(part, k + 3 * _ROW, y3)
            constant = load(bias, c, True)
            for i in range(min(TILE, height - top)):
                k = i * _ROW
                y0, y1, y2, y3 = _backward(
                    load(part, k, True),
                    load(part, k + _L, True),
                    load(part, k + 2 * _L, True),
                    load(part, k + 3 * _L, True),
                    load(part, k + 4 * _L, True),
                    load(part, k + 5 * _L, True),
                )
                at = ((row * height + top + i) * width + left) * channels + c
                _finish(y, at, y0 + constant, addend, add, relu)
                if left + 1 < width:
                    _finish(y, at + channels, y1 + constant, addend, add, relu)
                if left + 2 < width:
                    _finish(y, at + 2 * channels, y2 + constant, addend, add, relu)
                if left + 3 < width:
                    _finish(y, at + 3 * channels, y3 + constant, addend, add, relu)


@njit(inline="always")
def _finish(y, at, value, addend, add, relu):  # type: ignore[no-untyped-def]
    total = value + load(addend, at, add)
    store(y, at, positive(total) if relu else total)


GROUP = 24  # tiles: `multiply` takes so many at a time
_two_by_twelve, _one_by_twenty_four = lanes.block_product(12, 2), lanes.block_product(24, 1)


@njit(cache=True, nogil=True)
def multiply(v, v_plane, u, m, m_plane, tiles, channels, outputs):  # type: ignore[no-untyped-def]
    """The 36 matrix products, for AVX-512; `m` gets the tiles up to the next multiple of `GROUP`.

    Args:
        v, v_plane: as in `spread`, with room up to the next multiple of `GROUP`.
        u: (36, channels, outputs) float32, flat.
        m, m_plane: as in `collect`, with the same room.
    """
    for point in range(SIDE * SIDE):
        weight = point * channels * outputs
        for t in range(0, tiles, GROUP):
            source, to = point * v_plane + t * channels, point * m_plane + t * outputs
            for o in range(0, outputs - _L, 2 * _L):
                for half in range(0, GROUP, 12):
                    a, c = source + half * channels, to + half * outputs + o
                    _two_by_twelve(v, a, channels, u, weight + o, outputs, m, c, outputs, channels)
            if outputs % (2 * _L) != 0:
                o = outputs - _L
                _one_by_twenty_four(v, source, channels, u, weight + o, outputs, m, to + o, outputs, channels)


@njit(cache=True, nogil=True)
def convolve(  # type: ignore[no-untyped-def]
    x, batch, height, width, channels, pad_y, pad_x, u, outputs, bias, addend, add, relu, y, v, m, step
):
    """The whole convolution, for AVX-512, `step` tiles at a time: a multiple of `GROUP`.

    Args:
        v, m: room for (36, step * channels + 16) and (36, step * outputs + 16) float32, flat.
        the rest: as in `spread`, `multiply` and `collect`.
    """
    high, wide = height + 2 * pad_y - 2, width + 2 * pad_x - 2
    total = batch * -(-high // TILE) * -(-wide // TILE)
    v_plane, m_plane = step * channels + _L, step * outputs + _L
    for first in range(0, total, step):
        tiles = min(step, total - first)
        spread(x, first, tiles, height, width, channels, pad_y, pad_x, v, v_plane)
        multiply(v, v_plane, u, m, m_plane, tiles, channels, outputs)
        collect(m, m_plane, first, tiles, high, wide, outputs, bias, addend, add, relu, y)
