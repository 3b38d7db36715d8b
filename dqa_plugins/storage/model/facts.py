"""What storage asks of a traced network beyond `graph`: layers, quantizers, axes and names of its nodes."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
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
        TraceFailed: torch.fx cannot trace it, or does not see a quantizer of it.
    """
    if isinstance(model, GraphModule):
        return model
    try:
        graph = _QuantizerTracer().trace(model)
        for node in graph.nodes:
            if node.name == "self":  # a layer of that name: torch.fx (2.13) writes code in which it hides the model
                node._rename("self_layer")
        traced = GraphModule(model, graph, type(model).__name__)
    except Exception as error:
        raise TraceFailed(
            f"torch.fx cannot trace {type(model).__name__} ({type(error).__name__}: {error}). Wrap the part that "
            "branches on data with torch.fx.wrap, or export the model and prepare it with the PT2E adapter first."
        ) from error
    seen = set(traced.modules())
    lost = next((name for name, quantizer in iter_quantizers(model) if quantizer not in seen), None)
    if lost is not None:
        raise TraceFailed(
            f"torch.fx does not see the quantizer '{lost}' of this {type(model).__name__}, which would run without it: "
            "NNCF's quantizers, for example, are hooks. Store the float model, or quantize it with another adapter."
        )
    return traced


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


def quantized_source(node: Node, model: GraphModule) -> tuple[Node | None, bool]:
    """The quantizer whose codes a value still holds, though other operations moved or selected them since.

    Returns:
        (its node, or None; whether channels and samples are where they were).
    """
    same = True
    while quantizer_of(node, model) is None:
        name = operation_name(node, model)
        if (facts(name).kind != "moves" and name not in _SAME_CODES) or not node.all_input_nodes:
            return None, False
        same = same and name in _SAME_CODES
        node = node.all_input_nodes[0]
    return node, same
