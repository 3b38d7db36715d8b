"""Convolutions computed together with the addition and the ReLU behind them, where nothing else sees what is between.

The quantizer between a convolution and an addition is looked through while it is switched off. A chain is computed by
its last addition or ReLU; the convolution's own node then only hands on its input. So a chain holds only where a run
of the graph begins before its convolution: `Chains.specials` tells which do.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from .convolution import Convolution, convolution
from .graph import Graph
from .inplace import ADDITIONS, RELUS

Special = Callable[..., Any]


@dataclass
class Chain:
    """A convolution, perhaps an addition, perhaps a ReLU.

    Attributes:
        conv: position of the convolution's node.
        module: the convolution.
        fused: does it all.
        add: position of the addition or None; the convolution's output is its `side`-th argument.
        relu: position of the ReLU's node or None; that of `conv` where the module has its own.
    """

    conv: int
    module: nn.Module
    fused: Convolution
    add: int | None = None
    side: int = 0
    relu: int | None = None

    def specials(self) -> dict[int, Special]:
        """What the chain's nodes do."""
        last = self.relu if self.add is None else self.add
        found: dict[int, Special] = {n: _same for n in (self.conv, self.relu) if n is not None}
        found[self.conv if last is None else last] = self._alone if self.add is None else self._added
        return found

    def _alone(self, x: Tensor, inplace: bool = False) -> Tensor:
        if x.ndim == 4 and x.dtype == torch.float32 and x.numel():
            return self.fused(x, None, self.relu is not None)
        return self._finish(self.module(x))

    def _added(self, *values: Any) -> Any:
        x, addend = values[self.side], values[1 - self.side]
        rows = isinstance(addend, Tensor) and addend.ndim == 4 and addend.dtype == x.dtype
        if rows and x.ndim == 4 and x.dtype == torch.float32 and x.numel() and addend.shape == self._shape(x):
            return self.fused(x, addend, self.relu is not None)
        y = self.module(x)
        return self._finish(y + addend if self.side == 0 else addend + y)

    def _finish(self, x: Any) -> Any:
        return x if self.relu is None else torch.relu(x)

    def _shape(self, x: Tensor) -> tuple[int, ...]:
        c: Any = self.module
        spans = zip(x.shape[2:], c.kernel_size, c.stride, c.padding, c.dilation, strict=True)
        return (len(x), c.out_channels, *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in spans))


@dataclass
class Chains:
    """The chains of a graph.

    Args:
        graph: with the shortcuts of `inplace.overwrite` installed.
        passing: positions of the quantizers that may be looked through, from `inplace.overwrite`.
        wanted: False: none.
    """

    graph: Graph
    passing: set[int]
    wanted: bool = True
    found: list[Chain] = field(init=False)
    plain: dict[int, Special] = field(init=False)

    def __post_init__(self) -> None:
        self.plain = dict(self.graph.specials)
        candidates = self.graph.modules if self.wanted else ()
        self.found = []
        for i in candidates:  # one after the other: an addition belongs to one chain
            chain = self._chain(i)
            if chain is not None:
                self.found.append(chain)

    def __len__(self) -> int:
        return len(self.found)

    def specials(self, start: int) -> dict[int, Special]:
        """The shortcuts for a run of the graph from the node `start` on."""
        specials = dict(self.plain)
        for chain in self.found:
            if chain.conv >= start:
                specials.update(chain.specials())
        return specials

    def _chain(self, i: int) -> Chain | None:
        module, node = self.graph.modules[i], self.graph.nodes[i]
        if len(node.all_input_nodes) != 1 or len(node.args) != 1 or node.kwargs:
            return None
        own_relu = type(module) is not nn.Conv2d and isinstance(module, nn.Sequential) and len(module) == 2
        if own_relu and (type(module[1]) is not nn.ReLU or _hooked(module) or _hooked(module[1])):  # type: ignore[index]
            return None
        conv = module[0] if own_relu else module  # type: ignore[index]
        fused = convolution(conv)
        if fused is None:
            return None
        if own_relu:
            return Chain(i, conv, fused, relu=i)
        chain = Chain(i, conv, fused)
        node = self._next(node)
        behind = self._reader(node)
        if behind is None or self._changes(i, self.graph.position[behind]):
            return chain
        if self._adds(behind) and self.graph.position[behind] not in {chain.add for chain in self.found}:
            chain.add, chain.side = self.graph.position[behind], behind.args.index(node)
            behind = self._reader(self._next(behind))
        if behind is not None and self._rectifies(behind):
            chain.relu = self.graph.position[behind]
        return chain

    def _reader(self, node: Node) -> Node | None:
        """The only node that reads the value of `node`."""
        return next(iter(node.users)) if len(node.users) == 1 else None

    def _next(self, node: Node) -> Node:
        """`node`, or the last of the quantizers that pass its value on, if nothing else reads it."""
        while (reader := self._reader(node)) is not None and self.graph.position[reader] in self.passing:
            node = reader
        return node

    def _adds(self, node: Node) -> bool:
        if node.op != "call_function" or node.target not in ADDITIONS or len(node.args) != 2 or node.kwargs:
            return False
        left, right = node.args
        if not isinstance(left, Node) or not isinstance(right, Node) or left is right:
            return False
        # `x += conv(y)` changes an x that others may read
        return node.target is not operator.iadd or len(left.users) == 1

    def _rectifies(self, node: Node) -> bool:
        module = self.graph.modules.get(self.graph.position[node])
        if module is not None:
            return type(module) is nn.ReLU and not _hooked(module)
        return node.op == "call_function" and node.target in RELUS and len(node.args) == 1

    def _changes(self, first: int, last: int) -> bool:
        """Whether a node strictly between may overwrite what the convolution has yet to read."""
        return any(self._overwrites(i) for i in range(first + 1, last) if i not in self.passing)

    def _overwrites(self, i: int) -> bool:
        node, module = self.graph.nodes[i], self.graph.modules.get(i)
        if module is not None:
            return any(getattr(part, "inplace", False) for part in module.modules())
        if node.op == "call_function":
            name = str(getattr(node.target, "__name__", node.target))
            module_name = str(getattr(node.target, "__module__", ""))
            inplace_operator = module_name == "_operator" and name.startswith("i") and name not in ("invert", "inv")
            return inplace_operator or name.endswith("_") or bool(node.kwargs.get("inplace")) or "setitem" in name
        return node.op == "call_method" and str(node.target).endswith("_")


def _same(x: Any, inplace: bool = False) -> Any:
    return x


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
