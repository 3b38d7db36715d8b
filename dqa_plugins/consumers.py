"""The next linear layer of an activation (see `graph.readers`)."""

from __future__ import annotations

from torch import nn
from torch.fx import GraphModule, Node

from .graph.readers import layer_of, next_linear


def find_consumer(node: Node, model: GraphModule) -> nn.Module | None:
    """The first Linear or ungrouped Conv2d that reads the value of `node`, through at most observers."""
    found = next_linear(node.users, model)
    return None if found is None else layer_of(found, model)
