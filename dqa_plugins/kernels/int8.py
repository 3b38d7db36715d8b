"""The passes around an int8 convolution: a tensor to bytes and outliers, and what outliers add to the output.

Requirements this file meets:

- A tensor is read once: sum of two branches, ReLU, rounding and clamping in one loop, on uint8 stores.
- Outliers are found in the codes, not in the values: only saturated bytes can be outliers, and 64 bytes are compared
  at a time. One loop that also branches on the values takes several times as long.
- A NaN is reported, as it has no code.
- nogil, no threads of their own, no state: any number of threads may call them.
- Tensors are given by their addresses (`Tensor.data_ptr`): making numpy arrays of them costs as much as a small layer.
  Callers see to dtypes, sizes and memory formats.

x times the inverse step is rounded, not x over the step: at a tie the two may differ by a step.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from .compiling import kernel
from .memory import float_bits
from .vectors import BLOCK, add_16, add_64, count_bits, equal_bytes, float_value, lowest_bit, values_at

_MAGIC = np.float32(12582912.0)  # 1.5 * 2^23: adding it rounds half to even and leaves the integer in the low bits
_NAN = np.int32(0x30000000)  # bits of a NaN that no finite sum with _MAGIC has
CHUNK = 4096  # codes that are searched before their values are looked at
_u = np.uint64


@njit(inline="always")
def _tensor_pass(x, other, floor, lower, inverse, shift, low, high, zero, step, codes, values):  # type: ignore[no-untyped-def]
    seen = below = np.int32(0)
    for i in range(_u(x.size)):
        v = x[i] if other is None else np.float32(x[i] + other[i])
        v = floor if floor > v else v
        below = np.int32(below | float_bits(np.float32(v - lower)))  # the sign
        v = np.float32(np.float32(v + shift) * inverse)
        v = high if high < v else v  # a NaN fails both comparisons and stays
        v = low if low > v else v
        r = np.float32(v + _MAGIC)
        seen = np.int32(seen | float_bits(r))
        codes[i] = np.int32(float_bits(r) + zero)
        if values is not None:
            values[i] = np.float32(np.float32(np.float32(r - _MAGIC) * step) - shift)
    return 1 if seen & _NAN else 2 if below < 0 else 0


@kernel
def quantize(x, other, floor, lower, inverse, shift, low, high, zero, step, codes, values, size):  # type: ignore[no-untyped-def]
    """Codes, and values, of a tensor with one grid.

    Args:
        x: address of `size` float32.
        other: likewise, added to x first; 0: nothing is.
        floor: smaller sums become this (0: a ReLU; minus infinity: none).
        lower: a threshold, unit of x.
        inverse: 1 / step.
        shift: added before rounding, unit of x (the bias of a grid).
        low, high: smallest and largest code less the zero point.
        zero: int32, the byte of code 0.
        step: of a code, unit of x.
        codes: address of `size` uint8.
        values: address of as many float32, the fake-quantized tensor; 0: not wanted.

    Returns:
        1 if there is a NaN; else 2 if a value is below `lower`; else 0.
    """
    a, q = carray(values_at(x, np.float32), size), carray(values_at(codes, np.uint8), size)
    b, y = carray(values_at(other, np.float32), size), carray(values_at(values, np.float32), size)
    if other == 0 and values == 0:
        return _tensor_pass(a, None, floor, lower, inverse, shift, low, high, zero, step, q, None)
    if other == 0:
        return _tensor_pass(a, None, floor, lower, inverse, shift, low, high, zero, step, q, y)
    if values == 0:
        return _tensor_pass(a, b, floor, lower, inverse, shift, low, high, zero, step, q, None)
    return _tensor_pass(a, b, floor, lower, inverse, shift, low, high, zero, step, q, y)


@njit
def _repeated(grid, least):  # type: ignore[no-untyped-def]
    """(R, C) as often side by side as to have `least` columns: inner loops of few channels take as long to start."""
    times = max(1, least // grid.shape[1])
    found = np.empty((grid.shape[0], times * grid.shape[1]), grid.dtype)
    for turn in range(times):
        found[:, turn * grid.shape[1] : (turn + 1) * grid.shape[1]] = grid
    return found


@njit(inline="always")
def _channels_pass(x, other, floor, grid, zero, codes, values):  # type: ignore[no-untyped-def]
    inverse, shift, low, high, step, factor = grid[0], grid[1], grid[2], grid[3], grid[4], grid[5]
    seen = np.int32(0)
    for base in range(0, x.size, grid.shape[1]):
        for c in range(_u(min(grid.shape[1], x.size - base))):
            i = _u(base) + c
            v = x[i] if other is None else np.float32(x[i] + other[i])
            v = floor if floor > v else v
            v = np.float32(np.float32(v + shift[c]) * inverse[c])
            v = high[c] if high[c] < v else v
            v = low[c] if low[c] > v else v
            code = np.float32(np.float32(v + _MAGIC) - _MAGIC)
            r = np.float32(np.float32(code * factor[c]) + _MAGIC)
            seen = np.int32(seen | float_bits(r))
            codes[i] = np.int32(float_bits(r) + zero)
            if values is not None:
                values[i] = np.float32(np.float32(code * step[c]) - shift[c])
    return 1 if seen & _NAN else 0


@kernel
def quantize_channels(x, other, floor, grid, zero, codes, values, size):  # type: ignore[no-untyped-def]
    """As `quantize`, of (P, C) with a grid for each channel.

    Args:
        grid: (6, C) float32: inverse, shift, low, high, step, and factor: what a code of the channel is multiplied by
            (a whole number) to be on the grid common to all.
    """
    a, q = carray(values_at(x, np.float32), size), carray(values_at(codes, np.uint8), size)
    b, y = carray(values_at(other, np.float32), size), carray(values_at(values, np.float32), size)
    wide = _repeated(grid, 512)
    if other == 0 and values == 0:
        return _channels_pass(a, None, floor, wide, zero, q, None)
    if other == 0:
        return _channels_pass(a, None, floor, wide, zero, q, y)
    if values == 0:
        return _channels_pass(a, b, floor, wide, zero, q, None)
    return _channels_pass(a, b, floor, wide, zero, q, y)


@kernel
def outliers(x, other, floor, lower, upper, bottom, top, codes, values, size, base, positions, residuals, found):  # type: ignore[no-untyped-def]
    """The values outside [lower, upper] among those whose codes are saturated.

    Args:
        x, other, floor, codes, values, size: as of `quantize`.
        lower, upper: thresholds, unit of x.
        bottom, top: (code, value): the byte of a saturated value and what it stands for; the code of `bottom` is -1
            where no value is below.
        base: position of the first value.
        positions: int32, residuals: float32: outliers are appended from `found` on; room for CHUNK + BLOCK more than
            are allowed.

    Returns:
        how many there are now; -1: more than there is room for.
    """
    a, q = carray(values_at(x, np.float32), size), carray(values_at(codes, np.uint8), size)
    b, y = carray(values_at(other, np.float32), size), carray(values_at(values, np.float32), size)
    kept = found
    for chunk in range(0, size, CHUNK):
        end = min(chunk + CHUNK, size)
        if kept + CHUNK + BLOCK > positions.size:
            return -1
        n, whole = kept, chunk + (end - chunk) // BLOCK * BLOCK
        for i in range(chunk, whole, BLOCK):
            mask = equal_bytes(q, i, np.uint8(top[0]))
            if bottom[0] >= 0:
                mask |= equal_bytes(q, i, np.uint8(bottom[0]))
            # mostly none to two: without a branch
            k, n = n, n + count_bits(mask)
            positions[k] = i + lowest_bit(mask)
            mask &= mask - _u(1)
            positions[k + 1] = i + lowest_bit(mask)
            mask &= mask - _u(1)
            k += 2
            while mask:
                positions[k] = i + lowest_bit(mask)
                mask &= mask - _u(1)
                k += 1
        for i in range(whole, end):
            positions[n] = i
            n += 1
        for k in range(kept, n):
            at = positions[k]
            v = a[_u(at)]
            if other != 0:
                v = np.float32(v + b[_u(at)])
            v = floor if floor > v else v
            outside = v > upper or v < lower
            positions[kept] = base + at
            residuals[kept] = v - (top[1] if v > upper else bottom[1])
            if values != 0 and outside:
                y[_u(at)] = v
            kept += 1 if outside else 0
    return kept


@kernel
def scatter(out, size, weight, scale, positions, residuals, channels, width, rows, columns, steps):  # type: ignore[no-untyped-def]
    """Add to the output of a convolution what the outliers of its input contribute.

    Args:
        out: address of `size` = B * OH * OW * O float32, NHWC.
        weight: (C * kh * kw * Og,) int8: the codes, by input channel, tap and output of its group.
        scale: (O,) float32, of the weight.
        positions: (N,) int32 in the NHWC input, residuals: (N,) float32, what the dense part lacks there.
        channels: C; width: of the input.
        rows: (B * H, 3), columns: (W, 3): for each row and column of the input the first tap that reads it (as an
            offset in the weight of a channel), how many do, and the output of that one (as an offset in `out`).
        steps: what one tap further is, in `out` and in the weight, for a row and for a column; channels and outputs of
            a group.
    """
    y = carray(values_at(out, np.float32), size)
    down, right, row, column, group, outputs = steps
    slab = weight.size // channels
    full, rest = outputs & ~63, outputs & ~15
    c32, w32 = np.uint32(channels), np.uint32(width)
    for k in range(positions.size):
        position = np.uint32(positions[k])
        pixel = np.uint32(position // c32)
        c = np.int64(np.uint32(position - pixel * c32))
        line = np.int64(np.uint32(pixel // w32))
        place = np.int64(pixel) - line * width
        value = residuals[k]
        first = (c // group) * outputs if group < channels else 0
        tap = c * slab + rows[line, 0] + columns[place, 0]
        at = rows[line, 2] + columns[place, 2] + first
        high, wide = rows[line, 1], columns[place, 1]
        for o in range(0, full, 64):
            add_64(y, at + o, down, right, weight, tap + o, row, column, scale, first + o, value, high, wide)
        for o in range(full, rest, 16):
            add_16(y, at + o, down, right, weight, tap + o, row, column, scale, first + o, value, high, wide)
        for o in range(rest, outputs):
            factor = value * scale[first + o]
            for i in range(high):
                for j in range(wide):
                    y[at + o + i * down + j * right] += factor * weight[tap + o + i * row + j * column]


@kernel
def regrid(codes, size, grid, before, after):  # type: ignore[no-untyped-def]
    """Bytes of each channel's own grid to the grid common to all, in place: (clamp(q - before) * factor) + after.

    Args:
        codes: address of `size` = P * C bytes.
        grid: (3, C) int32: smallest and largest code of a channel, and factor.
        before, after: int32, the byte of code 0.
    """
    q = carray(values_at(codes, np.uint8), size)
    wide = _repeated(grid, 1024)
    # all of it in bytes: what overflows on the way is gone at the end
    low, high, factor = (
        (wide[0] + before).astype(np.uint8),
        (wide[1] + before).astype(np.uint8),
        wide[2].astype(np.uint8),
    )
    offset = np.uint8(after)
    for base in range(0, size, wide.shape[1]):
        for c in range(_u(min(wide.shape[1], size - base))):
            v = q[_u(base) + c]
            v = high[c] if high[c] < v else v
            v = low[c] if low[c] > v else v
            q[_u(base) + c] = np.uint8(np.uint8(np.uint8(v - np.uint8(before)) * factor[c]) + offset)


@kernel
def scale_samples(out, size, scales, bias):  # type: ignore[no-untyped-def]
    """out[b] = out[b] * scales[b] + bias, in place.

    Args:
        out: address of `size` = B * P * O float32; scales: (B,) float32; bias: (O,) float32.
    """
    y = carray(values_at(out, np.float32), size)
    samples, outputs = scales.size, bias.size
    pixels = size // (samples * outputs)
    for b in range(samples):
        factor = scales[b]
        for p in range(b * pixels, (b + 1) * pixels):
            base = _u(p * outputs)
            for o in range(_u(outputs)):
                y[base + o] = y[base + o] * factor + bias[o]


@kernel
def extremes(x, other, floor, size):  # type: ignore[no-untyped-def]
    """(minimum, maximum) of a tensor after the sum and the floor, see `quantize`; NaN is not looked for."""
    a, b = carray(values_at(x, np.float32), size), carray(values_at(other, np.float32), size)
    smallest, largest = np.float32(np.inf), np.float32(-np.inf)
    # order-preserving integers: comparisons of floats do not vectorise as reductions
    least, most = np.int32(2147483647), np.int32(-2147483648)
    if other == 0:
        for i in range(_u(size)):
            bits = np.int32(float_bits(a[i]))
            key = np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))
            least = key if key < least else least
            most = key if key > most else most
    else:
        for i in range(_u(size)):
            bits = np.int32(float_bits(np.float32(a[i] + b[i])))
            key = np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))
            least = key if key < least else least
            most = key if key > most else most
    for key in (least, most):
        v = float_value(np.int32(key ^ np.int32(np.int32(key >> np.int32(31)) & np.int32(0x7FFFFFFF))))
        v = floor if floor > v else v
        smallest = v if v < smallest else smallest
        largest = v if v > largest else largest
    return smallest, largest
