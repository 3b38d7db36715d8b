"""Facts about a traced network, and which of its values live long: read once, then again after other layers ran.

Those are the stored activations of the DQA paper: residual shortcuts, U-Net skips. A network's inputs are left alone,
because the caller holds them anyway.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node, Proxy, Tracer

from ...quantizer import ActivationQuantizer
from ...sites import ELEMENTWISE, PRESERVING, SiteNames, default_channel_axis
from ..format.errors import TraceFailed

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
# The result may share memory with the input: always, or where there is nothing to do (a dropout in eval mode).
_MAY_ALIAS = _VIEWS | frozenset(
    "alias as_strided broadcast_to conj data diagonal expand_as H hsplit vsplit dsplit imag mH moveaxis mT positive "
    "ravel real reshape_as split_with_sizes swapaxes swapdims T tensor_split unflatten unfold unsafe_chunk "
    "unsafe_split view_as requires_grad_ detach_ to type type_as float double half bfloat16 cpu cuda pin_memory "
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout "
    "Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout".split()
)
_IN_PLACE_OPERATORS = frozenset(f"i{op}" for op in "add sub mul truediv floordiv mod pow matmul and or xor".split())
# Values of a quantized tensor pass through these as they are, each on the axes where it was.
_SAME_CODES = frozenset(
    "max_pool1d max_pool2d max_pool3d MaxPool1d MaxPool2d MaxPool3d Identity clone contiguous detach".split()
)
_SIZES = frozenset("size dim ndimension numel".split())


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


class _InPlaceProxy(Proxy):
    """Records `x += y` as what it is: torch.fx would make a new tensor, which other names of x do not see."""


def _record_in_place(name: str) -> Callable[[Proxy, Any], Any]:
    def operation(self: Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return operation


for _name in sorted(_IN_PLACE_OPERATORS):
    setattr(_InPlaceProxy, f"__{_name}__", _record_in_place(_name))


class _QuantizerTracer(Tracer):
    """Keeps quantizers, and modules that hold one, as single nodes; in-place operators work in place."""

    def proxy(self, node: Node) -> Proxy:
        return _InPlaceProxy(node, self)

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


def add_module(model: GraphModule, name: str, module: nn.Module) -> str:
    """Add a module at the top of a graph; its name, which no other has, whatever '.' became."""
    wanted = target = name.replace(".", "_")
    number = 1
    while hasattr(model, target):
        number += 1
        target = f"{wanted}_{number}"
    model.add_submodule(target, module)
    return target


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


def _flag_in_place(node: Node, model: GraphModule) -> bool:
    """Whether an operation is told to work in place."""
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    if node.op != "call_function" or isinstance(node.target, torch._ops.OpOverload):
        return False
    try:
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments  # type: ignore[arg-type]
    except (TypeError, ValueError):  # built in
        given = node.kwargs
    return given.get("inplace") is True


def written(node: Node, model: GraphModule) -> Node | None:
    """The value that an operation changes in place; None if it changes none."""
    target: Any = None
    name = operation_name(node, model)
    if isinstance(node.target, torch._ops.OpOverload):
        for i, argument in enumerate(node.target._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                target = node.kwargs.get(argument.name, node.args[i] if i < len(node.args) else None)
    elif "out" in node.kwargs:
        target = node.kwargs["out"]
    elif name in _IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__")) or _flag_in_place(node, model):
        target = node.args[0] if node.args else next(iter(node.all_input_nodes), None)
    return target if isinstance(target, Node) else None


def _shares_memory_with(node: Node, model: GraphModule) -> Node | None:
    """The input that a node's value may share memory with."""
    changed = written(node, model)
    if changed is not None or not node.all_input_nodes:
        return changed
    name = str(node.args[1]) if node.target is getattr else operation_name(node, model)
    schema = node.target._schema if isinstance(node.target, torch._ops.OpOverload) else None
    view = schema is not None and any(result.alias_info is not None for result in schema.returns)
    # a quantizer that observes returns its input
    return node.all_input_nodes[0] if view or name in _MAY_ALIAS or quantizer_of(node, model) is not None else None


def follow_in_place(model: GraphModule) -> None:
    """Let what reads a value after an in-place operation changed it read that operation's result: it is the same."""
    order = {node: i for i, node in enumerate(model.graph.nodes)}
    for node in model.graph.nodes:
        changed = written(node, model)
        if changed is not None:
            for user in list(changed.users):
                if order[user] > order[node]:
                    user.replace_input_with(changed, node)


