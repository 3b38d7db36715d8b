"""What predictions need, without small tensors: sums of a tensor in one pass, what it showed, and the regression.

All sums are in float64 and of one sample alone: a prediction does not depend on the batch. They add up in another order
than those of aten, which moves a feature by about 1e-12 of its size: below the float32 that a prediction is rounded to.
"""

from __future__ import annotations

import math

import numpy as np

from .compiling import kernel

_u = np.uint64


@kernel(fastmath={"reassoc", "nsz"})
def _sums(x, begin, end, lower, upper):  # type: ignore[no-untyped-def]
    """Sum, sum of magnitudes, sum of squares (squared in float32) of x[begin:end], and how many lie outside."""
    total = magnitude = square = 0.0
    outside = np.int32(0)
    for i in range(_u(begin), _u(end)):
        v = x[i]
        wide = np.float64(v)
        total += wide
        magnitude += abs(wide)
        square += np.float64(v * v)
        outside = np.int32(outside + np.int32((v < lower) | (v > upper)))  # int32: as many lanes as values
    return total, magnitude, square, np.float64(outside)


@kernel
def sums(x, lower, upper, out, inner, free, count, along, first, last):  # type: ignore[no-untyped-def]
    """Sums of each channel of each sample.

    Args:
        x: (N,) float32 in rows as `fake_quantize.fake_quantize` has them.
        lower, upper: (B, C or 1) float32, the range that values lie outside of.
        out: (B, C, 4) float64, written: sum, sum of magnitudes, sum of squares, number of values outside.
        first, last: the range of samples.
    """
    for sample in range(first, last):
        out[sample] = 0
        if along:
            for row in range(sample * free, (sample + 1) * free):
                for c in range(inner):
                    v = x[_u(row * inner + c)]
                    g = min(c, lower.shape[1] - 1)
                    out[sample, c, 0] += np.float64(v)
                    out[sample, c, 1] += np.float64(abs(v))
                    out[sample, c, 2] += np.float64(v * v)
                    out[sample, c, 3] += np.float64((v < lower[sample, g]) | (v > upper[sample, g]))
        else:
            for row in range(sample * free * count, (sample + 1) * free * count):
                c = row % count
                g = min(c, lower.shape[1] - 1)
                begin = row * inner
                found = _sums(x, begin, begin + inner, lower[sample, g], upper[sample, g])
                for i in range(4):
                    out[sample, c, i] += found[i]


@kernel
def _log(v, smallest, largest):  # type: ignore[no-untyped-def]
    v = smallest if v < smallest else v  # a NaN fails both comparisons and stays
    return math.log(largest if v > largest else v)


@kernel
def summary(known, size, most, smallest, largest, out):  # type: ignore[no-untyped-def]
    """What a quantized tensor showed, see `qpp.features.Summary`.

    Args:
        known: (B, C, 4) float64, `sums` of it.
        size: values of a channel of a sample.
        most: groups of channels, at most.
        smallest, largest: what a logarithm is taken of.
        out: (B, 2 + 2 * min(C, most)) float64, written.
    """
    channels = known.shape[1]
    groups = min(channels, most)
    members = np.zeros(groups)
    values = np.zeros((2, groups))
    for c in range(channels):
        members[c * groups // channels] += 1
    for b in range(known.shape[0]):
        magnitude, outside = 0.0, 0.0
        values[:] = 0
        for c in range(channels):
            magnitude += known[b, c, 1]
            outside += known[b, c, 3]
            g = c * groups // channels
            values[0, g] += known[b, c, 1] / size / members[g]
            values[1, g] += known[b, c, 2] / size / members[g]
        out[b, 0] = _log((outside + 1) / (size * channels), smallest, largest)
        out[b, 1] = _log(magnitude / (size * channels), smallest, largest)
        for i in range(2):
            mean = 0.0
            for g in range(groups):
                values[i, g] = math.sqrt(values[i, g]) if i else values[i, g]
                mean += values[i, g]
            for g in range(groups):
                out[b, 2 + i * groups + g] = _log(values[i, g] + 1e-3 * mean / groups, smallest, largest)


@kernel
def regress(known, weight, bias, logarithmic, low, high, rate, centres, bumps, logarithms, scale, out):  # type: ignore[no-untyped-def]
    """The predictions of `qpp.predictor.Predictor`, whose buffers these are.

    Args:
        known: (B, K) float64: the features of the site first, then the summaries.
        logarithms: how many of the features are; 0 in the paper's mode.
        scale: which of them is that of the site's scale.
        out: (B, S * G) float32, written.
    """
    features = rate.size
    points, near = np.empty(features), np.empty(centres.shape[0])
    for b in range(known.shape[0]):
        unit = math.exp(known[b, scale]) if logarithms else 1.0
        for f in range(features):
            points[f] = math.exp(known[b, f]) if f < logarithms else known[b, f] * unit
        for r in range(centres.shape[0]):
            distance = 0.0
            for f in range(features):
                distance += (points[f] * rate[f] - centres[r, f]) ** 2
            near[r] = math.exp(-distance)
        for p in range(out.shape[1]):
            linear = bias[p]
            for k in range(known.shape[1]):
                linear += known[b, k] * weight[k, p]
            for r in range(near.size):
                linear += near[r] * bumps[r, p]
            if logarithms:
                bounded = -80.0 if linear < -80.0 else linear
                bounded = 80.0 if bounded > 80.0 else bounded
                linear = math.exp(bounded) if logarithmic[p] else linear * unit
            linear = low[p] if linear < low[p] else linear
            out[b, p] = high[p] if linear > high[p] else linear
