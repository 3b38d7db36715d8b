"""A torch.fx graph of modules and functions as operations and values."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from .names import SiteNames
from .operations import Operation, Value, facts

_NUMBERS = frozenset("size dim ndimension numel nelement stride element_size __len__ len get_device".split())
_ATTRIBUTES = frozenset("shape ndim dtype device is_cuda itemsize".split())
_PLAIN = frozenset(("_operator", "operator", "builtins", "math"))  # functions of Python, which make no tensors
_IN_PLACE = frozenset("iadd isub imul itruediv ifloordiv ipow imatmul iand ior ixor imod setitem".split())


@dataclass(frozen=True)
class TensorFacts:
    """Of the tensor that a node gave when the model ran; shape None for a tuple or list of tensors."""

    shape: tuple[int, ...] | None
    dtype: torch.dtype | None


def operation_name(node: Node, model: nn.Module) -> str:
    """Class name of a module call, name of a function, method or operator, "" for inputs and the like."""
    if node.op == "call_module":
        return type(model.get_submodule(str(node.target))).__name__
    if node.target is getattr:
        return str(node.args[1])
    if node.op == "call_function":
        packet = getattr(node.target, "overloadpacket", node.target)
        return str(getattr(packet, "__name__", packet))
    return str(node.target) if node.op == "call_method" else ""


def enclosing_module(node: Node) -> str:
    """Qualified name of the innermost module around a node, "" for the model."""
    stack: Any = node.meta.get("nn_module_stack") or {}
    return str(next(reversed(stack.values()))[0]) if stack else ""


def numbers(graph: Graph) -> set[Node]:
    """Nodes that give sizes and what is computed from them: no tensors, and nothing in an exported graph."""
    found: set[Node] = set()
    for node in graph.nodes:
        name = getattr(node.target, "__name__", str(node.target))
        calls = node.op in ("call_method", "call_function")
        of_numbers = calls and bool(node.all_input_nodes) and all(n in found for n in node.all_input_nodes)
        plain = node.op == "call_method" or getattr(node.target, "__module__", "") in _PLAIN
        attribute = node.target is getattr and node.args[1] in _ATTRIBUTES
        if attribute or (calls and name in _NUMBERS) or (of_numbers and plain):
            found.add(node)
    return found


def parts(node: Node, model: nn.Module) -> list[Node]:
    """The tensors taken out of what a recurrent or attention layer gives, those that are read, in order."""
    if node.op != "call_module" or facts(operation_name(node, model)).kind != "opaque":
        return []
    found: list[Node] = []
    for user in node.users:
        if user.target is operator.getitem and user.args[0] is node:
            inner = [u for u in user.users if u.target is operator.getitem]
            nested = operation_name(node, model) == "LSTM" and user.args[1] == 1
            found.extend(u for u in inner if u.users) if nested else found.extend([user] if user.users else [])
    position = {n: i for i, n in enumerate(node.graph.nodes)}
    return sorted(found, key=position.__getitem__)


def _taken(graph: Graph, model: nn.Module) -> dict[Node, tuple[Node, int]]:
    """For each part of a layer's results, and what leads to one: (layer, number of the part)."""
    found: dict[Node, tuple[Node, int]] = {}
    for node in graph.nodes:
        for k, part in enumerate(parts(node, model)):
            found[part] = (node, k)
        if node.target is operator.getitem and node not in found:
            source: Any = node.args[0]
            if isinstance(source, Node) and parts(source, model):
                found[node] = (source, -1)
    return found


def name_sites(graph: Graph, model: nn.Module) -> dict[Node, str]:
    """Site name of every node of a graph before fusion."""
    names = SiteNames(str(node.target) for node in graph.nodes if node.op == "call_module")
    inputs, sizes, taken = 0, numbers(graph), _taken(graph, model)
    sites: dict[Node, str] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            sites[node] = f"input.{inputs}"
            inputs += 1
        elif node in taken:
            layer, k = taken[node]
            sites[node] = sites[layer] if k <= 0 else f"{sites[layer]}.part{k}"
        elif node.op == "call_module":
            sites[node] = names.module(str(node.target))
        elif node.op in ("call_function", "call_method") and node not in sizes:
            sites[node] = names.operation(enclosing_module(node), operation_name(node, model))
    return sites


