"""What storage asks of a traced network beyond `graph`: layers, quantizers, axes and names of its nodes."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node, Proxy, Tracer

from ...graph.axes import channel_axes
from ...graph.fx import TensorFacts, describe, name_sites, operation_name
from ...graph.operations import facts
from ...quantizer import ActivationQuantizer
from ...sites import iter_quantizers
from ..format.errors import TraceFailed

SITE = "dqa_site"  # key in Node.meta where the adapters keep a node's site name
_LAYERS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention, nn.Embedding)
_COMPUTE = re.compile(
    r"(^|_)(conv|linear|bilinear|matmul|bmm|addmm|mm|einsum|baddbmm|embedding)|attention|convolution", re.IGNORECASE
)
_NOT_COMPUTE = re.compile(r"upsample|interpolate|convert", re.IGNORECASE)
VIEWS = frozenset(
    "view reshape flatten transpose permute getitem squeeze unsqueeze detach narrow select slice expand t contiguous "
    "chunk split unbind movedim Identity Flatten Unflatten".split()
)
IN_PLACE_OPERATORS = frozenset(f"i{op}" for op in "add sub mul truediv floordiv mod pow matmul and or xor".split())
# Values of a quantized tensor pass through these as they are, each on the axes where it was.
_SAME_CODES = frozenset(
    "max_pool1d max_pool2d max_pool3d MaxPool1d MaxPool2d MaxPool3d Identity clone contiguous detach".split()
)
# likewise, where the dtype stays
_CASTS = frozenset("to type type_as float double half bfloat16 alias dropout Dropout".split())


class _InPlaceProxy(Proxy):
    """Records `x += y` as what it is: torch.fx would make a new tensor, which other names of x do not see."""


def _record_in_place(name: str) -> Callable[[Proxy, Any], Any]:
    def operation(self: Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return operation


for _name in sorted(IN_PLACE_OPERATORS):
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
        return _with_quantizers(model, model)
    try:
        graph = _QuantizerTracer().trace(model)
        for node in graph.nodes:
            if node.name == "self":  # a layer of that name: torch.fx (2.13) writes code in which it hides the model
                node._rename("self_layer")
        return _with_quantizers(GraphModule(model, graph, type(model).__name__), model)
    except TraceFailed:
        raise
    except Exception as error:
        raise TraceFailed(
            f"torch.fx cannot trace {type(model).__name__} ({type(error).__name__}: {error}). Wrap the part that "
            "branches on data with torch.fx.wrap, or export the model and prepare it with the PT2E adapter first."
        ) from error


def _with_quantizers(traced: GraphModule, model: nn.Module) -> GraphModule:
    """The graph, with every quantizer of the model as a call of its own. Changes it in place.

    Raises:
        TraceFailed: a quantizer is not in the graph.
    """
    for node in list(traced.graph.nodes):
        module = traced.get_submodule(str(node.target)) if node.op == "call_module" else nn.Identity()
        for part in (module, *module.children()):
            split = getattr(part, "split_quantizer", None)
            steps = None if split is None else split(module)
            if steps is not None:
                _replace_by(traced, node, steps)
                break
    traced.recompile()
    called = {quantizer_of(node, traced) for node in traced.graph.nodes}
    called |= {m for node in traced.graph.nodes if node.op == "call_module" for m in _inside(traced, node)}
    missed = [name for name, quantizer in iter_quantizers(model) if quantizer not in called]
    if missed:
        raise TraceFailed(
            f"torch.fx does not see {len(missed)} quantizers of {type(model).__name__} ({missed[0]!r}, ...): hooks "
            "call them, and the stored model would compute without them. Quantize the float model by an adapter that "
            "gives a graph, or by prepare_stored alone."
        )
    return traced


def _inside(model: GraphModule, node: Node) -> Iterator[ActivationQuantizer]:
    """The quantizers in a module that a graph calls as a whole."""
    for module in model.get_submodule(str(node.target)).modules():
        if isinstance(module, ActivationQuantizer):
            yield module


def _replace_by(model: GraphModule, node: Node, steps: Sequence[nn.Module]) -> None:
    """Call modules one after the other in place of a node."""
    value: Any = node.args[0]
    with model.graph.inserting_before(node):
        for number, step in enumerate(steps):
            value = model.graph.call_module(add_module(model, f"{node.target}_{number}", step), (value,))
    node.replace_all_uses_with(value)
    value.meta = dict(node.meta)
    model.graph.erase_node(node)


def add_module(model: GraphModule, name: str, module: nn.Module) -> str:
    """Add a module at the top of a graph; its name, which no other has, whatever '.' became."""
    wanted = target = name.replace(".", "_")
    number = 1
    while hasattr(model, target):
        number += 1
        target = f"{wanted}_{number}"
    model.add_submodule(target, module)
    return target


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


def site_names(model: GraphModule) -> dict[Node, str]:
    """Site name of every node: as the adapters wrote it, or by the same rules; a quantizer's is that of its tensor."""
    found: dict[Node, str] = {}
    named = name_sites(model.graph, model)
    for node in model.graph.nodes:
        own = named.get(node, node.name)
        if quantizer_of(node, model) is not None and node.all_input_nodes:
            own = found.get(node.all_input_nodes[0], own)
        found[node] = str(node.meta.get(SITE, own))
    return found


def producer_axes(model: GraphModule, seen: dict[Node, TensorFacts]) -> dict[Node, int]:
    """The channel axis of every value. seen: what each node gave when the model ran."""
    return {value.key: axis.axis for value, axis in channel_axes(describe(model, seen)).items()}


def quantized_source(node: Node, model: GraphModule, seen: Mapping[Node, TensorFacts]) -> tuple[Node | None, bool]:
    """The quantizer whose codes a value still holds, though other operations moved or selected them since.

    Args:
        seen: what each node gave when the model ran.

    Returns:
        (its node, or None; whether channels and samples are where they were).
    """
    same = True
    while quantizer_of(node, model) is None:
        name = operation_name(node, model)
        if (facts(name).kind != "moves" and name not in _SAME_CODES) or not node.all_input_nodes:
            return None, False
        before = node.all_input_nodes[0]
        cast = name in _CASTS and node in seen and before in seen and seen[node].dtype == seen[before].dtype
        same = same and (name in _SAME_CODES or cast)
        node = before
    return node, same
