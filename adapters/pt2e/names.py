"""Site names and operation names of the nodes of an exported graph.

FX sees modules and functions, an exported graph sees aten operators. Two entries of Node.meta lead back:
`nn_module_stack`, the modules around a call ('@1' in a key marks the second call), and `torch_fn` or, after a strict
export, `source_fn_stack`, the function that was called (torch 2.13). All nodes of one call are one `Unit`.

Names are written into Node.meta before prepare_pt2e folds batch norms: afterwards nobody knows that one was there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from dqa_plugins.graph.fx import sources
from dqa_plugins.graph.names import SiteNames

SITE = "dqa_site"  # key in Node.meta
TRAINED_NORM = "dqa_trained_norm"  # key in GraphModule.meta: a batch norm that was folded in training mode

# Export records the method that Python's operators end in, FX the operator.
_OPERATORS = {
    "__getitem__": "getitem",
    "__rsub__": "sub",
    "__rdiv__": "truediv",
    "__rpow__": "pow",
    "add_": "iadd",
    "mul_": "imul",
    "sub_": "isub",
    "div": "truediv",
    "div_": "itruediv",
    "floor_divide": "floordiv",
}


@dataclass(eq=False)
class Unit:
    """One call of a leaf module or of a function: what is a single node to FX.

    Args:
        op: class name of the module, or name of the function, method or operator.
        how: "module", "function" (torch.*, F.*), "method" (of a tensor) or "operator"; "input" for placeholders.
        path: qualified name of the module, of the module around a function.
        types: qualified class names of the modules around, innermost first.
        nodes: aten nodes, in order.
        site: the site's name.
    """

    op: str
    how: str
    path: str
    types: tuple[str, ...] = ()
    nodes: list[Node] = field(default_factory=list)
    site: str = ""

    @property
    def output(self) -> Node:
        """The node whose value is that of the call."""
        return self.outputs[0]

    @property
    def outputs(self) -> list[Node]:
        """The nodes that others read, in order: one, or the parts of a tuple; the last where nothing is read."""
        mine = set(self.nodes)
        return [node for node in self.nodes if any(user not in mine for user in readers(node))] or self.nodes[-1:]

    def sources(self) -> list[Node]:
        """The nodes of other calls that it reads, in the order of its arguments, parameters of modules left out.

        A node that one operator reads twice is there twice.
        """
        mine = set(self.nodes)
        found: list[Node] = []
        for node in self.nodes:
            outside = [n for n in sources(node) if n not in mine and not (self.how == "module" and n.op == "get_attr")]
            found.extend(n for n in outside if n not in found or len(self.nodes) == 1)
        return found


def readers(node: Node) -> list[Node]:
    """Users of a value that compute with it: no guards, no asserts, no sizes."""
    return [
        user
        for user in node.users
        if user.op == "output" or (user.op == "call_function" and isinstance(user.meta.get("val"), torch.Tensor | list))
    ]


def _class_name(kind: Any) -> str:
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"  # loaded programs hold strings


def _is_leaf(class_name: str) -> bool:
    """What FX's tracer does not look into."""
    return class_name.startswith(("torch.nn.", "torch.ao.nn.")) and not class_name.endswith(".Sequential")


def _function(node: Node) -> tuple[str, str]:
    """(how, op) of the function behind an aten node."""
    if node.target is getattr:
        return "function", "getattr"
    name = getattr(node.target, "__name__", str(node.target))
    if name == "getitem":  # chunk and split hand out their parts so, under their own torch_fn
        return "operator", "getitem"
    sources = node.meta.get("source_fn_stack")
    if sources:
        target = sources[-1][1]
        if isinstance(target, str):
            return "method", target
        how = "operator" if getattr(target, "__module__", "") in ("_operator", "operator") else "function"
        return how, getattr(target, "__name__", str(target))
    recorded = node.meta.get("torch_fn")
    if recorded is None:
        return "function", str(name).split(".")[0]
    holder, op = str(recorded[1]).split(".", 1)
    if holder in ("method_descriptor", "wrapper_descriptor") or op.startswith("__"):
        if op in _OPERATORS:
            return "operator", _OPERATORS[op]
        return ("operator" if op in ("add", "mul", "sub") else "method"), op
    return "function", op


def units(graph: Graph) -> list[Unit]:
    """The calls of an exported graph, in order; inputs first."""
    found: dict[Any, Unit] = {}
    inputs = 0
    for node in graph.nodes:
        if node.op == "placeholder":
            found[node] = Unit("", "input", f"input.{inputs}", nodes=[node], site=f"input.{inputs}")
            inputs += 1
        elif node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor | list | tuple):
            stack = [(key, path, _class_name(kind)) for key, (path, kind) in _stack(node)]
            depth = next((i for i, entry in enumerate(stack) if i and _is_leaf(entry[2])), None)
            if depth is not None:
                stack = stack[: depth + 1]
            keys = tuple(entry[0] for entry in stack)
            path = stack[-1][1].split("@")[0] if stack else ""
            types = tuple(entry[2] for entry in reversed(stack))
            if depth is not None:
                unit = found.setdefault(keys, Unit(types[0].rsplit(".", 1)[-1], "module", path, types))
            else:
                how, op = _function(node)
                call = node.meta.get("torch_fn")
                key = (keys, tuple(call)) if call is not None and op != "getitem" else node
                unit = found.setdefault(key, Unit(op, how, path, types))
            unit.nodes.append(node)
    return sorted(found.values(), key=_order(graph))


def _stack(node: Node) -> list[tuple[str, Any]]:
    stack: Any = node.meta.get("nn_module_stack") or {}
    return list(stack.items())


def _order(graph: Graph) -> Any:
    position = {node: index for index, node in enumerate(graph.nodes)}
    return lambda unit: position[unit.nodes[-1]]


def name_sites(graph: Graph) -> None:
    """Write the site's name into the meta of every call's output node; a graph that has names keeps them.

    A convolution or linear layer in front of a batch norm gets the name of the batch norm, which is about to be
    folded into it.
    """
    calls = units(graph)
    if any(SITE in unit.output.meta for unit in calls if unit.how != "input"):
        return
    names = SiteNames(unit.path for unit in calls if unit.how == "module")
    for unit in calls:
        if unit.how == "module":
            unit.site = names.module(unit.path)
        elif unit.how != "input":
            unit.site = names.operation(unit.path, unit.op)
        _mark(unit, unit.site)
    of_node = {node: unit for unit in calls for node in unit.nodes}
    for unit in calls:
        if unit.op.startswith("BatchNorm"):
            before = next((of_node[value] for value in unit.sources() if value in of_node), None)
            if before is not None and before.op.startswith(("Conv", "Linear")) and len(readers(before.output)) == 1:
                _mark(before, unit.site)


def _mark(unit: Unit, site: str) -> None:
    for node in unit.nodes:  # torchao drops the unused ones of a tuple's parts when it folds batch norms
        node.meta[SITE] = site


def named_units(graph: Graph) -> list[Unit]:
    """The calls of a graph with their site names."""
    name_sites(graph)
    calls = units(graph)
    for unit in calls:
        unit.site = str(unit.output.meta.get(SITE, unit.site or unit.output.name))
    return calls
