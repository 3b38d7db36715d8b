"""An NNCF graph as operations, and the way back to NNCF's operations and ports.

A call of one of torch's own modules is one operation, whatever NNCF sees of its inside (six operations in a
MultiheadAttention); all other operations are calls of functions.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

from nncf.common.graph.graph import NNCFGraph, NNCFNode
from nncf.common.graph.layer_attributes import Dtype
from nncf.torch.function_hook.graph.graph_utils import TensorMeta
from torch import nn

from dqa_plugins.graph.names import SiteNames
from dqa_plugins.graph.operations import Operation, Value, function_name

from .names import Calls, is_hook

INPUT, OUTPUT, CONST = "nncf_model_input", "nncf_model_output", "nncf_model_const"
_IN_PLACE = frozenset("iadd isub imul itruediv ifloordiv ipow iand ior ixor imod setitem".split())


@dataclass(eq=False)
class Tensor:
    """A tensor of an NNCF graph.

    Args:
        nodes: NNCF's operation that makes it; several where a shared hook makes the same of it for each reader.
        port: of its output.
        edges: (operation, input port) that read it.
    """

    nodes: list[NNCFNode]
    port: int
    edges: list[tuple[NNCFNode, int]] = field(default_factory=list)


@dataclass(eq=False)
class _Unit:
    """The nodes of one operation."""

    nodes: list[NNCFNode] = field(default_factory=list)
    leaf: str | None = None  # path of the module


@dataclass
class Described:
    """The operations of a graph, and NNCF's names of each: {operation: names}. Keys of values are `Tensor`s."""

    operations: list[Operation] = field(default_factory=list)
    names: dict[Operation, list[str]] = field(default_factory=dict)


def describe(graph: NNCFGraph, model: nn.Module, calls: Calls) -> Described:
    """Describe a graph in NNCF's order, which is that of execution.

    Args:
        graph: of the model.
        model: wrapped by NNCF.
        calls: the modules around each operation.
    """
    return _Description(graph, model, calls).run()


class _Description:
    def __init__(self, graph: NNCFGraph, model: nn.Module, calls: Calls) -> None:
        self.graph, self.model, self.calls = graph, model, calls
        self.nodes = sorted(graph.get_all_nodes(), key=lambda node: node.node_id)
        self.units: dict[int, _Unit] = {}
        self.values: dict[Any, Value] = {}
        self._divide()

    def _divide(self) -> None:
        leaves: dict[tuple[str, int], _Unit] = {}
        for node in self.nodes:
            leaf = self.calls.leaves.get(node.node_name)
            if self._is_hook(node):
                unit = self.units[self._source(node).from_node.node_id]
            elif leaf is not None:
                unit = leaves.setdefault(leaf, _Unit(leaf=leaf[0]))
            else:
                unit = _Unit()
            unit.nodes.append(node)
            self.units[node.node_id] = unit

    def _is_hook(self, node: NNCFNode) -> bool:
        """SmoothQuant's multiplication: what it gives is still the tensor that it is hooked to."""
        return is_hook(self.calls.enclosing.get(node.node_name, "")) and self._source(node) is not None

    def _source(self, node: NNCFNode) -> Any:
        edges = self.graph.get_input_edges(node)
        return next((e for e in edges if e.from_node.node_type != CONST and e.from_node.node_id in self.units), None)

    def run(self) -> Described:
        found, inputs = Described(), 0
        parameters = list(inspect.signature(self.model.forward).parameters)
        names = SiteNames(unit.leaf for unit in self.units.values() if unit.leaf)
        done: set[_Unit] = set()
        for node in self.nodes:
            unit = self.units[node.node_id]
            if unit in done:
                continue
            done.add(unit)
            if node.node_type == INPUT:
                # FX counts all parameters of forward, NNCF only those that got a tensor
                position = parameters.index(node.node_name) if node.node_name in parameters else inputs
                inputs += 1
                site = f"input.{position}"
                operation = Operation("", "input", site, outputs=self._outputs(unit), site=site)
            elif node.node_type == CONST:
                site = node.node_name
                operation = Operation("", "parameter", site, outputs=self._outputs(unit), site=site)
            elif node.node_type == OUTPUT:
                operation = Operation("", "output", inputs=self._inputs(unit))
            else:
                operation = self._call(unit, names)
            found.operations.append(operation)
            found.names[operation] = [n.node_name for n in unit.nodes]
        return found

    def _call(self, unit: _Unit, names: SiteNames) -> Operation:
        node, inputs = unit.nodes[0], self._inputs(unit)
        if unit.leaf is not None:
            module = self.model.get_submodule(unit.leaf)
            writes = inputs[:1] if getattr(module, "inplace", False) else ()
            site = names.module(unit.leaf)
            kind = type(module).__name__
            return Operation(kind, "module", unit.leaf, (), inputs, self._outputs(unit), site, writes=writes)
        attributes: Any = node.layer_attributes
        op, around = function_name(attributes.func, node.node_type), self.calls.enclosing.get(node.node_name, "")
        keywords = {k: a for k, a in attributes.op_kwargs.items() if not _holds_tensors(a)}
        spelled = op.strip("_")
        in_place = spelled in _IN_PLACE or (op.endswith("_") and not op.endswith("__")) or keywords.get("inplace")
        return Operation(
            op,
            "operator" if op.startswith("__") else "function",
            around,
            (),
            inputs,
            self._outputs(unit),
            names.operation(around, op),
            tuple(a for a in attributes.op_args if not _holds_tensors(a)),
            keywords,
            inputs[:1] if in_place else (),
        )

    def _value(self, node: NNCFNode, port: int) -> Value:
        key: Any = (node.node_id, port)
        if self._is_hook(node):  # one module hooked in front of several readers: the same tensor for all
            source = self._source(node)
            key = (self.calls.enclosing[node.node_name], source.from_node.node_id, source.output_port_id)
        edges = self.graph.get_output_edges_by_port_id(node, port)
        if key not in self.values:
            shape = tuple(edges[0].tensor_shape) if edges else None
            self.values[key] = Value(Tensor([], port), shape, not edges or edges[0].dtype == Dtype.FLOAT)
        tensor = self.values[key].key
        if node not in tensor.nodes:
            tensor.nodes.append(node)
            inside = self.units[node.node_id].nodes
            tensor.edges.extend((e.to_node, e.input_port_id) for e in edges if e.to_node not in inside)
        return self.values[key]

    def _outputs(self, unit: _Unit) -> tuple[Value, ...]:
        """What others read of a unit, in order; what its last node gives where nothing is read."""
        found: dict[Value, None] = {}
        for node in unit.nodes:
            outside = [e for e in self.graph.get_output_edges(node) if e.to_node not in unit.nodes]
            for port in sorted({e.output_port_id for e in outside}):
                found[self._value(node, port)] = None
        return tuple(found) or (self._value(unit.nodes[-1], 0),)

    def _inputs(self, unit: _Unit) -> tuple[Value, ...]:
        found: list[Value] = []
        for node in unit.nodes:
            for edge in self.graph.get_input_edges(node):
                parameter = edge.from_node.node_type == CONST and unit.leaf is not None
                if edge.from_node in unit.nodes or parameter:
                    continue
                value = self._value(edge.from_node, edge.output_port_id)
                if value not in found or unit.leaf is None:
                    found.append(value)
        return tuple(found)


def _holds_tensors(argument: Any) -> bool:
    if isinstance(argument, list | tuple):
        return any(_holds_tensors(a) for a in argument)
    return isinstance(argument, TensorMeta)
