"""Which values are no activations: parameters, constants, positions, masks, and what norms compute inside."""

from __future__ import annotations

from collections.abc import Sequence

from .operations import Operation, Value

CONSTANT = "made from parameters, constants or positions only"
INTEGER = "integers or booleans"
MASK = "made from integers or booleans only, as a mask is"
INTERNAL = "computed inside a norm"

_ROOTS = frozenset(("rsqrt", "sqrt", "pow", "reciprocal", "std", "linalgvectornorm", "norm"))
_STATISTICS = frozenset(("mean", "sum", "var", "std"))
_INSIDE = frozenset(("pow", "square", "mean", "sum", "var", "std", "sqrt", "rsqrt", "reciprocal"))


def no_activations(operations: Sequence[Operation]) -> dict[Value, str]:
    """The values that hold no activation, each with the reason.

    A computing operation or a look-up whose integers come from the network's inputs makes activations; of constants it
    makes constants: a learned position, or one that is looked up by `arange`.

    Args:
        operations: in order of execution.
    """
    found: dict[Value, str] = {}
    for op in operations:
        reason = _reason(op, found)
        for value in op.outputs:
            if reason is None and value.single and not value.floating:
                found[value] = INTEGER
            elif reason is not None:
                found[value] = reason
    return found


def _reason(op: Operation, found: dict[Value, str]) -> str | None:
    if op.how in ("input", "output"):
        return None
    if op.how == "parameter" or op.kind == "creates":
        return CONSTANT
    inherited = {found.get(value) for value in op.inputs}
    if not op.inputs:
        # a module or function without a tensor: random numbers, a table of positions
        return CONSTANT
    if inherited <= {CONSTANT}:
        return CONSTANT
    if None in inherited or op.kind in ("computes", "looks up", "opaque", "other"):
        return None
    return MASK


def norm_internals(operations: Sequence[Operation], constants: dict[Value, str]) -> set[Operation]:
    """Operations inside norms that are written out: x * rsqrt(mean(x ** 2) + eps) * weight.

    Between the tensor that is normalized and the last operation (the multiplication by the weight, the addition of the
    bias) nothing is an activation: not x ** 2, its mean, the root, nor the product without the weight.

    Args:
        operations: in order of execution.
        constants: see `no_activations`.
    """
    inside: set[Operation] = set()
    for op in operations:
        if op.name in _ROOTS and op.inputs and not op.inputs[0] in constants:
            chain = _up_to_the_tensor(op, constants)
            if any(o.name in _STATISTICS for o in chain):
                inside |= chain
                inside |= _down_to_the_last(op, constants, chain)
    return inside


def _single(op: Operation, constants: dict[Value, str]) -> bool:
    """Whether an operation reads one activation, possibly twice: x * x, x + eps."""
    return len({value for value in op.inputs if value not in constants}) == 1


def _up_to_the_tensor(root: Operation, constants: dict[Value, str]) -> set[Operation]:
    chain, queue = set(), [root]
    while queue:
        op = queue.pop()
        if op in chain:
            continue
        shift = op.name in ("add", "mul", "sub", "div", "clamp", "clampmin", "maximum", "to", "float", "type")
        centred = op.name == "sub" and any(v.producer and v.producer.name == "mean" for v in op.inputs[1:])
        if op.name in _INSIDE or op is root or centred or (shift and _single(op, constants)):
            chain.add(op)
            queue.extend(v.producer for v in op.inputs if v.producer and not (v in constants))
    # in front of the first statistic only squares and differences from the mean belong to the norm
    return {op for op in chain if op.name in _INSIDE or op is root or _leads_from_statistic(op, chain)}


def _leads_from_statistic(op: Operation, chain: set[Operation]) -> bool:
    if op.name == "sub" and any(v.producer and v.producer.name == "mean" for v in op.inputs[1:]):
        return True
    if op.name == "mul" and len(set(op.inputs)) == 1 and any(r.name in _STATISTICS for r in op.outputs[0].readers):
        return True
    return any(v.producer in chain and v.producer.name in _INSIDE for v in op.inputs if v.producer)


def _down_to_the_last(root: Operation, constants: dict[Value, str], chain: set[Operation]) -> set[Operation]:
    """The product of tensor and root, and what follows it, but for the last: that is the norm's result."""
    inside: set[Operation] = set()
    queue = [reader for value in root.outputs for reader in value.readers]
    while queue:
        op = queue.pop()
        if op in chain or op in inside or not op.outputs:
            continue
        if op.name in _INSIDE or op.name in ("to", "float", "type", "typeas", "clampmin", "clamp"):
            inside.add(op)
        elif not (op.name in ("mul", "div") and _affine_follows(op, constants)) and not (
            op.name in ("add", "mul") and _single(op, constants) and _affine_follows(op, constants)
        ):
            continue
        inside.add(op)
        queue.extend(op.outputs[0].readers)
    return inside


def _affine_follows(op: Operation, constants: dict[Value, str]) -> bool:
    """Whether all that reads the result multiplies it by, or adds, a constant, through at most a cast."""
    readers = list(op.outputs[0].readers)
    while readers and all(r.facts.kind == "moves" and r.facts.channels == "same" for r in readers):
        readers = [r for reader in readers for value in reader.outputs for r in value.readers]
    return bool(readers) and all(
        r.name in ("mul", "add") and _single(r, constants) and any(v in constants for v in r.inputs) for r in readers
    )
