"""Site names, operation names and channel axes of FX nodes.

Names are taken from the graph as it is before fusion, because a fused ConvReLU2d lives at the path of the convolution
and the ReLU behind it becomes an Identity: afterwards nobody knows what was fused.
"""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from dqa_plugins.sites import ELEMENTWISE, SiteNames, default_channel_axis

SITE = "dqa_site"  # key in Node.meta


def operation_name(node: Node, model: GraphModule) -> str:
    """Class name of a module node, function or method name of an operation, "" for inputs and the like."""
    if node.op == "call_module":
        return type(model.get_submodule(str(node.target))).__name__
    if node.op == "call_function":
        return getattr(node.target, "__name__", str(node.target))
    return str(node.target) if node.op == "call_method" else ""


def _enclosing(node: Node) -> str:
    stack: Any = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack.values()))[0] if stack else ""


def name_sites(traced: GraphModule) -> dict[str, str]:
    """Site name of every node of a graph before fusion: {node name: site name}."""
    names, inputs = SiteNames(), 0
    sites = {}
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            sites[node.name] = f"input.{inputs}"
            inputs += 1
        elif node.op == "call_module":
            sites[node.name] = names.module(str(node.target))
        elif node.op in ("call_function", "call_method"):
            sites[node.name] = names.operation(_enclosing(node), operation_name(node, traced))
    return sites


def fused_into(traced: GraphModule, fused_names: set[str]) -> dict[str, str]:
    """For every node that fusion kept: the last node of its pattern, {node name: last node name}."""
    last = {}
    for node in traced.graph.nodes:
        if node.name in fused_names:
            end = node
            while len(end.users) == 1 and (user := next(iter(end.users))).name not in fused_names:
                end = user
            last[node.name] = end.name
    return last


def mark_sites(fused: GraphModule, sites: dict[str, str], last: dict[str, str]) -> None:
    """Write the site name of each node of the fused graph into its meta."""
    for node in fused.graph.nodes:
        end = last.get(node.name, node.name)
        if end in sites:
            node.meta[SITE] = sites[end]


def site_name(node: Node) -> str:
    """The site name of a node of a prepared graph."""
    return str(node.meta.get(SITE, node.name))


def producer_axis(node: Node, model: GraphModule) -> int:
    """Channel axis of the tensor a node produces: last behind Linear and its like, else 1.

    Elementwise operations and observers hand the axis on: last if it is the last of any operand.
    """
    seen: set[Node] = set()
    queue = [node]
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        name = operation_name(node, model)
        if node.op == "call_module":
            module: Any = model.get_submodule(str(node.target))
            if hasattr(module, "quantizer"):
                queue.extend(node.all_input_nodes)
                continue
            if "0" in getattr(module, "_modules", {}):  # fused: LinearReLU, ConvReLU2d
                name = type(module[0]).__name__
            elif name.startswith("Linear"):  # nnqat.LinearReLU and the like
                name = "Linear"
        if default_channel_axis(name) == -1:
            return -1
        if name in ELEMENTWISE:
            queue.extend(node.all_input_nodes)
    return 1
