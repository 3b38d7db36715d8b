"""A method in torchao's own configuration: a Quantizer."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from dqa_plugins.errors import DQAWarning, InvalidMethod
from dqa_plugins.methods import Method, check_method

from .consumers import find_consumer, geometry
from .host import (
    ANNOTATION,
    MovingAveragePerChannelMinMaxObserver,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)
from .naming import Unit, named_units, producer_axis
from .observer import PT2EObserver, PT2EWeight, WeightRange
from .place import WEIGHTED, Call, Group, Pattern, place

logger = logging.getLogger(__name__)

WEIGHT_SCHEMES = ("channel", "qpp")
_LAYERS = frozenset("Linear Embedding Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d".split())


def weight_spec(weight_bits: int | None, weight_scheme: str, channel_axis: int = 0) -> Any:
    """torchao's QuantizationSpec of a weight.

    Args:
        weight_bits: 2 to 8; None leaves weights float.
        weight_scheme: "channel": symmetric, one scale per output channel, codes in +-(2^(b-1) - 1); "qpp": eq. 16 of
            the QPP paper, asymmetric, one scale per tensor.
        channel_axis: of the output channels in the weight.

    Raises:
        InvalidMethod: other values.
    """
    if weight_scheme not in WEIGHT_SCHEMES:
        raise InvalidMethod(f"weight_scheme={weight_scheme!r}: one of {', '.join(map(repr, WEIGHT_SCHEMES))}.")
    if weight_bits is None:
        return None
    if not isinstance(weight_bits, int) or isinstance(weight_bits, bool) or not 2 <= weight_bits <= 8:
        raise InvalidMethod(
            f"weight_bits={weight_bits!r}: an integer from 2 to 8 (convert_pt2e folds weights to int8), or None for "
            "float."
        )
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
        skip: "first", "last" (the first and last layer with a weight), or names of modules to leave float.

    Raises:
        InvalidMethod, NotAMethod; an unknown name when the model is prepared.
    """

    def __init__(self, weight_bits: int | None = 8, weight_scheme: str = "channel", skip: Iterable[str] = ()) -> None:
        super().__init__()
        if isinstance(skip, str):
            raise InvalidMethod(f"skip={skip!r}: give a tuple of names, such as ({skip!r},).")
        weight_spec(weight_bits, weight_scheme)
        self.weight_bits, self.weight_scheme, self.skip = weight_bits, weight_scheme, tuple(skip)
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
            raise InvalidMethod(f"set_module_name({name!r}): give the qualified name of a module or site.")
        self._names[name] = None if method is None else check_method(method, f"set_module_name({name!r})")
        return self

    def set_module_type(self, kind: type[nn.Module], method: Method | None) -> PluginQuantizer:
        """The method for all modules of a class and what is called inside them; None: float."""
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise InvalidMethod(f"set_module_type({kind!r}): give a class of modules, such as torch.nn.Conv2d.")
        key = f"{kind.__module__}.{kind.__qualname__}"
        self._types[key] = None if method is None else check_method(method, f"set_module_type({kind.__name__})")
        return self

    # ------------------------------------------------------------ what torchao calls

    def annotate(self, model: GraphModule) -> GraphModule:
        """Annotate the graph; called by torchao's prepare.

        Raises:
            InvalidMethod: a name given to `skip` or set_module_name is nowhere in the model.
        """
        calls = named_units(model.graph)
        skipped = self._check_names(calls)
        taken = {unit.output for unit in calls if any(ANNOTATION in node.meta for node in unit.nodes)}
        patterns, placed = place(
            model.graph,
            lambda unit: None if unit.output in taken else self._method(unit, skipped),
            self._override,
        )
        for pattern in patterns:
            self._annotate_pattern(pattern)
        _annotate_activations(model, placed, {node: unit for unit in calls for node in unit.nodes})
        if not placed and any(m is not None for m in (self._global, *self._names.values(), *self._types.values())):
            warnings.warn(
                DQAWarning(
                    "PluginQuantizer placed no quantizer: no call of the graph has a method, or another Quantizer "
                    "took them all. Prepare the .module() of a torch.export.export'ed model, check the names, types "
                    "and skip, and put this Quantizer before others."
                ),
                stacklevel=2,
            )
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing to check: names were checked while annotating."""

    # ------------------------------------------------------------ which method

    def _method(self, unit: Unit, skipped: frozenset[str]) -> Method | None:
        if any(unit.path == name or unit.path.startswith(name + ".") for name in skipped):
            return None
        named = [name for name in self._names if unit.path == name or unit.path.startswith(name + ".")]
        if named:
            return self._names[max(named, key=len)]
        for kind in unit.types:
            if kind in self._types:
                return self._types[kind]
        return self._global

    def _override(self, unit: Unit) -> tuple[bool, Method | None]:
        name = unit.site
        if name not in self._names and unit.how == "input":
            name = "input"
        if name not in self._names:
            return False, None
        return True, self._names[name]

    def _check_names(self, calls: list[Unit]) -> frozenset[str]:
        layers = [unit.path for unit in calls if unit.how == "module" and unit.op in _LAYERS]
        sites = {unit.site for unit in calls} | {"input"}
        paths = {unit.path for unit in calls}

        def known(name: str) -> bool:
            return any(path == name or path.startswith(name + ".") for path in paths)

        for name in self._names:
            if name not in sites and not known(name):
                raise InvalidMethod(
                    f"set_module_name({name!r}): no module or site of the model; modules are "
                    f"{', '.join(sorted(paths - {''})[:8])}, ..."
                )
        skipped = set()
        for item in self.skip:
            if item in ("first", "last"):
                skipped.update(layers[:1] if item == "first" else layers[-1:])
            elif known(item):
                skipped.add(item)
            else:
                raise InvalidMethod(
                    f"skip={item!r}: the model has no such module; layers are {', '.join(layers[:8])}, ..."
                )
        return frozenset(skipped)

    # ------------------------------------------------------------ annotations

    def _annotate_pattern(self, pattern: Pattern) -> None:
        for unit in pattern.units:
            for node in unit.nodes:
                _annotation(node)
        if pattern.root.op not in WEIGHTED:
            return
        axis = 1 if "ranspose" in pattern.root.op else 0
        spec = weight_spec(self.weight_bits, self.weight_scheme, axis)
        for node in pattern.root.nodes:
            if _is_layer(node):
                # torchao's QAT rewrite takes the first two entries for input and weight (0.18)
                entries = _annotation(node).input_qspec_map
                entries.setdefault(node.args[0], None)
                entries[node.args[1]] = spec


def _is_layer(node: Node) -> bool:
    return str(node.target).startswith(("aten.conv", "aten.linear"))


def _annotation(node: Node) -> Any:
    # implicit sharing would merge observers by dtype; ours say explicitly what they share
    empty = QuantizationAnnotation(allow_implicit_sharing=False, _annotated=True)
    # X86InductorQuantizer reads this of every annotated node, though only its own annotations have it (torchao 0.18)
    empty._is_output_of_quantized_pattern = False
    return node.meta.setdefault(ANNOTATION, empty)


def _annotate_activations(model: GraphModule, placed: list[Call], producer: dict[Node, Unit]) -> None:
    """Write one QuantizationSpec per quantizer, and SharedQuantizationSpecs where it is called again."""
    position = {node: index for index, node in enumerate(model.graph.nodes)}
    groups: dict[Group, list[Call]] = {}
    for call in placed:
        groups.setdefault(call.group, []).append(call)
    for group, calls in groups.items():
        places: list[tuple[int, int, Call, Node | None]] = []
        for call in calls:
            if call.edges is None:
                places.append((position[call.value], 1, call, None))
            places.extend((position[node], 0, call, node) for node in dict.fromkeys(call.edges or ()))
        # torchao makes the observer where it meets the group first, a node's inputs before its output
        places.sort(key=lambda entry: entry[:2])
        first = _edge_or_node(places[0][2], places[0][3])
        for place_index, (_, _, call, reader) in enumerate(places):
            spec = (
                SharedQuantizationSpec(first) if place_index else _spec(model, group.method, calls[0], placed, producer)
            )
            if reader is None:
                _annotation(call.value).output_qspec = spec
            else:
                _annotation(reader).input_qspec_map[call.value] = spec


def _edge_or_node(call: Call, reader: Node | None) -> Any:
    return call.value if reader is None else (call.value, reader)


def _spec(model: GraphModule, method: Method, call: Call, placed: list[Call], producer: dict[Node, Unit]) -> Any:
    """The spec of a quantizer, named after the call that executes first."""
    consumer = None
    if method.needs_next_layer:
        layer = find_consumer(call.value.users if call.edges is None else call.edges, model)
        if layer is None:
            logger.warning("'%s' feeds no linear layer: its noise is searched on the activation", call.site)
        else:
            consumer = geometry(layer)
    constructor = PT2EObserver.with_args(
        method=method,
        name=call.site,
        index=placed.index(call),
        producer_axis=producer_axis(call.unit, producer),
        consumer=consumer,
    )
    # no qscheme: no other Quantizer's spec equals it, so torchao never merges our observers with theirs
    return QuantizationSpec(torch.uint8, constructor, 0, 255, None)
