"""Which values of a network may share memory, and where it is written in place."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from ...graph.fx import operation_name, written
from .facts import VIEWS, quantizer_of

# The result may share memory with the input: always, or where there is nothing to do (a dropout in eval mode).
_MAY_ALIAS = VIEWS | frozenset(
    "alias as_strided broadcast_to conj data diagonal expand_as H hsplit vsplit dsplit imag mH moveaxis mT positive "
    "ravel real reshape_as split_with_sizes swapaxes swapdims T tensor_split unflatten unfold unsafe_chunk "
    "unsafe_split view_as requires_grad_ detach_ to type type_as float double half bfloat16 cpu cuda pin_memory "
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout "
    "Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout".split()
)
_SIZES = frozenset("size dim ndimension numel".split())


def _shares_memory_with(node: Node, model: GraphModule) -> Node | None:
    """The input that a node's value may share memory with."""
    changed = written(node, model)
    if changed is not None or not node.all_input_nodes:
        return changed
    name = str(node.args[1]) if node.target is getattr else operation_name(node, model)
    schema = node.target._schema if isinstance(node.target, torch._ops.OpOverload) else None
    view = schema is not None and any(result.alias_info is not None for result in schema.returns)
    # a quantizer that observes returns its input
    return node.all_input_nodes[0] if view or name in _MAY_ALIAS or quantizer_of(node, model) is not None else None


def read_sizes_early(model: GraphModule) -> None:
    """Read the size of a value when it is made: to read it late would keep the value for nothing else."""
    for node in list(model.graph.nodes):
        size = node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device")
        if len(node.all_input_nodes) == 1 and (size or (node.op == "call_method" and node.target in _SIZES)):
            node.all_input_nodes[0].append(node)


class Memory:
    """Which values of a graph may share memory, and where it is written."""

    def __init__(self, model: GraphModule) -> None:
        self.order = {node: i for i, node in enumerate(model.graph.nodes)}
        self._first: dict[Node, Node] = {}
        self._members: dict[Node, list[Node]] = {}
        self._writers: dict[Node, list[Node]] = {}
        for node in model.graph.nodes:
            source = _shares_memory_with(node, model)
            first = node if source is None else self._first[source]
            self._first[node] = first
            self._members.setdefault(first, []).append(node)
            if written(node, model) is not None:
                self._writers.setdefault(first, []).append(node)

    def last_write(self, node: Node, reader: Node) -> Node:
        """The last node before `reader` that changes the value of `node` after it was made; else `node` itself."""
        between = [w for w in self._writers.get(self._first[node], ()) if node is not w and self._in(node, w, reader)]
        return between[-1] if between else node

    def _in(self, first: Node, node: Node, last: Node) -> bool:
        return self.order[first] < self.order[node] < self.order[last]

    def can_read_copy(self, node: Node, reader: Node) -> bool:
        """Whether `reader` may read a copy of `node`: nothing written through one is read through the other after."""
        first = self._first[node]
        copied: set[Node] = set()
        if self._first[reader] is first:
            copied.add(reader)
            for member in self._members[first]:
                if self.order[member] > self.order[reader] and copied.intersection(member.all_input_nodes):
                    copied.add(member)
        rest = set(self._members[first]) - copied
        for writer in self._writers.get(first, ()):
            if self.order[writer] < self.order[reader]:
                continue
            others = rest if writer in copied else copied
            if any(self.order[user] > self.order[writer] for other in others for user in other.users):
                return False
        return True
