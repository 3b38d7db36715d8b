"""The next linear layer of an activation in a torch.fx graph, of modules or of aten operators.

That is what NoisyQuant's objective="output" minimises the error of.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

_ATEN = torch.ops.aten
_CONV2D = (_ATEN.conv2d.default, _ATEN.conv2d.padding)
_DROPOUT = (_ATEN.dropout.default, _ATEN.dropout_.default)


def next_linear(users: Iterable[Node], model: GraphModule) -> Node | None:
    """The first Linear or ungrouped Conv2d that reads an activation, through at most observers and dropout.

    Args:
        users: nodes that read the activation.
        model: their graph's module.

    Returns:
        the node, or None: the activation goes elsewhere first (an addition, a pool, the output).
    """
    queue = deque(users)
    while queue:
        user = queue.popleft()
        if layer_of(user, model) is not None or _is_aten_layer(user):
            return user
        if _hands_on(user, model):
            queue.extend(user.users)
    return None


def layer_of(node: Node, model: GraphModule) -> nn.Module | None:
    """The Linear or ungrouped Conv2d that a node calls, inside a fused module too."""
    return _linear_part(model.get_submodule(str(node.target))) if node.op == "call_module" else None


def geometry(node: Node, model: GraphModule) -> tuple[Any, ...]:
    """() for Linear; (kernel, dilation, stride) for Conv2d: how its inputs are gathered into rows."""
    layer = layer_of(node, model)
    if layer is not None:
        return (layer.kernel_size, layer.dilation, layer.stride) if isinstance(layer, nn.Conv2d) else ()
    if node.target is _ATEN.linear.default:
        return ()
    kernel = _weight_node(node).meta["val"].shape[2:]
    return (_pair(kernel), _pair(_argument(node, "dilation")), _pair(_argument(node, "stride")))


def weight_rows(node: Node, model: GraphModule) -> Tensor | None:
    """(O, D) float weight of the layer that a node calls, quantized already or not; None: it is no parameter."""
    layer = layer_of(node, model)
    if layer is not None:
        return layer.weight.detach().flatten(1) if isinstance(layer.weight, Tensor) else None
    weight = _weight_node(node)
    if weight.op != "get_attr":
        return None
    value: Any = model
    for part in str(weight.target).split("."):
        value = getattr(value, part)
    return value.detach().flatten(1)


def _hands_on(node: Node, model: GraphModule) -> bool:
    """Observers, quantizers and dropout: what reads them reads the activation."""
    if node.op != "call_module":
        return node.target in _DROPOUT
    module = model.get_submodule(str(node.target))
    return isinstance(module, nn.Dropout | nn.Identity) or hasattr(module, "quantizer") or hasattr(module, "freeze")


def _linear_part(module: Any) -> nn.Module | None:
    if isinstance(module, nn.Sequential) and len(module):
        return _linear_part(module[0])
    if isinstance(module, nn.Linear):
        return module
    return module if isinstance(module, nn.Conv2d) and module.groups == 1 else None


def _is_aten_layer(node: Node) -> bool:
    return node.target is _ATEN.linear.default or (node.target in _CONV2D and _argument(node, "groups") == 1)


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


def _weight_node(layer: Node) -> Node:
    node: Any = layer.args[1]
    while node.op != "get_attr" and node.all_input_nodes:  # behind an observer, or quantize and dequantize
        node = node.all_input_nodes[0]
    return node
