"""A method in torchao's own configuration: a Quantizer."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from dqa_plugins.errors import InvalidArgument, UnsupportedCombination
from dqa_plugins.graph.operations import Operation
from dqa_plugins.graph.readers import geometry, next_linear
from dqa_plugins.host.patterns import Pattern
from dqa_plugins.host.placement import PLACEMENT, Group, Placement, Site
from dqa_plugins.host.quantize import require_float
from dqa_plugins.host.settings import warn_idle
from dqa_plugins.host.skip import check_skip, resolve_skip, within
from dqa_plugins.method import Method
from dqa_plugins.methods import check_method
from dqa_plugins.options import WeightScheme, check_weights

from .host import (
    ANNOTATION,
    MovingAveragePerChannelMinMaxObserver,
    QuantizationSpec,
    Quantizer,
    annotation_class,
)
from .names import TRAINED_NORM
from .observer import PT2EObserver, PT2EWeight, WeightRange
from .place import Described, describe, place
from .sharing import Placed, Shared

logger = logging.getLogger(__name__)

_ADVICE = ", and whether another Quantizer took them all (put this one first)"


def weight_spec(weight_bits: int | None, weight_scheme: WeightScheme, channel_axis: int = 0) -> Any:
    """torchao's QuantizationSpec of a weight.

    Args:
        weight_bits: 2 to 8; None leaves weights float.
        weight_scheme: "channel": symmetric, one scale per output channel, codes in +-(2^(b-1) - 1); "qpp": eq. 16 of
            the QPP paper, asymmetric, one scale per tensor.
        channel_axis: of the output channels in the weight.

    Raises:
        InvalidArgument: other values.
    """
    check_weights("PluginQuantizer", weight_bits, weight_scheme)
    if weight_bits is None:
        return None
    half = 2 ** (weight_bits - 1)
    if weight_scheme == "qpp":
        constructor = PT2EWeight.with_args(observer=WeightRange)
        return QuantizationSpec(torch.int8, constructor, -half, half - 1, torch.per_tensor_affine)
    # the axis goes to the constructor: torchao 0.18 passes a spec's ch_axis only to classes named *PerChannel*
    constructor = PT2EWeight.with_args(
        observer=MovingAveragePerChannelMinMaxObserver,
        averaging_constant=1.0,  # the weight of this moment, also in QAT
        ch_axis=channel_axis,
    )
    return QuantizationSpec(torch.int8, constructor, 1 - half, half - 1, torch.per_channel_symmetric, channel_axis)


class PluginQuantizer(Quantizer):
    """Our methods as a torchao Quantizer, alone or in front of others in a ComposableQuantizer.

        prepared = prepare_pt2e(exported.module(), PluginQuantizer().set_global(DQA(bits=4)))

    A name decides before a type, a type before the global method. Calls that another Quantizer annotated before are
    left to it; calls without a method are left float, or to the Quantizers behind.

    Args:
        weight_bits, weight_scheme: see `weight_spec`.
        skip: "first", "last" (the first and last layer with a weight), "ends" (both, where there are more than three
            such layers), or names of modules to leave float.

    Raises:
        InvalidArgument, NotAMethod; an unknown name when the model is prepared.
    """

    def __init__(
        self, weight_bits: int | None = 8, weight_scheme: WeightScheme = "channel", skip: Iterable[str] = ()
    ) -> None:
        super().__init__()
        weight_spec(weight_bits, weight_scheme)
        self.weight_bits, self.weight_scheme, self.skip = weight_bits, weight_scheme, check_skip(skip)
        self._global: Method | None = None
        self._names: dict[str, Method | None] = {}
        self._types: dict[str, Method | None] = {}

    # ------------------------------------------------------------ configuration

    def set_global(self, method: Method | None) -> PluginQuantizer:
        """The method for every call that no name or type decides; None: float."""
        self._global = None if method is None else check_method(method, "set_global")
        return self

    def set_module_name(self, name: str, method: Method | None) -> PluginQuantizer:
        """The method for a module and all below it, or for one site (`layer1.0.add.0`, `input.0`); None: float.

        A layer that a ReLU or batch norm follows is one pattern with it: its own name decides about the layer, the
        name of the last module about the quantizer behind.
        """
        if not isinstance(name, str):
            raise InvalidArgument(f"set_module_name({name!r}): give the qualified name of a module or site.")
        self._names[name] = None if method is None else check_method(method, f"set_module_name({name!r})")
        return self

    def set_module_type(self, kind: type[nn.Module], method: Method | None) -> PluginQuantizer:
        """The method for all modules of a class and what is called inside them; None: float."""
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise InvalidArgument(f"set_module_type({kind!r}): give a class of modules, such as torch.nn.Conv2d.")
        key = f"{kind.__module__}.{kind.__qualname__}"
        self._types[key] = None if method is None else check_method(method, f"set_module_type({kind.__name__})")
        return self

    # ------------------------------------------------------------ what torchao calls

    def annotate(self, model: GraphModule) -> GraphModule:
        """Annotate the graph; called by torchao's prepare.

        Raises:
            InvalidArgument: a name given to `skip` or set_module_name is nowhere in the model.
            UnsupportedCombination: a batch norm was exported in training mode, or torchao quantizes no such weight.
        """
        require_float(model, "PluginQuantizer")
        if TRAINED_NORM in model.meta:
            raise UnsupportedCombination(
                f"'{model.meta[TRAINED_NORM]}' is a batch norm in training mode, and prepare_pt2e folds it as if it "
                "were not. Call .eval() on the model before it is exported, or train it with prepare_qat_pt2e."
            )
        graph = describe(model.graph)
        skipped = self._check_names(graph.operations)
        taken = {op for op, unit in graph.units.items() if any(ANNOTATION in node.meta for node in unit.nodes)}
        placement = place(graph, lambda op: None if op in taken else self._method(op, skipped), self._names)
        if placement.unmatched:
            raise _unknown(placement.unmatched[0], graph.operations)
        for pattern in placement.patterns:
            self._annotate_pattern(pattern, graph)
        _annotate_activations(model, placement, graph)
        types = {kind for op in graph.operations for kind in op.types}
        placement.idle += [(kind, "the model has no module of that type") for kind in self._types if kind not in types]
        summary = placement.summary()
        model.meta[PLACEMENT] = summary
        asked = any(m is not None for m in (self._global, *self._names.values(), *self._types.values()))
        warn_idle(summary, asked=asked, advice=_ADVICE)
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing to check: names were checked while annotating."""

    # ------------------------------------------------------------ which method

    def _method(self, operation: Operation, skipped: list[str]) -> Method | None:
        path = operation.path
        if operation.how in ("input", "parameter", "output") or within(path, skipped):
            return None
        named = [name for name in self._names if within(path, (name,))]
        if named:
            return self._names[max(named, key=len)]
        for kind in operation.types:
            if kind in self._types:
                return self._types[kind]
        return self._global

    def _check_names(self, operations: list[Operation]) -> list[str]:
        layers = [op.path for op in operations if op.how == "module" and _has_weight(op)]
        return resolve_skip(self.skip, layers, [op.path for op in operations])

    # ------------------------------------------------------------ annotations

    def _annotate_pattern(self, pattern: Pattern, graph: Described) -> None:
        for operation in pattern.operations:
            for node in graph.units[operation].nodes:
                _annotation(node)
        if not pattern.root.name.startswith(("conv", "linear")):
            return
        axis = 1 if "transpose" in pattern.root.name else 0
        spec = weight_spec(self.weight_bits, self.weight_scheme, axis)
        for node in graph.units[pattern.root].nodes:
            if _is_layer(node):
                _check_weight(spec, node.args[1], pattern.root.path)
                # torchao's QAT rewrite takes the first two entries for input and weight (0.18)
                entries = _annotation(node).input_qspec_map
                entries.setdefault(node.args[0], None)
                entries[node.args[1]] = spec


