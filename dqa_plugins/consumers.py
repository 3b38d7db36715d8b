"""The next linear layer of an activation in a torch.fx graph: what objective="output" minimises the error of."""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node


def _linear_part(module: Any) -> nn.Module | None:
    """The Linear or ungrouped Conv2d inside a (possibly fused) module."""
    if isinstance(module, nn.Sequential) and len(module):
        return _linear_part(module[0])
    if isinstance(module, nn.Linear):
        return module
    if isinstance(module, nn.Conv2d) and module.groups == 1:
        return module
    return None


def find_consumer(node: Node, model: GraphModule) -> nn.Module | None:
    """The first Linear or ungrouped Conv2d that reads the value of `node`, through at most observers.

    Args:
        node: an activation in the graph of `model`.

    Returns:
        the layer, or None: the activation goes elsewhere first (an addition, a pool, the output).
    """
    queue = deque(node.users)
    while queue:
        user = queue.popleft()
        if user.op != "call_module":
            continue
        module = model.get_submodule(str(user.target))
        layer = _linear_part(module)
        if layer is not None:
            return layer
        if type(module).__name__ in ("ActivationQuantizer", "FXObserver", "Dropout", "Identity"):
            queue.extend(user.users)
    return None


def geometry(layer: nn.Module) -> tuple[Any, ...]:
    """() for Linear; (kernel, dilation, stride) for Conv2d: how its inputs are gathered into rows."""
    if isinstance(layer, nn.Conv2d):
        return (layer.kernel_size, layer.dilation, layer.stride)
    return ()