def read_sizes_early(model: GraphModule) -> None:
    """Read the size of a value when it is made: to read it late would keep the value for nothing else."""
    for node in list(model.graph.nodes):
        size = node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device")
        if len(node.all_input_nodes) == 1 and (size or (node.op == "call_method" and node.target in _SIZES)):
            node.all_input_nodes[0].append(node)


class Memory:
    """Which values of a graph may share memory, and where it is written."""

    def __init__(self, model: GraphModule) -> None:
        self.order = {node: i for i, node in enumerate(model.graph.nodes)}
        self._first: dict[Node, Node] = {}
        self._members: dict[Node, list[Node]] = {}
        self._writers: dict[Node, list[Node]] = {}
        for node in model.graph.nodes:
            source = _shares_memory_with(node, model)
            first = node if source is None else self._first[source]
            self._first[node] = first
            self._members.setdefault(first, []).append(node)
            if written(node, model) is not None:
                self._writers.setdefault(first, []).append(node)

    def last_write(self, node: Node, reader: Node) -> Node:
        """The last node before `reader` that changes the value of `node` after it was made; else `node` itself."""
        between = [w for w in self._writers.get(self._first[node], ()) if node is not w and self._in(node, w, reader)]
        return between[-1] if between else node

    def _in(self, first: Node, node: Node, last: Node) -> bool:
        return self.order[first] < self.order[node] < self.order[last]

    def can_read_copy(self, node: Node, reader: Node) -> bool:
        """Whether `reader` may read a copy of `node`: nothing written through one is read through the other after."""
        first = self._first[node]
        copied: set[Node] = set()
        if self._first[reader] is first:
            copied.add(reader)
            for member in self._members[first]:
                if self.order[member] > self.order[reader] and copied.intersection(member.all_input_nodes):
                    copied.add(member)
        rest = set(self._members[first]) - copied
        for writer in self._writers.get(first, ()):
            if self.order[writer] < self.order[reader]:
                continue
            others = rest if writer in copied else copied
            if any(self.order[user] > self.order[writer] for other in others for user in other.users):
                return False
        return True


def quantized_source(node: Node, model: GraphModule) -> tuple[Node | None, bool]:
    """The quantizer whose codes a value still holds, though other operations moved or selected them since.

    Returns:
        (its node, or None; whether channels and samples are where they were).
    """
    same = True
    while quantizer_of(node, model) is None:
        name = operation_name(node, model)
        if name not in PRESERVING | _SAME_CODES or not node.all_input_nodes:
            return None, False
        same = same and name in _SAME_CODES
        node = node.all_input_nodes[0]
    return node, same


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


@dataclass(frozen=True)
class LateRead:
    """A late reader of a value.

    Args:
        reader: the operation.
        waited: layers that ran while the value waited for it.
        final: the value's node, or the operation that changed it last in place before.
    """

    reader: Node
    waited: int
    final: Node


def late_reads(model: GraphModule, min_lifetime: int, storable: Callable[[Node], bool]) -> dict[Node, list[LateRead]]:
    """The late reads of every long-lived value.

    Late: the value, or what it is a view of, was read before, and since it was made at least `min_lifetime` compute
    layers ran.
    """
    memory = Memory(model)
    nodes, order = list(model.graph.nodes), memory.order
    done = [0]
    for node in nodes:
        done.append(done[-1] + computes(node, model))
    found: dict[Node, list[LateRead]] = {}
    constant: set[Node] = set()  # made from parameters alone: a dequantized weight
    for node in nodes:
        if node.op != "placeholder" and all(source in constant for source in node.all_input_nodes):
            constant.add(node)
            continue
        root = _root(node, model)
        if node.op in ("placeholder", "get_attr", "output") or root.op in ("placeholder", "get_attr"):
            continue
        if not storable(node):
            continue
        first = _first_read(root, model, order)
        late = []
        for user in sorted(node.users, key=order.__getitem__):
            final = memory.last_write(node, user)
            waited = done[order[user]] - done[order[final] + 1]
            waited -= _siblings(node, user, model, order) if waited >= min_lifetime else 0
            if waited < min_lifetime or first >= order[user] or user.op == "output":
                continue
            if memory.can_read_copy(node, user):
                late.append(LateRead(user, waited, final))
        if late:
            found[node] = late
    return found
