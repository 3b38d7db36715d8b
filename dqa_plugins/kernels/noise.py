"""The error of quantizing with a noise, for many amplitudes at once: one pass over the values, in float64.

Between its rounding ties a value keeps its code q, and its error w (q - v - t)^2 is a quadratic in the amplitude a of
the shift t = base + slope a. What the next code changes is added where the amplitudes reach it, and summed up along
them by the caller. A value meets as many codes as the amplitudes are wide (three for 0 to 2), whatever the bits.
"""

from __future__ import annotations

import math

import numpy as np

from .compiling import kernel


@kernel
def noise_sums(values, weights, unit, mean, start, width, count, low, high, out):  # type: ignore[no-untyped-def]
    """Sums that make the error of each amplitude start + j width.

    Args:
        values: (D, K) float64, in units of the scale.
        weights: (D, K) float64, the squared scale.
        unit: (D,) float64, the noise of each row for an amplitude of one.
        mean: of the noise.
        count: T amplitudes.
        low, high: code range.
        out: (2, T + 1) float64, zeros; written: sums of w (g^2 - 2 g base) and of w g slope, where g = q - v, as they
            change at each amplitude.

    Returns:
        the sums of w base^2, w base slope and w slope^2.
    """
    c0 = c1 = c2 = 0.0
    last_amplitude = start + (count - 1) * width
    for d in range(len(values)):
        # a row with falling shifts is its mirror image with rising ones
        sign = -1.0 if unit[d] < 0 else 1.0
        base, slope = sign * mean, sign * unit[d]
        bottom, top = (-high, -low) if sign < 0 else (low, high)
        total = 0.0
        for k in range(values.shape[1]):
            w = weights[d, k]
            v = sign * values[d, k]
            code = min(max(np.rint(v + base + slope * start), bottom), top)
            last = min(max(np.rint(v + base + slope * last_amplitude), bottom), top)
            g = code - v
            out[0, 0] += w * g * (g - 2 * base)
            out[1, 0] += w * g * slope
            total += w
            while code < last:
                place = math.ceil(((g + 0.5 - base) / slope - start) / width)
                j = min(max(place, 0), count)
                out[0, j] += w * (2 * (g - base) + 1)
                out[1, j] += w * slope
                code += 1
                g += 1
        c0 += total * base * base
        c1 += total * base * slope
        c2 += total * slope * slope
    return c0, c1, c2
