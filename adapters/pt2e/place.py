"""Between an exported graph and the judge of placement.

The rules are the judge's (`host.placement`), as in FX. Where the two hosts still differ, because export sees another
program than FX's tracer:

- `x.add(y)` is taken for `x + y`, `x.div(y)` for `x / y`: a non-strict export does not tell them apart.
- a module registered under two names is called by the one it is called with, in FX by the first.
- weights of F.conv2d and F.linear: FX fakes their quantization while calibrating, here no weight's is.
- Export looks into custom subclasses of torch.nn layers as FX does, but a parameterless nn.Identity leaves no trace.
- In QAT torchao runs conv and batch norm as conv, division and batch norm, FX as one module: the same sites, whose
  tensors differ in the last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from dqa_plugins.graph.operations import Operation, Value
from dqa_plugins.host.placement import Placement, Site, judge
from dqa_plugins.method import Method

from .names import Unit, named_units


@dataclass
class Described:
    """An exported graph as operations, and the way back.

    Args:
        operations: in order of execution.
        units: {operation: the call of the graph that it describes}.
    """

    operations: list[Operation]
    units: dict[Operation, Unit]

    def reading(self, site: Site) -> list[Node] | None:
        """The nodes that read a site's quantized value; None: all."""
        if site.readers is None:
            return None
        nodes = [node for reader in site.readers for node in self.units[reader].nodes]
        return [node for node in nodes if site.value.key in node.all_input_nodes]


def describe(graph: Graph) -> Described:
    """The operations of an exported graph, whose calls have names."""
    calls = named_units(graph)
    values: dict[Node, Value] = {}
    operations, units = [], {}
    first = {unit.nodes[-1]: unit for unit in calls}
    for node in graph.nodes:
        if node.op == "get_attr":
            made = (_value(node, values),)
            operations.append(Operation("", "parameter", str(node.target), outputs=made, site=str(node.target)))
        elif node.op == "output":
            inputs = tuple(_value(n, values) for n in node.all_input_nodes)
            operations.append(Operation("", "output", inputs=inputs))
        elif node in first:
            unit = first[node]
            operations.append(_operation(unit, values))
            units[operations[-1]] = unit
    return Described(operations, units)


def place(
    described: Described,
    method_of: Callable[[Operation], Method | None],
    overrides: Mapping[str, Method | None],
) -> Placement:
    """Ask the judge about an exported graph; changes nothing.

    Args:
        described: the graph.
        method_of: the method of an operation, None to leave it float.
        overrides: {site or module: method or None}, as the user set them.
    """
    return judge(described.operations, method_of, overrides=overrides)


def _operation(unit: Unit, values: dict[Node, Value]) -> Operation:
    outputs = tuple(_value(node, values) for node in unit.outputs)
    if unit.how == "input":
        return Operation("", "input", unit.path, outputs=outputs, site=unit.site)
    sources = unit.sources()
    written = {node.args[0] for node in unit.nodes if _writes(node)}
    last = unit.nodes[-1]
    return Operation(
        unit.op,
        unit.how,
        unit.path,
        unit.types,
        tuple(_value(node, values) for node in sources),
        outputs,
        unit.site,
        tuple(a for a in last.args if not isinstance(a, Node)),
        {k: a for k, a in last.kwargs.items() if not isinstance(a, Node)},
        tuple(_value(node, values) for node in dict.fromkeys(sources) if node in written),
    )


def _writes(node: Node) -> bool:
    """Whether an aten operator changes its first argument."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.arguments:
        return False
    alias = schema.arguments[0].alias_info
    return alias is not None and alias.is_write


def _value(node: Node, values: dict[Node, Value]) -> Value:
    if node not in values:
        tensor: Any = node.meta.get("val")
        single = not isinstance(tensor, list | tuple)
        if isinstance(tensor, torch.Tensor):
            values[node] = Value(node, _sizes(tensor), tensor.is_floating_point())
        else:
            values[node] = Value(node, floating=not single, single=single)
    return values[node]


def _sizes(tensor: torch.Tensor) -> tuple[int | None, ...]:
    """A shape in numbers; dynamic sizes as they were in the example inputs."""
    return tuple(size if isinstance(size, int) else getattr(size.node, "hint", None) for size in tensor.shape)
