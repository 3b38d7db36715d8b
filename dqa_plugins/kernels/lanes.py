"""Vectors of 16 float32 values, which numba itself does not offer: one register with AVX-512, two or four without.

Requirements this file meets:

- What is written as 16 lanes runs as 16 lanes: the compiler need not prove that arrays do not overlap.
- Nothing is checked. A load that is not wanted (`wanted` is 0) reads the array's first 16 values and gives zeros.
- Multiplications and additions may be contracted to fused ones, where the machine has them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.extending import intrinsic, models, overload, register_model

WIDTH = 16
_VECTOR = ir.VectorType(ir.FloatType(), WIDTH)


class LanesType(types.Type):
    """numba's type of 16 float32 values."""

    def __init__(self) -> None:
        super().__init__(name="float32x16")


lanes_type = LanesType()


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, _VECTOR)


def _address(context: Any, builder: Any, array_type: Any, array: Any, offset: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [offset]), _VECTOR.as_pointer())


def _splat(builder: Any, value: Any) -> Any:
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    mask = ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), [0] * WIDTH)
    return builder.shuffle_vector(one, one, mask)


@intrinsic
def load(typing_context: Any, array: Any, offset: Any, wanted: Any) -> Any:
    """The values array[offset : offset + 16] of a contiguous float32 array; zeros where `wanted` is False."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, offset, wanted = arguments
        safe = builder.select(wanted, offset, ir.Constant(offset.type, 0))
        found = builder.load(_address(context, builder, signature.args[0], array, safe))
        found.align = 4
        return builder.select(wanted, found, ir.Constant(_VECTOR, [0.0] * WIDTH))

    return lanes_type(array, types.intp, types.boolean), generate


@intrinsic
def store(typing_context: Any, array: Any, offset: Any, value: Any) -> Any:
    """Write array[offset : offset + 16] of a contiguous float32 array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[2], _address(context, builder, signature.args[0], *arguments[:2])).align = 4
        return context.get_dummy_value()

    return types.void(array, types.intp, lanes_type), generate


@intrinsic
def positive(typing_context: Any, value: Any) -> Any:
    """The larger of each lane and 0; NaN stays NaN."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        zeros = ir.Constant(_VECTOR, [0.0] * WIDTH)
        return builder.select(builder.fcmp_ordered("<", arguments[0], zeros), zeros, arguments[0])

    return lanes_type(lanes_type), generate


def _arithmetic(name: str) -> Callable[..., Any]:
    @intrinsic
    def operation(typing_context: Any, left: Any, right: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            left, right = arguments
            if not isinstance(signature.args[0], LanesType):
                left = _splat(builder, left)
            return getattr(builder, name)(left, right, flags=("contract",))

        return lanes_type(left, right), generate

    return operation


_add, _subtract, _multiply = _arithmetic("fadd"), _arithmetic("fsub"), _arithmetic("fmul")


@overload(operator.add, inline="always")
def _overload_add(a, b):  # type: ignore[no-untyped-def]
    if isinstance(a, LanesType) and isinstance(b, LanesType):
        return lambda a, b: _add(a, b)
    return None


@overload(operator.sub, inline="always")
def _overload_sub(a, b):  # type: ignore[no-untyped-def]
    if isinstance(a, LanesType) and isinstance(b, LanesType):
        return lambda a, b: _subtract(a, b)
    return None


@overload(operator.mul, inline="always")
def _overload_mul(a, b):  # type: ignore[no-untyped-def]
    """float32 scalar times lanes."""
    if a == types.float32 and isinstance(b, LanesType):
        return lambda a, b: _multiply(a, b)
    return None


def block_product(rows: int, vectors: int) -> Any:
    """An intrinsic for rows x (16 * vectors) values of a matrix product, which stay in registers throughout.

    It takes (a, a_at, a_step, b, b_at, b_step, c, c_at, c_step, depth): contiguous float32 arrays, where the block
    begins in each, the distance between rows, and the length of the sums, at least 1. It writes c = a b. With 24
    values of 16 lanes and a few more for a and b, the 32 registers of AVX-512 are filled (`wide`).
    """

    @intrinsic
    def product(  # type: ignore[no-untyped-def]
        typing_context, a, a_at, a_step, b, b_at, b_step, c, c_at, c_step, depth
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            a, a_at, a_step, b, b_at, b_step, c, c_at, c_step, depth = arguments
            types_ = signature.args
            data = context.make_array(types_[0])(context, builder, a).data
            integer = a_at.type
            starts = [builder.add(a_at, builder.mul(a_step, ir.Constant(integer, r))) for r in range(rows)]
            lines = [builder.gep(data, [start]) for start in starts]
            before = builder.basic_block
            loop, done = builder.append_basic_block("product"), builder.append_basic_block("product_done")
            builder.branch(loop)
            builder.position_at_end(loop)
            k = builder.phi(integer)
            sums = [[builder.phi(_VECTOR) for _ in range(vectors)] for _ in range(rows)]
            at = builder.add(b_at, builder.mul(k, b_step))
            right = []
            for j in range(vectors):
                where = builder.add(at, ir.Constant(integer, j * WIDTH))
                right.append(builder.load(_address(context, builder, types_[3], b, where)))
                right[-1].align = 4
            following = builder.add(k, ir.Constant(integer, 1))
            k.add_incoming(ir.Constant(integer, 0), before)
            k.add_incoming(following, loop)
            totals = []
            for r in range(rows):
                left = _splat(builder, builder.load(builder.gep(lines[r], [k])))
                for j in range(vectors):
                    term = builder.fmul(left, right[j], flags=("contract",))
                    total = builder.fadd(sums[r][j], term, flags=("contract",))
                    sums[r][j].add_incoming(ir.Constant(_VECTOR, [0.0] * WIDTH), before)
                    sums[r][j].add_incoming(total, loop)
                    totals.append((r, j, total))
            builder.cbranch(builder.icmp_signed("<", following, depth), loop, done)
            builder.position_at_end(done)
            for r, j, total in totals:
                where = builder.add(c_at, builder.mul(c_step, ir.Constant(integer, r)))
                where = builder.add(where, ir.Constant(integer, j * WIDTH))
                builder.store(total, _address(context, builder, types_[6], c, where)).align = 4
            return context.get_dummy_value()

        at = types.intp
        return types.void(a, at, at, b, at, at, c, at, at, at), generate

    return product


def wide() -> bool:
    """True where 16 lanes are one register and there are 32 of them: AVX-512."""
    return bool(get_host_cpu_features().get("avx512f"))
