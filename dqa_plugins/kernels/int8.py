"""The passes around an int8 convolution: a tensor to bytes and outliers, and what outliers add to the output.

Requirements this file meets:

- A tensor is read once: sum of two branches, ReLU, rounding and clamping in one loop, on uint8 stores.
- Outliers are found in the codes, not in the values: only saturated bytes can be outliers, and 64 bytes are compared
  at a time. One loop that also branches on the values takes several times as long.
- A NaN is reported, as it has no code.
- nogil, no threads of their own, no state: any number of threads may call them.
- Tensors are given by their addresses (`Tensor.data_ptr`): making numpy arrays of them costs as much as a small layer.
  Callers see to dtypes, sizes and memory formats.
- Vectors are LLVM's own types, not those of a processor: narrower machines get narrower instructions, same numbers.

x times the inverse step is rounded, not x over the step: at a tie the two may differ by a step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .memory import float_bits

_MAGIC = np.float32(12582912.0)  # 1.5 * 2^23: adding it rounds half to even and leaves the integer in the low bits
_NAN = np.int32(0x30000000)  # bits of a NaN that no finite sum with _MAGIC has
BLOCK = 64  # codes that are searched at a time
CHUNK = 4096  # codes that are searched before their values are looked at
LANES = 16
_u = np.uint64
_WORD, _FLOAT = ir.IntType(64), ir.FloatType()


def _pointer(context: Any, builder: Any, kind: Any, array: Any, offset: Any, lanes: int) -> Any:
    """Where a vector of `lanes` elements begins in a contiguous array."""
    data = context.make_array(kind)(context, builder, array).data
    vector = ir.VectorType(data.type.pointee, lanes)
    return builder.bitcast(builder.gep(data, [offset]), vector.as_pointer())


def _splat(builder: Any, value: Any, lanes: int) -> Any:
    vector = ir.VectorType(value.type, lanes)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    order = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), order)


@intrinsic
def _equal(typing_context: Any, codes: Any, offset: Any, value: Any) -> Any:
    """Bit i: codes[offset + i] == value, of 64 bytes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        found = builder.load(_pointer(context, builder, signature.args[0], *arguments[:2], BLOCK))
        found.align = 1
        return builder.bitcast(builder.icmp_unsigned("==", found, _splat(builder, arguments[2], BLOCK)), _WORD)

    return types.uint64(codes, types.intp, types.uint8), generate


@intrinsic
def _lowest(typing_context: Any, mask: Any) -> Any:
    """Position of the lowest bit that is set; 64 if none is."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), generate


@intrinsic
def _count(typing_context: Any, mask: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), generate


@intrinsic
def float_value(typing_context: Any, bits: Any) -> Any:
    """The float32 of a bit pattern, int32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _FLOAT)

    return types.float32(types.int32), generate


