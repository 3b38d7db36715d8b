"""Additions and ReLUs that overwrite their input, in the copy of the graph that evaluates stacked candidates.

A tensor which an operation has just made, and which only the next node reads, is overwritten instead of copied: the
same bits with less memory traffic. Quantizers that are switched off pass their input on and are looked through.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from .graph import Graph
from .stage import Seam

_FRESH_MODULES = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm)
ADDITIONS = (operator.add, operator.iadd, torch.add)
RELUS = (torch.relu, nn.functional.relu)


def _relu(x: Tensor, inplace: bool = False) -> Tensor:
    return torch.relu_(x)


def _add(x: Any, y: Any) -> Any:
    # shape and dtype must be those of the sum
    if isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape and x.dtype == y.dtype:
        return x.add_(y)
    return x + y


class _PassOn:
    """A module around a quantizer: skipped while the quantizer is switched off."""

    def __init__(self, module: nn.Module, seam: Seam) -> None:
        self.module, self.seam = module, seam

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x) if self.seam.active or self.seam.calls is not None else x


def overwrite(graph: Graph, seams: list[Seam]) -> set[int]:
    """Install the shortcuts in `graph.specials`.

    Args:
        graph: of a stage of its own.
        seams: of that stage.

    Returns:
        positions of the quantizers that are looked through.
    """
    passing = set()
    for seam in seams:
        for i in graph.calls(seam.quantizer):
            if _only_calls(graph.modules[i], seam):
                passing.add(i)
                graph.specials[i] = _PassOn(graph.modules[i], seam)
    for i, node in enumerate(graph.nodes):
        if not node.args or not isinstance(node.args[0], Node) or not _fresh(graph, node.args[0], passing):
            continue
        module = graph.modules.get(i)
        if type(module) is nn.ReLU or (node.op == "call_function" and node.target in RELUS):
            graph.specials[i] = _relu
        elif node.op == "call_function" and node.target in ADDITIONS and len(node.args) == 2 and not node.kwargs:
            graph.specials[i] = _add
    for module in graph.modules.values():
        fused = isinstance(module, nn.Sequential) and len(module) == 2 and type(module[1]) is nn.ReLU
        if fused and isinstance(module[0], _FRESH_MODULES):  # type: ignore[index]
            module[1].inplace = True  # type: ignore[index]
    return passing


def _only_calls(module: nn.Module, seam: Seam) -> bool:
    """Whether the module hands its input to the quantizer, returns what that returns, and does nothing else."""
    if any(part._forward_hooks or part._forward_pre_hooks for part in module.modules()):
        return False
    given, returned = torch.zeros(1, 1), torch.zeros(1, 1)
    seen = []

    def tap(x: Tensor, direct: object) -> Tensor:
        seen.append(x)
        return returned

    seam.tap = tap
    try:
        result = module(given)
    except Exception:  # it looks at the values it is given
        return False
    finally:
        seam.tap = None
    return result is returned and len(seen) == 1 and seen[0] is given


def _fresh(graph: Graph, node: Node, passing: set[int]) -> bool:
    """Whether the node's value is a tensor of its own that only one node reads."""
    while len(node.users) == 1:
        i = graph.position[node]
        if i in passing:
            node = node.all_input_nodes[0]
            continue
        module = graph.modules.get(i)
        if isinstance(module, nn.Sequential) and len(module):
            module = module[0]  # FX's fused modules
        if module is not None:
            return isinstance(module, _FRESH_MODULES)
        return node.op == "call_function" and node.target in ADDITIONS
    return False
