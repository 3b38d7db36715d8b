"""Quantized weights of PT2E: the constants that dequantize nodes of the converted graph read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from dqa_plugins.host.weights import QuantizedWeight, WeightSite
from dqa_plugins.operators import DEQUANTIZE

_CHANNEL, _TENSOR = "dequantize_per_channel", "dequantize_per_tensor"


def read_weights(model: nn.Module) -> Iterator[WeightSite]:
    """The weight behind every quantized_decomposed dequantize node, int8 (folded) or float (fold_quantize=False)."""
    taken: set[str] = set()
    for prefix, graph in list(model.named_modules()):
        if not isinstance(graph, GraphModule):
            continue
        for node in list(graph.graph.nodes):
            target = str(node.target)
            if node.op != "call_function" or not target.startswith("quantized_decomposed.dequantize_per_"):
                continue
            values = [_constant(graph, argument) for argument in node.args]
            if any(value is None for value, argument in zip(values, node.args, strict=True) if argument is not None):
                continue
            weight = _weight(target, values, node)
            if weight is not None:
                name = ".".join(part for part in (prefix, _name(node)) if part)
                if name in taken:  # a layer with several weights, or one that is called again
                    name = f"{name}.{node.name}"
                taken.add(name)
                yield WeightSite(name, weight, _replacement(graph, node, weight, name))


def _constant(graph: GraphModule, argument: Any) -> Any:
    """The value of an argument that does not depend on the model's input; None: it does."""
    if not isinstance(argument, Node):
        return argument
    if argument.op == "get_attr":
        found: Any = graph
        for part in str(argument.target).split("."):
            found = getattr(found, part)
        return found.detach() if isinstance(found, Tensor) else None
    if argument.op != "call_function" or not str(argument.target).startswith("quantized_decomposed.quantize_per_"):
        return None
    values = [_constant(graph, a) for a in argument.args]
    target: Any = argument.target
    return None if any(v is None for v in values) else target(*values)


def _weight(target: str, values: list[Any], node: Node) -> QuantizedWeight | None:
    codes, scale, zero_point = values[:3]
    if codes.dtype not in (torch.int8, torch.uint8):
        return None
    dtype: Any = node.kwargs.get("out_dtype") or torch.float32
    # as_tensor: in the graph a scale of a whole tensor is a number, which multiplies a float32 tensor as float32
    scale = torch.as_tensor(scale, dtype=torch.float32)
    zero_point = torch.as_tensor(0 if zero_point is None else zero_point)
    if _CHANNEL in target:
        return QuantizedWeight(codes, scale, zero_point.expand_as(scale), values[3], dtype)
    return QuantizedWeight(codes, scale.reshape(()), zero_point.reshape(()), None, dtype)


def _name(node: Node) -> str:
    """The parameter's name: its layer's path with ".weight", as folding renames the constant itself."""
    source = node.args[0]
    while isinstance(source, Node) and source.op == "call_function":
        source = source.args[0]
    stored = str(source.target) if isinstance(source, Node) else node.name
    if not stored.startswith("_frozen_param"):
        return stored
    for user in node.users:
        stack = user.meta.get("nn_module_stack")
        if stack:
            path = list(stack.values())[-1][0]
            if path:
                return f"{_plain_path(path)}.weight"
    return stored


def _plain_path(path: str) -> str:
    """`L['self'].layer.0`, as torch.export writes it in a graph made from a module, is `layer.0`."""
    return path.removeprefix("L['self'].").removeprefix("L__self___")


def _replacement(graph: GraphModule, node: Node, weight: QuantizedWeight, name: str) -> Callable[[], None]:
    def replace() -> None:
        arguments = []
        for part in ("codes", "scale", "zero_point"):
            stored = f"{name.replace('.', '_')}_{part}"
            while hasattr(graph, stored):
                stored = f"_{stored}"
            graph.register_buffer(stored, getattr(weight, part))
            with graph.graph.inserting_before(node):
                arguments.append(graph.graph.get_attr(stored))
        with graph.graph.inserting_before(node):
            ours = graph.graph.call_function(DEQUANTIZE, (*arguments, weight.axis, weight.dtype))
        ours.meta = dict(node.meta)
        node.replace_all_uses_with(ours)
        read = node.all_input_nodes
        graph.graph.erase_node(node)
        while read:  # the float weight and its quantize node, where the host did not fold them
            source = read.pop()
            if not source.users and source.op in ("get_attr", "call_function"):
                read += source.all_input_nodes
                graph.graph.erase_node(source)
        graph.recompile()

    return replace