def _adding(vectors: int) -> Any:
    """An intrinsic that adds one input value's contributions to `vectors` * 16 outputs at all taps of a kernel."""

    @intrinsic
    def add(
        typing_context: Any,
        out: Any,
        at: Any,
        down: Any,
        right: Any,
        weight: Any,
        first: Any,
        row: Any,
        column: Any,
        scale: Any,
        channel: Any,
        value: Any,
        rows: Any,
        columns: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            out, at, down, right, weight, first, row, column, scale, channel, value, rows, columns = arguments

            def vector(number: int, array: Any, offset: Any, lane: int) -> Any:
                offset = builder.add(offset, ir.Constant(_WORD, lane * LANES))
                return _pointer(context, builder, signature.args[number], array, offset, LANES)

            def load(pointer: Any, align: int) -> Any:
                found = builder.load(pointer)
                found.align = align
                return found

            value = _splat(builder, value, LANES)
            scales = [builder.fmul(load(vector(8, scale, channel, v), 4), value) for v in range(vectors)]
            kind = value.type
            fma = ir.FunctionType(kind, [kind, kind, kind])
            fma = cgutils.get_or_insert_function(builder.module, fma, f"llvm.fma.v{LANES}f32")
            with cgutils.for_range(builder, rows) as y:
                to, of = builder.add(at, builder.mul(y.index, down)), builder.add(first, builder.mul(y.index, row))
                with cgutils.for_range(builder, columns) as x:
                    where = builder.add(to, builder.mul(x.index, right))
                    tap = builder.add(of, builder.mul(x.index, column))
                    places = [vector(0, out, where, v) for v in range(vectors)]
                    taps = [load(vector(4, weight, tap, v), 1) for v in range(vectors)]
                    sums = [load(place, 4) for place in places]
                    for place, codes, factor, total in zip(places, taps, scales, sums, strict=True):
                        product = builder.sitofp(codes, kind)
                        builder.store(builder.call(fma, [factor, product, total]), place).align = 4
            return context.get_dummy_value()

        i = types.intp
        return types.void(out, i, i, i, weight, i, i, i, scale, i, types.float32, i, i), generate

    return add


_add_64, _add_16 = _adding(4), _adding(1)


@intrinsic
def _at(typing_context: Any, address: Any, kind: Any) -> Any:
    """An address as a pointer to values of a type."""
    element = kind.dtype if hasattr(kind, "dtype") else kind.instance_type

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(element)(types.int64, kind), generate


@njit(inline="always")
def _tensor_pass(x, other, floor, inverse, shift, low, high, zero, step, codes, values):  # type: ignore[no-untyped-def]
    seen = below = np.int32(0)
    for i in range(_u(x.size)):
        v = x[i] if other is None else np.float32(x[i] + other[i])
        v = floor if floor > v else v
        v = np.float32(np.float32(v + shift) * inverse)
        below = np.int32(below | float_bits(np.float32(v - low)))  # the sign
        v = high if high < v else v  # a NaN fails both comparisons and stays
        v = low if low > v else v
        r = np.float32(v + _MAGIC)
        seen = np.int32(seen | float_bits(r))
        codes[i] = np.int32(float_bits(r) + zero)
        if values is not None:
            values[i] = np.float32(np.float32(np.float32(r - _MAGIC) * step) - shift)
    return 1 if seen & _NAN else 2 if below < 0 else 0


@njit(cache=True, nogil=True)
def quantize(x, other, floor, inverse, shift, low, high, zero, step, codes, values, size):  # type: ignore[no-untyped-def]
    """Codes, and values, of a tensor with one grid.

    Args:
        x: address of `size` float32.
        other: likewise, added to x first; 0: nothing is.
        floor: smaller sums become this (0: a ReLU; minus infinity: none).
        inverse: 1 / step.
        shift: added before rounding, unit of x (the bias of a grid).
        low, high: smallest and largest code less the zero point.
        zero: int32, the byte of code 0.
        step: of a code, unit of x.
        codes: address of `size` uint8.
        values: address of as many float32, the fake-quantized tensor; 0: not wanted.

    Returns:
        1 if there is a NaN; else 2 if a value may be below the smallest code; else 0.
    """
    a, q = carray(_at(x, np.float32), size), carray(_at(codes, np.uint8), size)
    b, y = carray(_at(other, np.float32), size), carray(_at(values, np.float32), size)
    if other == 0 and values == 0:
        return _tensor_pass(a, None, floor, inverse, shift, low, high, zero, step, q, None)
    if other == 0:
        return _tensor_pass(a, None, floor, inverse, shift, low, high, zero, step, q, y)
    if values == 0:
        return _tensor_pass(a, b, floor, inverse, shift, low, high, zero, step, q, None)
    return _tensor_pass(a, b, floor, inverse, shift, low, high, zero, step, q, y)


@njit(cache=True, nogil=True)
def quantize_channels(x, other, floor, grid, zero, codes, values, size):  # type: ignore[no-untyped-def]
    """As `quantize`, of (P, C) with a grid for each channel.

    Args:
        grid: (6, C) float32: inverse, shift, low, high, step, and factor: what a code of the channel is multiplied by
            (a whole number) to be on the grid common to all.
    """
    a, q = carray(_at(x, np.float32), size), carray(_at(codes, np.uint8), size)
    b, y = carray(_at(other, np.float32), size), carray(_at(values, np.float32), size)
    inverse, shift, low, high, step, factor = grid[0], grid[1], grid[2], grid[3], grid[4], grid[5]
    seen = np.int32(0)
    channels = _u(grid.shape[1])
    for p in range(_u(size) // channels):
        base = p * channels
        for c in range(channels):
            v = a[base + c]
            if other != 0:
                v = np.float32(v + b[base + c])
            v = floor if floor > v else v
            v = np.float32(np.float32(v + shift[c]) * inverse[c])
            v = high[c] if high[c] < v else v
            v = low[c] if low[c] > v else v
            code = np.float32(np.float32(v + _MAGIC) - _MAGIC)
            bits = float_bits(np.float32(np.float32(code * factor[c]) + _MAGIC))
            seen = np.int32(seen | bits)
            q[base + c] = np.int32(bits + zero)
            if values != 0:
                y[base + c] = np.float32(np.float32(code * step[c]) - shift[c])
    return 1 if seen & _NAN else 0


@njit(cache=True, nogil=True)
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
    a, q = carray(_at(x, np.float32), size), carray(_at(codes, np.uint8), size)
    b, y = carray(_at(other, np.float32), size), carray(_at(values, np.float32), size)
    kept = found
    for chunk in range(0, size, CHUNK):
        end = min(chunk + CHUNK, size)
        if kept + CHUNK + BLOCK > positions.size:
            return -1
        n, whole = kept, chunk + (end - chunk) // BLOCK * BLOCK
        for i in range(chunk, whole, BLOCK):
            mask = _equal(q, i, np.uint8(top[0]))
            if bottom[0] >= 0:
                mask |= _equal(q, i, np.uint8(bottom[0]))
            # mostly none to two: without a branch
            k, n = n, n + _count(mask)
            positions[k] = i + _lowest(mask)
            mask &= mask - _u(1)
            positions[k + 1] = i + _lowest(mask)
            mask &= mask - _u(1)
            k += 2
            while mask:
                positions[k] = i + _lowest(mask)
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


@njit(cache=True, nogil=True)
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
    y = carray(_at(out, np.float32), size)
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
            _add_64(y, at + o, down, right, weight, tap + o, row, column, scale, first + o, value, high, wide)
        for o in range(full, rest, 16):
            _add_16(y, at + o, down, right, weight, tap + o, row, column, scale, first + o, value, high, wide)
        for o in range(rest, outputs):
            factor = value * scale[first + o]
            for i in range(high):
                for j in range(wide):
                    y[at + o + i * down + j * right] += factor * weight[tap + o + i * row + j * column]


@njit(cache=True, nogil=True)
def scale_samples(out, size, scales, bias):  # type: ignore[no-untyped-def]
    """out[b] = out[b] * scales[b] + bias, in place.

    Args:
        out: address of `size` = B * P * O float32; scales: (B,) float32; bias: (O,) float32.
    """
    y = carray(_at(out, np.float32), size)
    samples, outputs = scales.size, bias.size
    pixels = size // (samples * outputs)
    for b in range(samples):
        factor = scales[b]
        for p in range(b * pixels, (b + 1) * pixels):
            base = _u(p * outputs)
            for o in range(_u(outputs)):
                y[base + o] = y[base + o] * factor + bias[o]


@njit(cache=True, nogil=True)
def extremes(x, other, floor, size):  # type: ignore[no-untyped-def]
    """(minimum, maximum) of a tensor after the sum and the floor, see `quantize`; NaN is not looked for."""
    a, b = carray(_at(x, np.float32), size), carray(_at(other, np.float32), size)
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
