"""Unaligned 64-bit access to byte arrays, which numba itself does not offer.

Requirements this file meets:

- The codec reads and writes eight bytes at any byte position: one machine instruction instead of eight.
- Nothing is checked. Callers keep eight bytes of room behind the last position that they touch.
- A hint for the cache, which numba does not offer either: the next chunk is fetched while this one is computed on.
- Little-endian machines only (x86-64, AArch64): the torch reference codec serves the rest.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


def _address(context: Any, builder: Any, array_type: Any, array: Any, offset: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    data = builder.bitcast(data, ir.IntType(8).as_pointer())
    return builder.bitcast(builder.gep(data, [offset]), ir.IntType(64).as_pointer())


@intrinsic
def load64(typing_context: Any, array: Any, offset: Any) -> Any:
    """The 64-bit little-endian word at byte `offset` of a contiguous array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = builder.load(_address(context, builder, signature.args[0], *arguments))
        word.align = 1
        return word

    return types.uint64(array, types.intp), generate


@intrinsic
def store64(typing_context: Any, array: Any, offset: Any, value: Any) -> Any:
    """Write a 64-bit little-endian word at byte `offset` of a contiguous array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        where = _address(context, builder, signature.args[0], *arguments[:2])
        builder.store(arguments[2], where).align = 1
        return context.get_dummy_value()

    return types.void(array, types.intp, types.uint64), generate


@intrinsic
def float_bits(typing_context: Any, value: Any) -> Any:
    """The bit pattern of a float32, as int32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic
def prefetch(typing_context: Any, array: Any, offset: Any) -> Any:
    """Ask for the cache line at byte `offset` of a contiguous array. Any offset is allowed: nothing is read."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        where = _address(context, builder, signature.args[0], *arguments)
        where = builder.bitcast(where, ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [where.type, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(function, [where, number(0), number(3), number(1)])  # to read, into all levels, data
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic
def compress_between(
    typing_context: Any, source: Any, begin: Any, mask: Any, low: Any, high: Any, out: Any, at: Any
) -> Any:
    """Of 16 floats, those with keys low <= k < high: their bits, side by side, to out[at:].

    One instruction with AVX-512; elsewhere LLVM writes out the sixteen stores.

    Args:
        source: int32, the bits of float32 values; source[begin : begin + 16] is read.
        mask: int32, laid over the bits before the key is made, see `observe.key`.
        low, high: int32 keys.
        out: int32.

    Returns:
        how many were written, and how many have keys >= high: count << 16 | above.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number, word = ir.IntType(32), ir.IntType(16)
        lanes = ir.VectorType(number, 16)
        zeros = ir.Constant(lanes, ir.Undefined)
        every = ir.Constant(lanes, [0] * 16)

        def spread(value: Any) -> Any:
            first = builder.insert_element(zeros, value, number(0))
            return builder.shuffle_vector(first, zeros, every)

        def place(which: int) -> Any:
            data = context.make_array(signature.args[which])(context, builder, arguments[which]).data
            return builder.gep(data, [arguments[which + 1]])

        bits = builder.load(builder.bitcast(place(0), lanes.as_pointer()))
        bits.align = 4
        bits = builder.and_(bits, spread(arguments[2]))
        shift, magnitude = ir.Constant(lanes, [31] * 16), ir.Constant(lanes, [2**31 - 1] * 16)
        key = builder.xor(bits, builder.and_(builder.ashr(bits, shift), magnitude))
        below = builder.icmp_signed("<", key, spread(arguments[4]))
        wanted = builder.and_(below, builder.icmp_signed(">=", key, spread(arguments[3])))
        where = builder.bitcast(place(5), number.as_pointer())
        flags = wanted.type
        kind = ir.FunctionType(ir.VoidType(), [lanes, where.type, flags])
        store = cgutils.get_or_insert_function(builder.module, kind, "llvm.masked.compressstore.v16i32")
        builder.call(store, [bits, where, wanted])
        kind = ir.FunctionType(word, [word])
        ones = cgutils.get_or_insert_function(builder.module, kind, "llvm.ctpop.i16")

        def count(lane_flags: Any) -> Any:
            return builder.zext(builder.call(ones, [builder.bitcast(lane_flags, word)]), number)

        written, above = count(wanted), builder.sub(number(16), count(below))
        return builder.or_(builder.shl(written, number(16)), above)

    integer = types.int32
    return integer(source, types.intp, integer, integer, integer, out, types.intp), generate
