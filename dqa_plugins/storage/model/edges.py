"""Which values of a model live long: read once, then read again after other layers ran.

Those are the stored activations of the DQA paper: residual shortcuts, U-Net skips. A network's inputs are left alone,
because the caller holds them anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from ...graph.fx import operation_name
from .facts import VIEWS, computes, quantizer_of
from .memory import Memory


@dataclass(frozen=True)
class Edge:
    """A value that must stay in memory while other layers run.

    Args:
        name: of the site that makes it.
        shape, dtype: of the value for the example inputs.
        lifetime: compute layers that run while it waits, up to the last late reader.
        readers: the operations that read it late.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    lifetime: int
    readers: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes as floats."""
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


def _passes_on(node: Node, model: GraphModule) -> bool:
    """Whether a node's value is that of its input: a view, or its quantized form."""
    if not node.all_input_nodes:
        return False
    return operation_name(node, model) in VIEWS or quantizer_of(node, model) is not None


def _root(node: Node, model: GraphModule) -> Node:
    """The node that made this one's value."""
    while _passes_on(node, model):
        node = node.all_input_nodes[0]
    return node


def _first_read(root: Node, model: GraphModule, order: dict[Node, int]) -> int:
    """Where the value of a node is first read, by something that does more than to pass it on."""
    reads, queue = [len(order)], [root]
    while queue:
        for user in queue.pop().users:
            if _passes_on(user, model):
                queue.append(user)
            else:
                reads.append(order[user])
    return min(reads)


def _siblings(node: Node, reader: Node, model: GraphModule, order: dict[Node, int]) -> int:
    """Layers that read `node` before `reader` does, but do not lead to it: they could as well run after it.

    Query, key and value projections read one tensor, one after the other: it is not long-lived for that.
    """
    before = [u for u in node.users if order[u] < order[reader] and computes(u, model)]
    if not before or not computes(reader, model):
        return 0
    ancestors, stack = set(), [reader]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in ancestors and order[source] > order[node]:
                ancestors.add(source)
                stack.append(source)
    return sum(u not in ancestors for u in before)


@dataclass(frozen=True)
class LateRead:
    """A late reader of a value.

    Args:
        reader: the operation.
        waited: layers that ran while the value waited for it.
        final: the value's node, or the operation that changed it last in place before.
    """

    reader: Node
    waited: int
    final: Node


def late_reads(model: GraphModule, min_lifetime: int, storable: Callable[[Node], bool]) -> dict[Node, list[LateRead]]:
    """The late reads of every long-lived value.

    Late: the value, or what it is a view of, was read before, and since it was made at least `min_lifetime` compute
    layers ran.
    """
    memory = Memory(model)
    nodes, order = list(model.graph.nodes), memory.order
    done = [0]
    for node in nodes:
        done.append(done[-1] + computes(node, model))
    found: dict[Node, list[LateRead]] = {}
    constant: set[Node] = set()  # made from parameters alone: a dequantized weight
    for node in nodes:
        if node.op != "placeholder" and all(source in constant for source in node.all_input_nodes):
            constant.add(node)
            continue
        root = _root(node, model)
        if node.op in ("placeholder", "get_attr", "output") or root.op in ("placeholder", "get_attr"):
            continue
        if not storable(node):
            continue
        first = _first_read(root, model, order)
        late = []
        for user in sorted(node.users, key=order.__getitem__):
            final = memory.last_write(node, user)
            waited = done[order[user]] - done[order[final] + 1]
            waited -= _siblings(node, user, model, order) if waited >= min_lifetime else 0
            if waited < min_lifetime or first >= order[user] or user.op == "output":
                continue
            if memory.can_read_copy(node, user):
                late.append(LateRead(user, waited, final))
        if late:
            found[node] = late
    return found
