"""Which values are no activations: parameters, positions, masks, logits with masks, and what norms compute inside."""

from __future__ import annotations

from collections.abc import Sequence

from .operations import Operation, Value

CONSTANT = "made from parameters, constants or positions only"
INTEGER = "integers or booleans"
MASK = "made from integers or booleans only, as a mask is"
INTERNAL = "computed inside a norm"
LOGITS = "logits of a softmax with a mask or bias added: their range would be the mask's"

_STATISTICS = frozenset(("mean", "sum", "var", "std", "norm", "linalgvectornorm"))
_SPREADS = frozenset(("var", "std", "norm", "linalgvectornorm"))  # of the tensor itself, not of its squares
_ROOTS = frozenset(("sqrt", "rsqrt", "reciprocal"))


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


def masked_logits(operations: Sequence[Operation]) -> set[Operation]:
    """Additions whose results only a softmax reads: attention adds masks there, whose values are -10000 or -3e38.

    Args:
        operations: in order of execution.
    """
    found: set[Operation] = set()
    for op in reversed(operations):
        if op.name in ("add", "sub") and _only_softmax_reads(op, found):
            found.add(op)
    return found


def _only_softmax_reads(op: Operation, logits: set[Operation]) -> bool:
    readers = [reader for value in op.outputs for reader in value.readers]
    return bool(readers) and all(
        "softmax" in r.name or r in logits or (r.kind == "moves" and _only_softmax_reads(r, logits)) for r in readers
    )


def norm_internals(operations: Sequence[Operation], constants: dict[Value, str]) -> set[Operation]:
    """Operations inside norms that are written out: x * rsqrt(mean(x ** 2) + eps) * weight.

    Between the tensor that is normalized and the last operation (the product, the multiplication by a weight, the
    addition of a bias) nothing is an activation: not x ** 2, its mean, the root, nor the product without the weight.

    Args:
        operations: in order of execution.
        constants: see `no_activations`.
    """
    inside: set[Operation] = set()
    for op in operations:
        if op in inside or not (_is_root(op) or op.name in _SPREADS) or not op.inputs or op.inputs[0] in constants:
            continue
        above: set[Operation] = set()
        if _statistic(op, constants, above):
            below = _products(op, constants)
            if below is not None:
                inside |= above | below
    return inside


def _is_root(op: Operation) -> bool:
    return op.name in _ROOTS or (op.name == "pow" and op.arguments[:1] in ((0.5,), (-0.5,)))


def _shifts(op: Operation, constants: dict[Value, str]) -> bool:
    """x + eps, max(x, eps), a cast: one activation and constants."""
    if op.name in ("clamp", "clampmin", "maximum") or (op.facts.kind == "moves" and op.inputs):
        return True
    return op.name in ("add", "mul", "div") and sum(value not in constants for value in op.inputs) == 1


def _squares(op: Operation) -> bool:
    return op.name in ("pow", "square") or (op.name == "mul" and len(op.inputs) == 2 and len(set(op.inputs)) == 1)


def _statistic(op: Operation, constants: dict[Value, str], chain: set[Operation]) -> bool:
    """Collect what leads to a root from the tensor that is normalized; False if it is no second moment of one."""
    chain.add(op)
    if op.name in _SPREADS:
        return True
    above = next((value.producer for value in op.inputs if value not in constants), None)
    if above is None:
        return False
    if op.name in ("mean", "sum"):
        if not _squares(above):
            return False
        chain.add(above)
        centred = above.inputs[0].producer
        if centred is not None and centred.name == "sub" and len(centred.inputs) == 2:
            mean = centred.inputs[1].producer
            if mean is not None and mean.name == "mean":
                chain.update((centred, mean))
        return True
    if _is_root(above) or above.name in _STATISTICS or _shifts(above, constants):
        return _statistic(above, constants, chain)
    return False


def _products(root: Operation, constants: dict[Value, str]) -> set[Operation] | None:
    """The product of tensor and root and what follows it, but for the last, the norm's result; None: no product."""
    inside, queue, multiplied = {root}, [root], False
    while queue:
        for op in [reader for value in queue.pop().outputs for reader in value.readers]:
            both = sum(value not in constants for value in op.inputs) > 1
            if op.name in ("mul", "div") and both:
                multiplied = True
            elif op.how == "output" or not (_is_root(op) or _shifts(op, constants)):
                continue
            if op not in inside and (not multiplied or _scaled(op, constants)):
                inside.add(op)
                queue.append(op)
    return inside if multiplied else None


def _scaled(op: Operation, constants: dict[Value, str]) -> bool:
    """Whether all that reads the result multiplies it by, or adds, a parameter, through at most casts."""
    readers = [reader for value in op.outputs for reader in value.readers]
    while readers and all(r.facts.kind == "moves" and r.facts.channels == "same" for r in readers):
        readers = [r for reader in readers for value in reader.outputs for r in value.readers]
    return bool(readers) and all(
        r.name in ("mul", "add") and any(v in constants for v in r.inputs) and _shifts(r, constants) for r in readers
    )