def written(node: Node, model: nn.Module) -> Node | None:
    """The value that an operation changes in place; None if it changes none."""
    target: Any = None
    name = operation_name(node, model)
    if isinstance(node.target, torch._ops.OpOverload):
        for i, argument in enumerate(node.target._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                target = node.kwargs.get(argument.name, node.args[i] if i < len(node.args) else None)
    elif "out" in node.kwargs:
        target = node.kwargs["out"]
    elif name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")) or _flag_in_place(node, model):
        target = node.args[0] if node.args else next(iter(node.all_input_nodes), None)
    return target if isinstance(target, Node) else None


def _flag_in_place(node: Node, model: nn.Module) -> bool:
    """Whether an operation is told to work in place."""
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    if node.op != "call_function":
        return False
    try:
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments  # type: ignore[arg-type]
    except (TypeError, ValueError):  # built in
        given = node.kwargs
    return given.get("inplace") is True


def follow_in_place(model: GraphModule) -> None:
    """Let what reads a value after an in-place operation changed it read that operation's result: it is the same."""
    order = {node: i for i, node in enumerate(model.graph.nodes)}
    for node in model.graph.nodes:
        changed = written(node, model)
        if changed is not None and node.target is not operator.setitem:  # which gives None
            for user in list(changed.users):
                if order[user] > order[node]:
                    user.replace_input_with(changed, node)


def describe(
    model: GraphModule,
    seen: Mapping[Node, TensorFacts] | None = None,
    *,
    site_of: Callable[[Node], str] | None = None,
    quantized: Callable[[Node], bool] = lambda node: False,
) -> list[Operation]:
    """The operations of a graph, in order; keys of values are nodes.

    Args:
        model: of modules and functions, fused or not.
        seen: what each node gave when the model ran; None: nothing is known of shapes and types.
        site_of: the site's name of a node; None: named here.
        quantized: True for nodes whose result the host quantizes, such as its observers.
    """
    graph = model.graph
    named = name_sites(graph, model) if site_of is None else {}
    sizes, taken = numbers(graph), _taken(graph, model)
    values: dict[Node, Value] = {}
    operations = []

    def value(node: Node) -> Value:
        if node not in values:
            found = None if seen is None else seen.get(node)
            tensor = node not in sizes if seen is None else found is not None
            values[node] = Value(
                node,
                shape=None if found is None else found.shape,
                floating=tensor and (found is None or found.dtype is None or found.dtype.is_floating_point),
                single=found is None or found.shape is not None,
                quantized=quantized(node),
            )
        return values[node]

    for node in graph.nodes:
        if node in taken:
            continue
        made = [part for part in parts(node, model) if part in taken] or [node]
        how, path, types = _where(node, model)
        site = named.get(node, node.name) if site_of is None else site_of(node)
        site = path if how == "parameter" else site
        inputs = tuple(value(source) for source in sources(node))
        arguments = [a for a in node.args if not isinstance(a, Node)]
        keywords = {k: a for k, a in node.kwargs.items() if not isinstance(a, Node)}
        changed = written(node, model)
        writes = () if changed is None else (value(changed),)
        outputs = () if node.op == "output" else tuple(value(n) for n in made)
        op = _op(node, model)
        operations.append(
            Operation(op, how, path, types, inputs, outputs, site, tuple(arguments), keywords, tuple(writes))
        )
    return operations


def sources(node: Node) -> list[Node]:
    """The nodes a node reads, in the order of its arguments, repeated where one is read twice."""
    given = pytree.tree_leaves((node.args, node.kwargs), is_leaf=lambda x: isinstance(x, slice))
    ends = [end for x in given for end in ((x.start, x.stop, x.step) if isinstance(x, slice) else (x,))]
    return [x for x in ends if isinstance(x, Node)]


def _op(node: Node, model: nn.Module) -> str:
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        if hasattr(module, "fake_quantize") or hasattr(module, "quantizer"):
            return "Identity"  # a quantizer, or an observer that holds one, leaves channels where they are
        layer = getattr(module, "_modules", {}).get("0")
        if isinstance(module, nn.Sequential) and layer is not None and type(module) is not nn.Sequential:
            return type(layer).__name__  # fused: ConvReLU2d, LinearReLU
    return operation_name(node, model)


def _where(node: Node, model: nn.Module) -> tuple[str, str, tuple[str, ...]]:
    """(how, path, types) of a node."""
    stack: Any = node.meta.get("nn_module_stack") or {}
    types = tuple(k if isinstance(k, str) else f"{k.__module__}.{k.__qualname__}" for _, k in reversed(stack.values()))
    if node.op == "placeholder":
        return "input", str(node.target), ()
    if node.op == "get_attr":
        return "parameter", str(node.target), ()
    if node.op == "output":
        return "output", "", ()
    if node.op == "call_module":
        return "module", str(node.target), types
    if node.op == "call_method":
        return "method", enclosing_module(node), types
    operators = getattr(node.target, "__module__", "") in ("_operator", "operator")
    return ("operator" if operators else "function"), enclosing_module(node), types


def is_tensors(value: Any) -> bool:
    """True for a tuple or list that holds a tensor."""
    return isinstance(value, tuple | list) and any(isinstance(v, Tensor) or is_tensors(v) for v in value)
