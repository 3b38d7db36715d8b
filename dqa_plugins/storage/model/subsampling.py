"""Shortcuts that are subsampled before they are used: found, and subsampled before they are stored.

A reader subsamples if it is a slice with a step (`x[:, :, ::2, ::2]`, in exported graphs a chain of aten.slice), or a
1x1 convolution with a stride and no padding.
"""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ...graph.fx import operation_name
from .facts import add_module

_STRIDE, _PADDING = 3, 4  # arguments of aten.conv2d


@dataclass(frozen=True)
class Subsampling:
    """How a reader subsamples.

    Args:
        steps: (function, arguments behind the tensor, keyword arguments) of each step.
        last: the node whose value is the subsample; None for a convolution, which subsamples inside.
        axes: of the tensor, that are subsampled.
    """

    steps: tuple[tuple[Any, tuple[Any, ...], dict[str, Any]], ...]
    last: Node | None
    axes: frozenset[int]

    @property
    def key(self) -> str:
        """Equal for readers that read the same subsample."""
        return repr([(str(function), arguments, names) for function, arguments, names in self.steps])


def subsampling(reader: Node, source: Node, model: GraphModule) -> Subsampling | None:
    """How `reader` subsamples `source` before anything else; None if it does not."""
    return _slices(reader, source, model) or _strided_convolution(reader, source, model)


def _slices(reader: Node, source: Node, model: GraphModule) -> Subsampling | None:
    steps: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    axes: set[int] = set()
    last, node, before = None, reader, source
    while node.op == "call_function" and node.args and node.args[0] is before:
        found = _sliced_axes(node, model)
        if found is None:
            break
        steps.append((node.target, tuple(node.args[1:]), dict(node.kwargs)))
        axes |= found
        last = before = node
        if len(node.users) != 1:
            break
        node = next(iter(node.users))
    return Subsampling(tuple(steps), last, frozenset(axes)) if axes and 0 not in axes and last is not None else None


def _sliced_axes(node: Node, model: GraphModule) -> set[int] | None:
    """The axes that a node takes every other value of; None if it does anything else."""
    if any(isinstance(a, Node) for a in node.args[1:]):
        return None
    name = operation_name(node, model)
    if name == "getitem" and len(node.args) == 2:
        index: Any = node.args[1]
        index = index if isinstance(index, tuple) else (index,)
        if all(_is_plain(i) for i in index):
            return {axis for axis, i in enumerate(index) if i != slice(None)}
    if name == "slice" and isinstance(node.target, torch._ops.OpOverload):
        given: list[Any] = [*node.args[1:], *(0, 0, None, 1)[len(node.args) - 1 :]]
        axis, start, end, step = given
        if isinstance(axis, int) and axis >= 0 and all(isinstance(v, int | None) for v in (start, end, step)):
            everything = not start and step == 1 and (end is None or end >= 2**62)
            return set() if everything else {axis}
    return None


def _is_plain(index: Any) -> bool:
    """A slice of Python numbers: nothing in it depends on data."""
    return isinstance(index, slice) and all(isinstance(v, int | None) for v in (index.start, index.stop, index.step))


def _strided_convolution(reader: Node, source: Node, model: GraphModule) -> Subsampling | None:
    if not reader.args or reader.args[0] is not source:
        return None
    stride: Any
    if reader.op == "call_module":
        conv = model.get_submodule(str(reader.target))
        if not isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d) or isinstance(conv.padding, str):
            return None
        stride, kernel, padding = conv.stride, conv.kernel_size, conv.padding
    elif operation_name(reader, model) in ("conv1d", "conv2d", "conv3d") and len(reader.args) > _STRIDE:
        weight = _constant(reader.args[1], model)
        if weight is None or not isinstance(reader.target, torch._ops.OpOverload) or reader.kwargs:
            return None
        stride = reader.args[_STRIDE]
        padding = reader.args[_PADDING] if len(reader.args) > _PADDING else (0,)  # type: ignore[assignment]
        kernel = tuple(weight.shape[2:])
    else:
        return None
    if not isinstance(padding, list | tuple) or set(kernel) != {1} or set(padding) != {0} or set(stride) == {1}:
        return None
    index = (slice(None), slice(None), *(slice(None, None, int(s)) for s in stride))
    axes = frozenset(axis for axis, i in enumerate(index) if i != slice(None))
    return Subsampling(((operator.getitem, (index,), {}),), None, axes)


def _constant(node: Any, model: GraphModule) -> Tensor | None:
    """The parameter that a node is, or observes, or dequantizes."""
    while isinstance(node, Node) and node.op != "get_attr":
        node = node.all_input_nodes[0] if node.all_input_nodes else None
    if not isinstance(node, Node):
        return None
    value: Any = model
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, Tensor) else None


def subsampled(node: Node, how: Subsampling, after: Node) -> Node:
    """The subsample of a node, taken right behind `after`."""
    for function, arguments, names in how.steps:
        with node.graph.inserting_after(after):
            node = after = node.graph.call_function(function, (node, *arguments), names)
    return node


def spread(sampled: Tensor, index: tuple[slice, ...], shape: tuple[int, ...]) -> Tensor:
    """Put a subsample back where it was taken from, zeros between: a strided 1x1 convolution reads nothing else."""
    whole = sampled.new_zeros(shape)
    whole[index] = sampled
    return whole


def read_subsample(
    model: GraphModule, reader: Node, source: Node, how: Subsampling, stored: Node, sized: Node | None
) -> None:
    """Let a reader that subsampled `source` itself use the stored subsample instead.

    Args:
        sized: leave a convolution as it is and spread its input to the shape of this node: a convolution without the
            stride may sum in another order. None: take its stride away.
    """
    if how.last is not None:  # a slice: the stored value is its result
        how.last.replace_all_uses_with(stored)
        node = how.last
        while node is not source:
            before = node.all_input_nodes[0]
            model.graph.erase_node(node)
            node = before
        return
    if sized is not None:
        (index,) = how.steps[0][1]
        with model.graph.inserting_after(source):
            shape = model.graph.call_function(getattr, (sized, "shape"))
        with model.graph.inserting_before(reader):
            whole = model.graph.call_function(spread, (stored, index, shape))
        reader.replace_input_with(source, whole)
        return
    if reader.op == "call_module":
        conv: Any = copy.copy(model.get_submodule(str(reader.target)))  # shares the weights
        conv.stride = (1,) * len(conv.stride)
        reader.target = add_module(model, f"{reader.target}_subsampled", conv)
    else:
        stride: Any = reader.args[_STRIDE]
        reader.update_arg(_STRIDE, [1] * len(stride))
    reader.replace_input_with(source, stored)
