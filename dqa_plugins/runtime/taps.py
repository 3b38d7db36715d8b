"""Which taps of a convolution read each position of its input: what the scatter of outliers needs of a geometry."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np


@lru_cache(256)
def taps_of(size: int, out: int, kernel: int, geometry: tuple[int, int, int], units: tuple[int, int]) -> Any:
    """Which taps read each input position of one axis: see `kernels.int8.scatter`.

    Args:
        geometry: stride, padding, dilation.
        units: of a tap in the weight, of a position in the output.

    Returns:
        (size, 3) int64, and what the next tap is further in the output and in the weight.
    """
    stride, padding, dilation = geometry
    apart = stride // math.gcd(stride, dilation)
    found = np.zeros((size, 3), np.int64)
    for i in range(size):
        taps = [
            t
            for t in range(kernel)
            if (i + padding - t * dilation) % stride == 0 and 0 <= (i + padding - t * dilation) // stride < out
        ]
        if taps:
            found[i] = taps[0] * units[0], len(taps), (i + padding - taps[0] * dilation) // stride * units[1]
    return found, -(apart * dilation // stride) * units[1], apart * units[0]


@lru_cache(256)
def rows_of(
    batch: int, size: int, out: int, kernel: int, geometry: tuple[int, int, int], units: tuple[int, int]
) -> Any:
    """`taps_of` of the rows of a batch: those of a sample, and where in the output it begins."""
    found, *steps = taps_of(size, out, kernel, geometry, units)
    rows = np.tile(found, (batch, 1))
    rows[:, 2] += np.repeat(np.arange(batch), size) * out * units[1]
    return rows, *steps
