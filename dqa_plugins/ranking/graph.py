"""Runs a torch.fx graph in pieces, keeping the values that later nodes need between the pieces.

Works on every GraphModule: FX prepared, PT2E prepared (`export(...).module()`), or traced by hand. Values are keyed by
the position of their node, so that they can be handed to a copy of the graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen
from torch.fx.node import map_arg

Values = dict[int, Any]


class NotStackable(Exception):
    """A value does not hold one row per sample, so samples of several candidates cannot be stacked."""


class Graph:
    """The nodes of a GraphModule, in order.

    Args:
        model: runs in the mode it is in.

    Attributes:
        length: number of nodes; the last one is the output.
        from_input: positions of the nodes whose value depends on an input.
        specials: functions called in place of a node's own, by position (see `inplace`).
        flattened: True where the graph flattens nested inputs (torch.export), so that keyword inputs have no names.
    """

    def __init__(self, model: GraphModule) -> None:
        self.model = model
        self.nodes: tuple[Node, ...] = tuple(model.graph.nodes)
        self.length = len(self.nodes)
        self.flattened = type(model.graph._codegen) is not CodeGen
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.modules = {
            i: model.get_submodule(str(n.target)) for i, n in enumerate(self.nodes) if n.op == "call_module"
        }
        self.from_input: set[int] = set()
        last_use = list(range(self.length))
        for i, node in enumerate(self.nodes):
            sources = [self.position[source] for source in node.all_input_nodes]
            for source in sources:
                last_use[source] = max(last_use[source], i)
            if node.op == "placeholder" or any(source in self.from_input for source in sources):
                self.from_input.add(i)
        self._dies: list[list[int]] = [[] for _ in self.nodes]
        for i, last in enumerate(last_use):
            self._dies[last].append(i)
        self.specials: dict[int, Callable[..., Any]] = {}
        self._only = [
            self.position[n.args[0]] if len(n.args) == 1 and isinstance(n.args[0], Node) and not n.kwargs else None
            for n in self.nodes
        ]

    def calls(self, module: nn.Module) -> list[int]:
        """Positions of the nodes that call `module`, or a module which holds it."""
        return [i for i, called in self.modules.items() if any(part is module for part in called.modules())]

    def start(self, inputs: Any) -> Values:
        """The values of the placeholders for a batch; inputs are copied, so that in-place operations stay inside.

        Args:
            inputs: a tensor, a tuple or list of positional inputs, or (if not `flattened`) a dict of keyword inputs.

        Raises:
            TypeError: an input is missing.
        """
        inputs = copy.deepcopy(inputs)
        placeholders = [(i, node) for i, node in enumerate(self.nodes) if node.op == "placeholder"]
        if isinstance(inputs, dict):
            named = inputs
        else:
            given = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
            flat = self.model.graph.process_inputs(*given)
            named = {str(node.target): value for (_, node), value in zip(placeholders, flat, strict=False)}
        values: Values = {}
        for i, node in placeholders:
            if str(node.target) in named:
                values[i] = named[str(node.target)]
            elif node.args:
                values[i] = node.args[0]
            else:
                raise TypeError(f"the model's input {node.target!r} is missing from the batch.")
        return values

    def run(self, values: Values, first: int, last: int, watch: Callable[[Values], None] | None = None) -> Any:
        """Execute the nodes first..last-1 on `values`, which afterwards holds what the later nodes need.

        Args:
            values: from `start`, or left by a run up to `first`.
            watch: called with the values after every node.

        Returns:
            the model's output if last is `length`, else None.
        """
        output = None
        for i in range(first, last):
            node = self.nodes[i]
            if node.op == "output":
                output = self.model.graph.process_outputs(self._look_up(node.args[0], values))
            elif node.op != "placeholder":
                values[i] = self.execute(i, values)
            if watch is not None:
                watch(values)
            for dead in self._dies[i]:
                values.pop(dead, None)
        return output

    def alive_after(self, i: int, values: Values) -> Values:
        """What of `values` the nodes after the i-th need (a new dict of the same tensors)."""
        return {k: v for k, v in values.items() if k not in self._dies[i]}

    def execute(self, i: int, values: Values) -> Any:
        """The value of the i-th node (no input, not the output), made from `values`."""
        node, only = self.nodes[i], self._only[i]
        if only is not None:  # one input, no settings: most modules, without the search through the arguments
            special = self.specials.get(i)
            if special is not None:
                return special(values[only])
            if node.op == "call_module":
                return self.modules[i](values[only])
        args, kwargs = self._look_up(node.args, values), self._look_up(node.kwargs, values)
        if i in self.specials:
            return self.specials[i](*args, **kwargs)
        if node.op == "call_module":
            return self.modules[i](*args, **kwargs)
        if node.op == "get_attr":
            found: Any = self.model
            for part in str(node.target).split("."):
                found = getattr(found, part)
            return found
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _look_up(self, argument: Any, values: Values) -> Any:
        return map_arg(argument, lambda node: values[self.position[node]]) if argument else argument


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to the tensors of a value: a tensor, or tuples, lists and dicts of tensors.

    Raises:
        NotStackable: something else is in it, such as a size.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return type(value)(map_tensors(item, function) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    raise NotStackable(f"a {type(value).__name__} made from the inputs is used later")


def tensor_bytes(values: Values) -> int:
    """Bytes of all tensors in values (views count in full)."""
    return sum(leaf.numel() * leaf.element_size() for leaf in _leaves(list(values.values())))


def _leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [leaf for item in value for leaf in _leaves(item)]
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    return []


def to_rows_first(value: Tensor, batch: int, channels_last: bool) -> Tensor:
    """A layout from which rows are gathered fast: (B, ...) contiguous; (B, H, W, C) of a 4-d tensor if channels_last.

    Raises:
        NotStackable: axis 0 is not the batch.
    """
    if value.ndim == 0 or len(value) != batch:
        raise NotStackable(f"a tensor of shape {tuple(value.shape)} made from the inputs is used later")
    return (value.permute(0, 2, 3, 1) if channels_last and value.ndim == 4 else value).contiguous()


def gather_rows(value: Tensor, rows: Tensor, channels_last: bool) -> Tensor:
    """Rows of a value that `to_rows_first` laid out, with its axes back in place. rows: (R,) int64."""
    found = torch.index_select(value, 0, rows)
    return found.permute(0, 3, 1, 2) if channels_last and value.ndim == 4 else found
