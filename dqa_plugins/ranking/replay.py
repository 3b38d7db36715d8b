"""Runs a torch.fx graph in pieces, keeping the values that later nodes need between the pieces.

Works on every GraphModule: FX prepared, PT2E prepared (`export(...).module()`), or traced by hand. Values are keyed by
the position of their node.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen
from torch.fx.node import map_arg

Values = dict[int, Any]


class NotStackable(Exception):
    """A value does not hold one row per sample, so samples of several candidates cannot be stacked."""


class Replay:
    """The nodes of a GraphModule, in order.

    Args:
        model: runs in the mode it is in.

    Attributes:
        length: number of nodes; the last one is the output.
        from_input: positions of the nodes whose value depends on an input.
        flattened: True where the graph flattens nested inputs (torch.export), so that keyword inputs have no names.
    """

    def __init__(self, model: GraphModule) -> None:
        self.model = model
        self.nodes: tuple[Node, ...] = tuple(model.graph.nodes)
        self.length = len(self.nodes)
        self.flattened = type(model.graph._codegen) is not CodeGen
        self._position = {node: i for i, node in enumerate(self.nodes)}
        self._modules = {
            i: model.get_submodule(str(n.target)) for i, n in enumerate(self.nodes) if n.op == "call_module"
        }
        self.from_input: set[int] = set()
        last_use = list(range(self.length))
        for i, node in enumerate(self.nodes):
            sources = [self._position[source] for source in node.all_input_nodes]
            for source in sources:
                last_use[source] = max(last_use[source], i)
            if node.op == "placeholder" or any(source in self.from_input for source in sources):
                self.from_input.add(i)
        self._dies: list[list[int]] = [[] for _ in self.nodes]
        for i, last in enumerate(last_use):
            self._dies[last].append(i)

    def calls(self, module: nn.Module) -> list[int]:
        """Positions of the nodes that call `module`, or a module which holds it."""
        return [i for i, called in self._modules.items() if any(part is module for part in called.modules())]

    def start(self, inputs: Any) -> Values:
        """The values of the placeholders for a batch; inputs are copied, so that in-place operations stay inside.

        Args:
            inputs: a tuple of positional inputs, or (if not `flattened`) a dict of keyword inputs.

        Raises:
            TypeError: an input is missing.
        """
        inputs = copy.deepcopy(inputs)
        placeholders = [(i, node) for i, node in enumerate(self.nodes) if node.op == "placeholder"]
        if isinstance(inputs, dict):
            named = inputs
        else:
            flat = self.model.graph.process_inputs(*inputs)
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
        node = self.nodes[i]
        args, kwargs = self._look_up(node.args, values), self._look_up(node.kwargs, values)
        if node.op == "call_module":
            return self._modules[i](*args, **kwargs)
        if node.op == "get_attr":
            found: Any = self.model
            for part in str(node.target).split("."):
                found = getattr(found, part)
            return found
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _look_up(self, argument: Any, values: Values) -> Any:
        return map_arg(argument, lambda node: values[self._position[node]]) if argument else argument


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


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in a value: a tensor, or tuples, lists and dicts of them (views count in full)."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return 0
    return sum(tensor_bytes(item) for item in value)
