"""Which values share memory, and which are written in place after they were made.

A quantizer copies. Where a value, or a view of it, is written in place later and what was there before is read again,
a copy made before the write lacks it: `mask = zeros(8); mask[4:] = 7; x + mask`.
"""

from __future__ import annotations

from collections.abc import Sequence

from .operations import Operation, Value


def memory(operations: Sequence[Operation]) -> dict[Value, Value]:
    """For every value the one whose memory it may share: itself, or what it is a view or an in-place result of."""
    root: dict[Value, Value] = {}
    for op in operations:
        for value in op.outputs:
            source = value
            if op.writes:
                source = op.writes[0]
            elif op.how not in ("input", "parameter", "output") and op.facts.views and op.inputs:
                source = op.inputs[0]
            root[value] = root.get(source, source)
    return root


def dropped_writes(operations: Sequence[Operation]) -> list[Operation]:
    """In-place operations whose result nothing reads, but whose memory is read again through another value.

    A host that removes dead code without looking at memory (torch.fx) removes them, and the write is lost.

    Args:
        operations: in order of execution.
    """
    root = memory(operations)
    read = {value for op in operations for value in op.inputs}
    found = []
    for i, op in enumerate(operations):
        if op.writes and not any(value in read for value in op.outputs):
            shared = {root.get(value, value) for value in op.writes}
            if any(root.get(v, v) in shared for later in operations[i + 1 :] for v in later.inputs):
                found.append(op)
    return found


def written_later(operations: Sequence[Operation]) -> set[Value]:
    """Values of which a copy would lose a write: some alias is written in place later, and one of before read again.

    `y += x` alone is none of these, as long as what follows reads its result.

    Args:
        operations: in order of execution.
    """
    root = memory(operations)
    made: dict[Value, int] = {value: i for i, op in enumerate(operations) for value in op.outputs}
    read_last: dict[Value, int] = {}
    for i, op in enumerate(operations):
        for value in op.inputs:
            read_last[value] = i
    sharing: dict[Value, list[Value]] = {}
    for value, source in root.items():
        sharing.setdefault(source, []).append(value)
    found: set[Value] = set()
    for i, op in enumerate(operations):
        for written in op.writes:
            before = [value for value in sharing.get(root.get(written, written), ()) if made[value] < i]
            if any(read_last.get(value, -1) > i for value in before):
                found.update(before)
    return found
