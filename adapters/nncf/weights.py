"""NNCF's 8-bit weight quantizers, in a form that exports.

The stock ones call `.item()` in every forward, which torch.export and torch.compile refuse, and they compile a C++
extension on first use, which takes minutes or fails (NNCF 3.4). These are the same modules with the same parameters:
while training they run NNCF's own kernel, while being traced for OpenVINO they emit NNCF's FakeQuantize, and otherwise
they compute NNCF's formula in plain torch, bit for bit the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from nncf.common.graph.graph import NNCFGraph
from nncf.common.quantization.structs import QuantizationScheme, QuantizerConfig
from nncf.quantization.algorithms.min_max.torch_backend import PTMinMaxAlgoBackend
from nncf.torch.function_hook.commands import PT2InsertionCommand
from nncf.torch.function_hook.hook_storage import decode_hook_name
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import build_nncf_graph
from nncf.torch.function_hook.wrapper import get_hook_storage, is_wrapped
from nncf.torch.graph.transformations.commands import PTTargetPoint
from nncf.torch.model_graph_manager import find_const_node_in_constant_subgraph, get_const_node
from nncf.torch.quantization.layers import (
    AsymmetricQuantizer,
    BaseQuantizer,
    PTQuantizerSpec,
    SymmetricQuantizer,
)
from nncf.torch.utils import is_tracing_state
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from dqa_plugins.errors import ExportFailed
from dqa_plugins.host.weights import QuantizedWeight, WeightSite, hold
from dqa_plugins.rounding import cast, compute_dtype


def symmetric_quantize(weight: Tensor, quantizer: Any) -> Tensor:
    """Fake-quantize a weight as one operation of NNCF's graph.

    NNCF tells quantized weights by the function's name (QUANTIZE_NODE_TYPES), so it is the one NNCF uses.
    """
    if has_torch_function_unary(weight):
        return handle_torch_function(symmetric_quantize, (weight,), weight, quantizer)
    low, span = quantizer.grid()
    return fake_quantize(weight, low, span, quantizer._level_high - quantizer._level_low)


def fake_quantize(weight: Tensor, low: Tensor, span: Tensor, steps: Tensor) -> Tensor:
    """NNCF's formula (nncf.torch.quantization.reference), in the same order of operations.

    Half types are computed in float32, where NNCF would leave a float32 weight to a layer of another dtype.

    Args:
        weight: any shape.
        low, span: smallest value and width of the range, broadcast against weight.
        steps: () or (1,) integer, number of steps in the range: levels - 1.
    """
    scale = span.reciprocal() * steps  # what `number / tensor` computes in NNCF's formula; `steps / span` is an ulp off
    codes = torch.maximum(torch.minimum(weight, low + span), low) - low
    return cast((codes * scale - (-low * scale).round()).round() / scale, weight.dtype)


class _Exportable:
    """Mixed into a BaseQuantizer: NNCF's kernel in training and tracing, plain torch otherwise."""

    weight_names: tuple[str, ...] = ()  # the parameters it quantizes: one, or several that share a scale

    def get_config(self: Any) -> dict[str, Any]:
        """NNCF's own entry, and the weights' names; plain JSON, where NNCF leaves an enum (which is a pickle)."""
        entry: dict[str, Any] = super().get_config()  # type: ignore[misc]
        mode, shape = QuantizationScheme(entry["mode"]).value, list(entry["scale_shape"])
        names = self.weight_names
        return {**entry, "mode": mode, "scale_shape": shape, "weight_name": names[0] if len(names) == 1 else names}

    @classmethod
    def from_config(cls: Any, state: dict[str, Any]) -> Any:
        """Inverse of `get_config`."""
        quantizer = super().from_config(state)  # type: ignore[misc]
        names = state["weight_name"]
        quantizer.weight_names = (names,) if isinstance(names, str) else tuple(names)
        return quantizer

    def _forward_impl(self: Any, x: Tensor) -> Tensor:
        learning = self.training and torch.is_grad_enabled() and x.requires_grad
        if learning or is_tracing_state():
            return super()._forward_impl(x)  # type: ignore[misc]
        return symmetric_quantize(x, self)


class SymmetricWeight(_Exportable, SymmetricQuantizer):
    """8-bit symmetric weights."""

    def grid(self) -> tuple[Tensor, Tensor]:
        """(low, span) of the range."""
        high = single(self.scale).abs() + self.eps
        low = high * (self._level_low / self._level_high)
        return low, high - low


