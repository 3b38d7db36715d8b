"""Which values of a model live long: read once, then read again after other layers ran.

Those are the stored activations of the DQA paper: residual shortcuts, U-Net skips. A network's inputs are left alone,
because the caller holds them anyway.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node, Tracer

from ..quantizer import ActivationQuantizer
from ..sites import ELEMENTWISE, SiteNames, default_channel_axis
from .errors import TraceFailed

SITE = "dqa_site"  # key in Node.meta where the adapters keep a node's site name
_LAYERS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention, nn.Embedding)
_COMPUTE = re.compile(
    r"(^|_)(conv|linear|bilinear|matmul|bmm|addmm|mm|einsum|baddbmm|embedding)|attention|convolution", re.IGNORECASE
)
_NOT_COMPUTE = re.compile(r"upsample|interpolate|convert", re.IGNORECASE)
_VIEWS = frozenset(
    "view reshape flatten transpose permute getitem squeeze unsqueeze detach narrow select slice expand t contiguous "
    "chunk split unbind movedim Identity Flatten Unflatten".split()
)


@dataclass(frozen=True)
class Edge:
    """A value that must stay in memory while other layers run.

    Args:
        name: of the site that makes it.
        shape, dtype: of the value for the example inputs.
        lifetime: compute layers that run while it waits, up to the last late reader.
        readers: the operations that read it late.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    lifetime: int
    readers: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes as floats."""
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


class _QuantizerTracer(Tracer):
    """Keeps quantizers, and modules that hold one, as single nodes."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = isinstance(m, ActivationQuantizer) or isinstance(getattr(m, "quantizer", None), ActivationQuantizer)
        return own or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> GraphModule:
    """The model as a graph: itself if it is one already, else one that shares its weights.

    Raises:
        TraceFailed: torch.fx cannot trace it.
    """
    if isinstance(model, GraphModule):
        return model
    try:
        return GraphModule(model, _QuantizerTracer().trace(model), type(model).__name__)
    except Exception as error:
        raise TraceFailed(
            f"torch.fx cannot trace {type(model).__name__} ({type(error).__name__}: {error}). Wrap the part that "
            "branches on data with torch.fx.wrap, or export the model and prepare it with the PT2E adapter first."
        ) from error


def operation_name(node: Node, model: GraphModule) -> str:
    """Class name of a module call, name of a function or method, "" for inputs and the like."""
    if node.op == "call_module":
        return type(model.get_submodule(str(node.target))).__name__
    if node.op == "call_function":
        packet = getattr(node.target, "overloadpacket", node.target)
        return str(getattr(packet, "__name__", packet))
    return str(node.target) if node.op == "call_method" else ""


def computes(node: Node, model: GraphModule) -> bool:
    """Whether a node is a layer that takes time and memory: convolution, linear, attention, matmul."""
    if node.op == "call_module":  # fused layers hold theirs inside
        return any(isinstance(m, _LAYERS) for m in model.get_submodule(str(node.target)).modules())
    name = operation_name(node, model)
    return _COMPUTE.search(name) is not None and _NOT_COMPUTE.search(name) is None


def quantizer_of(node: Node, model: GraphModule) -> ActivationQuantizer | None:
    """The quantizer that a node calls: bare, or inside an adapter's observer."""
    if node.op != "call_module":
        return None
    module = model.get_submodule(str(node.target))
    found = module if isinstance(module, ActivationQuantizer) else getattr(module, "quantizer", None)
    return found if isinstance(found, ActivationQuantizer) else None


def producer_axis(node: Node, model: GraphModule) -> int:
    """Channel axis of the value of a node, found at the layer before it."""
    for _ in range(10_000):
        name = operation_name(node, model)
        if default_channel_axis(name) == -1:
            return -1
        if (name not in ELEMENTWISE and "Quantizer" not in name and "Observer" not in name) or not node.all_input_nodes:
            return 1
        node = node.all_input_nodes[0]
    return 1


def site_names(model: GraphModule) -> dict[Node, str]:
    """Site name of every node: as the adapters wrote it, or by the same rules."""
    names = SiteNames()
    found: dict[Node, str] = {}
    for node in model.graph.nodes:
        stack: Any = node.meta.get("nn_module_stack") or {}
        enclosing = next(reversed(stack.values()))[0] if stack else ""
        if node.op == "call_module":
            own = names.module(str(node.target))
            if quantizer_of(node, model) is not None and node.all_input_nodes:
                own = found.get(node.all_input_nodes[0], own)
        elif node.op in ("call_function", "call_method"):
            own = names.operation(enclosing, operation_name(node, model))
        else:
            own = node.name
        found[node] = str(node.meta.get(SITE, own))
    return found


