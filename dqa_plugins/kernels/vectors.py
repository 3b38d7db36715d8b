"""Vectors of LLVM, which numba itself does not offer.

They are LLVM's own types, not those of a processor: narrower machines get narrower instructions, and the same numbers.
Nothing is checked.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

BLOCK = 64  # bytes that are compared at a time
LANES = 16
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
def equal_bytes(typing_context: Any, codes: Any, offset: Any, value: Any) -> Any:
    """Bit i: codes[offset + i] == value, of 64 bytes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        found = builder.load(_pointer(context, builder, signature.args[0], arguments[0], arguments[1], BLOCK))
        found.align = 1
        return builder.bitcast(builder.icmp_unsigned("==", found, _splat(builder, arguments[2], BLOCK)), _WORD)

    return types.uint64(codes, types.intp, types.uint8), generate


@intrinsic
def lowest_bit(typing_context: Any, mask: Any) -> Any:
    """Position of the lowest bit that is set; 64 if none is."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), generate


@intrinsic
def count_bits(typing_context: Any, mask: Any) -> Any:
    """int64, the bits that are set in a uint64."""

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


add_64, add_16 = _adding(4), _adding(1)


def _quantizing(full: bool) -> Any:
    """An intrinsic that fake-quantizes 16 values which share their parameters.

    A loop over a row of a few values would be left scalar: its vectors take 32 values.
    """

    @intrinsic
    def quantize(
        typing_context: Any,
        x: Any,
        out: Any,
        at: Any,
        step: Any,
        divisor: Any,
        low: Any,
        high: Any,
        zero: Any,
        bias: Any,
        lower: Any,
        upper: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            v = builder.load(_pointer(context, builder, x, arguments[0], arguments[2], LANES))
            v.align = 4
            step, divisor, low, high, zero, bias, lower, upper = (_splat(builder, a, LANES) for a in arguments[3:])
            rint = ir.FunctionType(v.type, [v.type])
            rint = cgutils.get_or_insert_function(builder.module, rint, f"llvm.rint.v{LANES}f32")
            q = builder.call(rint, [builder.fdiv(builder.fadd(v, bias) if full else v, divisor)])
            q = builder.fadd(q, zero) if full else q
            q = builder.select(builder.fcmp_ordered("<", q, low), low, q)
            q = builder.select(builder.fcmp_ordered(">", q, high), high, q)
            r = builder.fmul(builder.fsub(q, zero) if full else q, step)
            if full:
                kept = builder.or_(builder.fcmp_ordered("<", v, lower), builder.fcmp_ordered(">", v, upper))
                r = builder.select(kept, v, builder.fsub(r, bias))
            builder.store(r, _pointer(context, builder, out, arguments[1], arguments[2], LANES)).align = 4
            return context.get_dummy_value()

        return types.void(x, out, types.intp, *[types.float32] * 8), generate

    return quantize


quantize_full, quantize_plain = _quantizing(True), _quantizing(False)


@intrinsic
def values_at(typing_context: Any, address: Any, kind: Any) -> Any:
    """An address as a pointer to values of a type."""
    element = kind.dtype if hasattr(kind, "dtype") else kind.instance_type

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(element)(types.int64, kind), generate
