"""Which axis of a tensor holds its channels, from what makes it and from what reads it.

- A layer says it of what it makes (convolution: 1, Linear: the last) and of what it reads: a Linear behind a network's
  input of shape (B, L, D) says the last.
- Elementwise operations hand it on: the last if any operand says the last; parameters do not count.
- Transpose and permute move it, slices and views keep it where shapes tell that they do.
- In a product of two activations (B, H, L, D) @ (B, H, D, L) the last axis of the result is that of the second
  operand: tokens, not channels; nothing tells then.

Axes are counted from the front, but the last one is -1, so that it stays the last in tensors of another rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .operations import Operation, Value

DEFAULT = 1
NOTHING_TELLS = "nothing that makes or reads it tells its channels: axis 1 is taken"
ON_SAMPLES = "its channels are on axis 0, where a quantizer has its samples: the last axis is taken"


@dataclass(frozen=True)
class Axis:
    """The channel axis of a tensor.

    Args:
        axis: from the front, or -1 for the last.
        reason: what told it.
        told: False where nothing did, and `axis` is the default.
    """

    axis: int
    reason: str
    told: bool = True


def channel_axes(operations: Sequence[Operation], constants: Iterable[Value] = ()) -> dict[Value, Axis]:
    """The channel axis of every value.

    Args:
        operations: in order of execution.
        constants: values that are no activations (parameters, masks, positions): they tell nothing.
    """
    ignored = frozenset(constants)
    made: dict[Value, int | None] = {}
    _forward(operations, made, {}, ignored)
    read = _backward(operations, made, ignored)
    made.clear()
    _forward(operations, made, read, ignored)
    found = {}
    for operation in operations:
        for value in operation.outputs:
            axis = made.get(value)
            if axis is None:
                found[value] = Axis(DEFAULT, NOTHING_TELLS, told=False)
            elif axis == 0:
                found[value] = Axis(-1, ON_SAMPLES, told=False)
            elif operation.kind == "input" or (value in read and operation.facts.channels in ("", "moved")):
                found[value] = Axis(axis, f"read by {_reader(value, ignored)}")
            else:
                found[value] = Axis(axis, f"made by {operation.op or operation.how}")
    return found


def _reader(value: Value, ignored: frozenset[Value]) -> str:
    return next((reader.site or reader.op for reader in value.readers if reader.how != "output"), "nothing")


def _forward(
    operations: Sequence[Operation],
    made: dict[Value, int | None],
    read: dict[Value, int],
    ignored: frozenset[Value],
) -> None:
    """What each operation says of its results; where it says nothing, what their readers said."""
    for operation in operations:
        for value in operation.outputs:
            axis = made_axis(operation, value, made, ignored)
            made[value] = read.get(value) if axis is None else axis


def made_axis(
    op: Operation, value: Value, made: dict[Value, int | None], ignored: frozenset[Value] = frozenset()
) -> int | None:
    """The channel axis that an operation gives its result; None: it says nothing.

    Args:
        op: with shapes.
        value: one of its results.
        made: the axes of what it reads.
        ignored: values that are no activations.
    """
    channels = op.facts.channels if op.how not in ("input", "parameter", "output") else ""
    if channels == "1":
        return 1
    if channels == "last":
        return -1
    operands = [v for v in op.inputs if v not in ignored]
    if channels == "product":
        return _product(operands, made)
    if not operands:
        return None
    if channels == "same":
        # a full-rank operand tells more than one that is broadcast
        known = [made[v] for v in operands if made.get(v) is not None]
        return -1 if -1 in known else (known[0] if known else None)
    source, axis = operands[0], made.get(operands[0])
    if axis is None or channels not in ("moved", "reduced"):
        return None
    return _moved(op, source.shape, value.shape, axis)


def _product(operands: list[Value], made: dict[Value, int | None]) -> int | None:
    """Of (..., L, D) @ (..., D, K): the last, unless the second operand has its channels where it is contracted."""
    if len(operands) < 2:
        return -1
    second = operands[-1]
    axis = made.get(second)
    if axis is None or second.shape is None:
        return -1
    return None if axis not in (-1, len(second.shape) - 1) and len(second.shape) > 2 else -1


def _front(axis: int, rank: int) -> int:
    return axis + rank if axis < 0 else axis


def _named(position: int, rank: int, was: int) -> int:
    """A position as an axis: -1 for the last, but of two axes the second stays what it was called before."""
    if position == rank - 1 and (rank > 2 or was == -1):
        return -1
    return position


def _moved(op: Operation, before: Any, after: Any, axis: int) -> int | None:
    """Where an operation that moves or reduces axes puts the channels."""
    if before is None:
        return _without_shapes(op, axis)
    position = _front(axis, len(before))
    if not 0 <= position < len(before):
        return None
    order = _order(op, len(before))
    if order is not None:
        return _named(order.index(position), len(before), axis)
    if after is None:
        return None
    if op.facts.channels == "reduced":
        return _reduced(op, position, len(before), len(after), axis)
    if len(before) == len(after):  # a slice, a part, an expansion
        same = op.name not in ("reshape", "view", "viewas") or before[position] == after[position]
        if same:
            return _named(position, len(after), axis)
    return _reshaped(before, after, position, axis)


def _without_shapes(op: Operation, axis: int) -> int | None:
    if op.name in ("getitem", "chunk", "split", "narrow", "expand") and axis == -1:
        return -1
    return None


def _integers(op: Operation) -> list[int] | None:
    given: list[Any] = [*op.arguments, *op.keywords.values()]
    if len(given) == 1 and isinstance(given[0], list | tuple):
        given = list(given[0])
    return [int(d) for d in given] if all(isinstance(d, int) for d in given) else None


def _order(op: Operation, rank: int) -> list[int] | None:
    """The axes of the result as axes of the input, for operations that permute; None for others."""
    order = list(range(rank))
    if op.name in ("t", "mt", "adjoint") and rank >= 2:
        order[-1], order[-2] = order[-2], order[-1]
        return order
    if op.name not in ("transpose", "swapaxes", "swapdims", "permute"):
        return None
    given = _integers(op)
    if given is None or any(not -rank <= d < rank for d in given):
        return None
    if op.name == "permute":
        return [d % rank for d in given] if len(given) == rank else None
    if len(given) != 2:
        return None
    order[given[0]], order[given[1]] = order[given[1]], order[given[0]]
    return order


def _reduced(op: Operation, position: int, rank: int, left: int, was: int) -> int | None:
    if left == rank:  # keepdim
        return _named(position, rank, was)
    dims = op.keywords.get("dim", op.arguments[0] if op.arguments else None)
    dims = [dims] if isinstance(dims, int) else dims
    if not isinstance(dims, list | tuple) or not all(isinstance(d, int) for d in dims):
        return None
    gone = {d % rank for d in dims}
    if position in gone:
        return None
    return _named(position - sum(d < position for d in gone), left, was)


def _reshaped(before: Sequence[Any], after: Sequence[Any], position: int, was: int) -> int | None:
    """The axis of the same size with as many elements in front; the last stays the last where it is split or merged."""
    if None not in before and None not in after:
        front = math.prod(before[:position])
        for i, size in enumerate(after):
            if size == before[position] and math.prod(after[:i]) == front:
                return _named(i, len(after), was)
    return -1 if position == len(before) - 1 else None


def _backward(
    operations: Sequence[Operation], made: dict[Value, int | None], ignored: frozenset[Value]
) -> dict[Value, int]:
    """What readers say of the values of which nothing else tells."""
    said: dict[Value, list[int]] = {}
    for op in reversed(operations):
        result = op.outputs[0] if op.outputs else None
        told = None
        if result is not None:
            told = made.get(result)
            if told is None and result in said:
                told = -1 if -1 in said[result] else said[result][0]
        for position, value in enumerate(op.inputs):
            axis = _read(op, value, told, result, [v for v in op.inputs[position + 1 :] if v not in ignored])
            if axis is not None and value not in ignored:
                said.setdefault(value, []).append(axis)
    return {value: -1 if -1 in axes else axes[0] for value, axes in said.items()}


def _read(op: Operation, value: Value, told: int | None, result: Value | None, behind: list[Value]) -> int | None:
    channels, kind = op.facts.channels, op.kind
    if kind in ("input", "parameter", "output", "creates", "looks up", "other"):
        return None
    if channels == "last":
        return -1
    if channels == "product":
        return None if behind or value is not op.inputs[0] else -1  # with an activation, it may contract tokens
    if channels == "1" and kind in ("computes", "norm"):
        return 1
    if told is None or result is None:
        return None
    if channels == "same":
        return told
    if channels == "1":
        return 1
    if value.shape is None or result.shape is None:
        return None
    rank = len(value.shape)
    order = _order(op, rank)
    if order is not None:
        place = _front(told, rank)
        return _named(order[place], rank, told) if 0 <= place < rank else None
    place = _front(told, len(result.shape))
    if channels == "moved" and len(result.shape) == rank and result.shape[place] == value.shape[place]:
        return _named(place, rank, told)
    if channels == "moved" and 0 <= place < len(result.shape):
        return _reshaped(result.shape, value.shape, place, told)
    return None