class _ShapeRecorder(Interpreter):
    """Runs the graph once and notes shape and dtype of every tensor."""

    def __init__(self, model: GraphModule) -> None:
        super().__init__(model)
        self.found: dict[Node, tuple[tuple[int, ...], torch.dtype]] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.found[n] = (tuple(value.shape), value.dtype)
        return value


@torch.no_grad()
def record_shapes(model: GraphModule, inputs: tuple[Any, ...]) -> dict[Node, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor for these inputs, without a trace in statistics: run on a copy by the caller."""
    recorder = _ShapeRecorder(model)
    recorder.run(*inputs)
    return recorder.found


def _in_place(node: Node, model: GraphModule) -> bool:
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    if node.kwargs.get("inplace"):
        return True
    name = operation_name(node, model)
    return (name.endswith("_") and not name.endswith("__")) or name in ("iadd", "isub", "imul", "itruediv")


def follow_in_place(model: GraphModule) -> None:
    """Let what reads a value after an in-place operation changed it read that operation's result: it is the same."""
    order = {node: i for i, node in enumerate(model.graph.nodes)}
    for node in model.graph.nodes:
        if node.all_input_nodes and _in_place(node, model):
            changed = node.all_input_nodes[0]
            for user in list(changed.users):
                if order[user] > order[node]:
                    user.replace_input_with(changed, node)


def _passes_on(node: Node, model: GraphModule) -> bool:
    """Whether a node's value is that of its input: a view, or its quantized form."""
    if not node.all_input_nodes:
        return False
    return operation_name(node, model) in _VIEWS or quantizer_of(node, model) is not None


def _root(node: Node, model: GraphModule) -> Node:
    """The node that made this one's value."""
    while _passes_on(node, model):
        node = node.all_input_nodes[0]
    return node


def _first_read(root: Node, model: GraphModule, order: dict[Node, int]) -> int:
    """Where the value of a node is first read, by something that does more than to pass it on."""
    reads, queue = [len(order)], [root]
    while queue:
        for user in queue.pop().users:
            if _passes_on(user, model):
                queue.append(user)
            else:
                reads.append(order[user])
    return min(reads)


def _siblings(node: Node, reader: Node, model: GraphModule, order: dict[Node, int]) -> int:
    """Layers that read `node` before `reader` does, but do not lead to it: they could as well run after it.

    Query, key and value projections read one tensor, one after the other: it is not long-lived for that.
    """
    before = [u for u in node.users if order[u] < order[reader] and computes(u, model)]
    if not before or not computes(reader, model):
        return 0
    ancestors, stack = set(), [reader]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in ancestors and order[source] > order[node]:
                ancestors.add(source)
                stack.append(source)
    return sum(u not in ancestors for u in before)


def late_readers(model: GraphModule, min_lifetime: int) -> dict[Node, list[tuple[Node, int]]]:
    """For every long-lived value its late readers, each with the number of layers that ran while it waited.

    Late: the value, or what it is a view of, was read before, and since it was made at least `min_lifetime` compute
    layers ran.
    """
    nodes = list(model.graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    done = [0]
    for node in nodes:
        done.append(done[-1] + computes(node, model))
    found: dict[Node, list[tuple[Node, int]]] = {}
    constant: set[Node] = set()  # made from parameters alone: a dequantized weight
    for node in nodes:
        if node.op != "placeholder" and all(source in constant for source in node.all_input_nodes):
            constant.add(node)
            continue
        root = _root(node, model)
        if node.op in ("placeholder", "get_attr", "output") or root.op in ("placeholder", "get_attr"):
            continue
        first = _first_read(root, model, order)
        late = []
        for user in sorted(node.users, key=order.__getitem__):
            waited = done[order[user]] - done[order[node] + 1]
            waited -= _siblings(node, user, model, order) if waited >= min_lifetime else 0
            if waited >= min_lifetime and first < order[user] and user.op != "output":
                late.append((user, waited))
        if late:
            found[node] = late
    return found