def _has_weight(operation: Operation) -> bool:
    return operation.name.startswith(("conv", "linear", "embedding"))


def _unknown(name: str, operations: list[Operation]) -> InvalidArgument:
    paths = sorted({op.path for op in operations if op.how == "module"})
    return InvalidArgument(
        f"set_module_name({name!r}): no module or site of the model; modules are {', '.join(paths[:8])}, ..."
    )


def _check_weight(spec: Any, weight: Any, path: str) -> None:
    if spec is not None and getattr(weight.meta.get("val"), "dtype", None) == torch.float64:
        raise UnsupportedCombination(
            f"{path}: torchao quantizes weights of float32, float16 and bfloat16, and this one is float64. Convert the "
            "model with .float() before it is exported, or leave weights float with weight_bits=None."
        )


def _is_layer(node: Node) -> bool:
    return str(node.target).startswith(("aten.conv", "aten.linear"))


def _annotation(node: Node) -> Any:
    # implicit sharing would merge observers by dtype; ours say explicitly what they share
    return node.meta.setdefault(ANNOTATION, annotation_class()(allow_implicit_sharing=False, _annotated=True))


def _annotate_activations(model: GraphModule, placement: Placement, graph: Described) -> None:
    """Write one QuantizationSpec per quantizer, and SharedQuantizationSpecs where it is called again."""
    position = {node: index for index, node in enumerate(model.graph.nodes)}
    index = {site: k for k, site in enumerate(placement.sites)}
    groups: dict[Group, list[Site]] = {}
    for site in placement.sites:
        groups.setdefault(site.group, []).append(site)
    for sites in groups.values():
        calls: list[tuple[int, int, Node, Node | None]] = []  # (where, input before output, value, reader)
        for site in sites:
            reading = graph.reading(site)
            if reading is None:
                calls.append((position[site.value.key], 1, site.value.key, None))
            calls.extend((position[node], 0, site.value.key, node) for node in dict.fromkeys(reading or ()))
        # torchao makes the observer where it meets the group first, a node's inputs before its output
        calls.sort(key=lambda call: call[:2])
        spec, (_, _, value, reader) = _spec(model, sites[0], index[sites[0]], graph), calls[0]
        for k, call in enumerate(calls):
            shared = Shared(value if reader is None else (value, reader)) if k else spec
            if call[3] is None:
                _annotation(call[2]).output_qspec = shared
            else:
                _annotation(call[3]).input_qspec_map[call[2]] = shared


def _spec(model: GraphModule, site: Site, index: int, graph: Described) -> Any:
    """The spec of a quantizer, named after the site that executes first."""
    consumer = None
    if site.method.needs_next_layer:
        reading = graph.reading(site)
        layer = next_linear(site.value.key.users if reading is None else reading, model)
        if layer is None:
            logger.warning("'%s' feeds no linear layer: its noise is searched on the activation", site.name)
        else:
            consumer = geometry(layer, model)
    constructor = PT2EObserver.with_args(
        method=site.method, name=site.name, index=index, producer_axis=site.channel_axis, consumer=consumer
    )
    # no qscheme: no other Quantizer's spec equals it, so torchao never merges our observers with theirs
    return Placed(torch.uint8, constructor, 0, 255, None)
