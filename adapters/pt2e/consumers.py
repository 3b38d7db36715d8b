"""The next linear layer of an activation in an aten graph: what objective="output" minimises the error of."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

_ATEN = torch.ops.aten
_CONV2D = (_ATEN.conv2d.default, _ATEN.conv2d.padding)


def _argument(node: Node, name: str) -> Any:
    """An argument of an aten node by the name that its schema gives it, defaults included."""
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name == name:
            if position < len(node.args):
                return node.args[position]
            return node.kwargs.get(name, argument.default_value)
    raise KeyError(name)


def _pair(value: Any) -> tuple[int, int]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return (int(values[0]), int(values[-1]))


def find_consumer(users: Iterable[Node], model: GraphModule) -> Node | None:
    """The first linear or ungrouped conv2d among the users of an activation, through at most observers and dropout.

    Args:
        users: nodes that read the activation.
        model: their graph's module.

    Returns:
        the aten node, or None: the activation goes elsewhere first (an addition, a pool, the output).
    """
    queue = deque(users)
    while queue:
        user = queue.popleft()
        if user.op == "call_module":
            module = model.get_submodule(str(user.target))
            passes = type(module).__name__ in ("ActivationQuantizer", "PT2EObserver")
        else:
            passes = user.target in (_ATEN.dropout.default, _ATEN.dropout_.default)
            if user.target is _ATEN.linear.default or (user.target in _CONV2D and _argument(user, "groups") == 1):
                return user
        if passes:
            queue.extend(user.users)
    return None


def geometry(layer: Node) -> tuple[Any, ...]:
    """() for linear; (kernel, dilation, stride) for conv2d: how its inputs are gathered into rows."""
    if layer.target is _ATEN.linear.default:
        return ()
    kernel = _weight_node(layer).meta["val"].shape[2:]
    return (_pair(kernel), _pair(_argument(layer, "dilation")), _pair(_argument(layer, "stride")))


def consumer_weight(layer: Node, model: GraphModule) -> Tensor | None:
    """(O, D) float weight of a linear or conv2d node, whether or not it is quantized already; None: not a parameter."""
    node = _weight_node(layer)
    if node.op != "get_attr":
        return None
    value: Any = model
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value.detach().flatten(1)


def _weight_node(layer: Node) -> Node:
    node: Any = layer.args[1]
    while node.op != "get_attr" and node.all_input_nodes:  # behind an observer, or quantize and dequantize
        node = node.all_input_nodes[0]
    return node