class AsymmetricWeight(_Exportable, AsymmetricQuantizer):
    """8-bit asymmetric weights."""

    def grid(self) -> tuple[Tensor, Tensor]:
        """(low, span) of the range, moved so that zero is on the grid."""
        span = single(self.input_range).abs() + self.eps
        return tune_range(single(self.input_low), span, self._level_high - self._level_low)


def single(parameter: Tensor) -> Tensor:
    """A parameter of a half type in float32."""
    return cast(parameter, compute_dtype(parameter.dtype))


def tune_range(low: Tensor, span: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """NNCF's TuneRange without its assignment under a mask, which torch.export refuses."""
    high = (span + low).clamp(min=0)
    low = low.clamp(max=0)
    scale = (high - low).reciprocal() * steps
    zero = torch.round(-low * scale)
    new_low = torch.where(zero < steps, zero / (zero - steps) * high, low)
    new_high = torch.where(zero > 0, (zero - steps) / zero * low, high)
    keep_high = (high - new_low) > (new_high - low)
    new_low = torch.where(keep_high, new_low, low)
    return new_low, torch.where(keep_high, high, new_high) - new_low


_MODULES = {QuantizationScheme.SYMMETRIC: SymmetricWeight, QuantizationScheme.ASYMMETRIC: AsymmetricWeight}


class WeightBackend(PTMinMaxAlgoBackend):
    """NNCF's backend, placing the modules above."""

    @staticmethod
    def create_quantizer_insertion_command(
        nncf_graph: NNCFGraph, target_point: PTTargetPoint, quantizer_config: QuantizerConfig, parameters: Any
    ) -> PT2InsertionCommand:
        """The command that hooks a weight quantizer in front of its operation."""
        return _command(nncf_graph, [target_point], quantizer_config, parameters)

    @staticmethod
    def create_unified_scales_quantizers_insertion_commands(
        nncf_graph: NNCFGraph, target_points: list[PTTargetPoint], quantizer_config: QuantizerConfig, parameters: Any
    ) -> list[PT2InsertionCommand]:
        """The command that hooks one quantizer in front of the operations of several weights."""
        return [_command(nncf_graph, target_points, quantizer_config, parameters)]


def _command(
    graph: NNCFGraph, points: list[PTTargetPoint], config: QuantizerConfig, parameters: Any
) -> PT2InsertionCommand:
    shape = PTMinMaxAlgoBackend._get_input_scale_shape(graph, points[0], config.per_channel)
    spec = PTQuantizerSpec.from_config(
        config,
        narrow_range=config.narrow_range,
        scale_shape=shape,
        half_range=False,
        logarithm_scale=False,
        is_quantized_on_export=False,
    )
    quantizer = _MODULES[QuantizationScheme(config.mode)](spec)
    PTMinMaxAlgoBackend._fill_quantizer_parameters(quantizer, parameters, spec.scale_shape)
    nodes = [get_const_node(graph.get_node_by_name(p.target_node_name), p.input_port_id, graph) for p in points]
    quantizer.weight_names = tuple("" if node is None else node.layer_attributes.name for node in nodes)
    return PT2InsertionCommand(target_points=points, hook_module=quantizer)


@torch.no_grad()
def bake_weights(model: nn.Module, example_input: Any = None, *, do_copy: bool = True) -> nn.Module:
    """Write the quantized weights into the model and take NNCF's weight quantizers out. No bit of the output changes.

    For models quantized by stock NNCF, and for whoever wants plain parameters; what `quantize` returns exports as is.

    Args:
        model: quantized by NNCF; other models are only copied.
        example_input: only needed for stock quantizers, which do not know whether and which weight they quantize.
        do_copy: False changes the model itself.

    Raises:
        ExportFailed: a quantizer's weight cannot be found, or is used elsewhere with other values.
    """
    model = copy.deepcopy(model) if do_copy else model
    if not is_wrapped(model):
        return model
    storage = get_hook_storage(model)
    graph = None if example_input is None else build_nncf_graph(model, example_input)
    found: dict[str, list[tuple[str, BaseQuantizer]]] = {}
    for hook, module in storage.named_hooks(remove_duplicate=False):
        if isinstance(module, BaseQuantizer):
            for name in _weight_names(hook, module, model, graph):
                found.setdefault(name, []).append((hook, module))
    values = {name: _baked(name, [module for _, module in hooks], model) for name, hooks in found.items()}
    for name in found:  # nothing is changed before everything was found
        model.get_parameter(name).data = values[name]
    for hook in {hook for hooks in found.values() for hook, _ in hooks}:
        storage.delete_hook(hook)
    return model


def _weight_names(hook: str, module: Any, model: nn.Module, graph: NNCFGraph | None) -> tuple[str, ...]:
    """The parameters that a quantizer is hooked to, none for stock quantizers of activations."""
    if isinstance(module, _Exportable):
        return module.weight_names
    if graph is None:
        raise ExportFailed(
            f"{hook!r} is a stock NNCF quantizer, which does not know its weight; give bake_weights an example_input."
        )
    kind, operation, port = decode_hook_name(hook)
    if kind == "post_hooks":  # an activation, or a parameter (NNCF's weight compression)
        return (operation,) if operation in dict(model.named_parameters()) else ()
    edge = graph.get_input_edge_by_port_id(graph.get_node_by_name(operation), port)
    const: Any = find_const_node_in_constant_subgraph(edge.from_node, graph)
    return () if const is None else (str(const.layer_attributes.name),)


def _baked(name: str, modules: list[BaseQuantizer], model: nn.Module) -> Tensor:
    weight = model.get_parameter(name)
    uses = sum(p is weight for _, p in model.named_parameters(remove_duplicate=False))
    values = [_quantized(module, weight.detach()) for module in modules]
    if uses > len(modules) or any(not torch.equal(value, values[0]) for value in values):
        raise ExportFailed(
            f"{name!r} is shared by {uses} layers, which do not all quantize it to the same values; untie it first."
        )
    return values[0]


def _quantized(module: Any, weight: Tensor) -> Tensor:
    kind = SymmetricWeight if isinstance(module, SymmetricQuantizer) else AsymmetricWeight
    return fake_quantize(weight, *kind.grid(module), module._level_high - module._level_low)


def read_weights(model: nn.Module) -> Iterator[WeightSite]:
    """The weights that our forms of NNCF's quantizers are hooked to.

    A weight that several layers read through different quantizers is left out: it has no single form.
    """
    for path, wrapped in list(model.named_modules()):
        if not is_wrapped(wrapped):
            continue
        found: dict[str, list[tuple[str, Any]]] = {}
        for hook, module in get_hook_storage(wrapped).named_hooks():
            # a quantizer that several weights share says at none of its hooks which one it reads: they stay as they are
            if isinstance(module, _Exportable) and len(module.weight_names) == 1:
                found.setdefault(module.weight_names[0], []).append((hook, module))
        for name, hooks in found.items():
            try:
                _baked(name, [module for _, module in hooks], wrapped)
            except ExportFailed:
                continue
            weight = _integers(hooks[0][1], wrapped.get_parameter(name).detach())
            replace = _replacement(wrapped, name, weight, [hook for hook, _ in hooks])
            yield WeightSite(f"{path}.{name}" if path else name, weight, replace)


@torch.no_grad()
def _integers(module: Any, weight: Tensor) -> QuantizedWeight:
    """The codes behind `fake_quantize`, which divides them by 1 / step."""
    low, span = module.grid()
    steps = module._level_high - module._level_low
    inverse = span.reciprocal() * steps
    offset = (-low * inverse).round()
    values = fake_quantize(weight, low, span, steps)
    signed = bool(module._level_low < 0)  # symmetric; where no weight is negative NNCF's codes are unsigned
    zero_point = torch.zeros_like(offset) if signed else offset
    codes = ((values * inverse).round() + zero_point).to(torch.int8 if signed else torch.uint8)
    found = QuantizedWeight.laid_out(codes, inverse.double().reciprocal(), zero_point.to(codes.dtype), weight.dtype)
    if found is None:
        raise ExportFailed(f"{module.weight_name!r} has a scale of shape {tuple(low.shape)}: one axis was expected.")
    return found


def _replacement(model: nn.Module, name: str, weight: QuantizedWeight, hooks: list[str]) -> Callable[[], None]:
    def replace() -> None:
        parameter = model.get_parameter(name)
        for hook in hooks:
            get_hook_storage(model).delete_hook(hook)
        for module in list(model.modules()):
            for own in [key for key, value in module._parameters.items() if value is parameter]:
                hold(module, own, weight)

    return replace
