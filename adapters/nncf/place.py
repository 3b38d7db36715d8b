"""Which tensors get a quantizer, under which name.

NNCF's quantizer propagation decides the points. This pass turns points into sites, one per tensor: NNCF may hook the
same tensor in front of several of its consumers. Where NNCF wants one scale for several tensors (the inputs of a cat
before a convolution), these share one quantizer; where the method looks at channels, only those tensors share one
that have the same number of channels on the same axis (as in the FX adapter).

Names are those of the FX adapter; where NNCF puts its points elsewhere, the set of sites differs:

- the outputs of the model are float (`quantize_outputs` quantizes them), and so is a tensor that only feeds an
  activation like GELU, which NNCF fuses with the layer before;
- what a mean or an average pool gives to a Linear has its own quantizer; in FX it shares the one before the pool;
- before a cat its inputs are quantized, with one scale, and not its output;
- embeddings and parameters are float, and the first quantizer is behind their sum;
- of attention the softmax is quantized instead of the matmul before it; of SDPA the query and the key.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from nncf.common.graph.graph import NNCFGraph, NNCFNode
from nncf.torch.graph.transformations.commands import PTTargetPoint

from dqa_plugins.methods import Method

from .config import InvalidConfig
from .naming import producer_axis
from .observer import NNCFQuantizer
from .scopes import PATTERN, matcher, unmatched

OVERRIDES = "compression.scope_overrides.activations"


@dataclass
class Tensors:
    """One tensor of the model and the points where NNCF would quantize it."""

    node: NNCFNode
    port: int
    name: str
    points: list[PTTargetPoint] = field(default_factory=list)


@dataclass
class Site:
    """One quantizer and the tensors it quantizes: one, or several which share it."""

    quantizer: NNCFQuantizer
    tensors: list[Tensors]

    @property
    def points(self) -> list[PTTargetPoint]:
        """Every point where the quantizer is called."""
        return [point for tensor in self.tensors for point in tensor.points]


def _producer(point: PTTargetPoint, graph: NNCFGraph) -> tuple[NNCFNode, int]:
    node = graph.get_node_by_name(point.target_node_name)
    if point.input_port_id is None:
        return node, 0
    edge = graph.get_input_edge_by_port_id(node, point.input_port_id)
    return edge.from_node, edge.output_port_id


def find_tensors(points: Iterable[PTTargetPoint], graph: NNCFGraph, sites: dict[int, str]) -> list[Tensors]:
    """The tensors that NNCF's activation points quantize, in order of execution."""
    found: dict[tuple[int, int], Tensors] = {}
    for point in points:
        node, port = _producer(point, graph)
        name = sites.get(node.node_id, node.node_name)
        name = f"{name}.{port}" if port else name  # chunk and the like have several outputs
        found.setdefault((node.node_id, port), Tensors(node, port, name)).points.append(point)
    return [found[key] for key in sorted(found)]


def choose_methods(
    tensors: list[Tensors], method: Method, overrides: Iterable[tuple[str, Method | None]]
) -> list[Method | None]:
    """The method of each tensor, None for float. An exact name goes before a pattern.

    Raises:
        InvalidConfig: an override matches no site, or two patterns disagree about one.
    """
    overrides = list(overrides)
    chosen: list[Method | None] = [method] * len(tensors)
    for exact in (False, True):
        by: dict[int, str] = {}
        for scope, wanted in overrides:
            if exact == scope.startswith(PATTERN):
                continue
            match = matcher(scope, OVERRIDES)
            hits = [i for i, t in enumerate(tensors) if match(t.name) or match(t.node.node_name)]
            if not hits:
                raise unmatched(OVERRIDES, scope, [t.name for t in tensors])
            for i in hits:
                if i in by and chosen[i] != wanted:
                    raise InvalidConfig(
                        f"{OVERRIDES}: {by[i]!r} and {scope!r} both match {tensors[i].name!r} and disagree; name the "
                        "site itself, which goes before patterns."
                    )
                chosen[i], by[i] = wanted, scope
    return chosen


def make_sites(
    tensors: list[Tensors],
    methods: list[Method | None],
    groups: Iterable[Iterable[PTTargetPoint]],
    graph: NNCFGraph,
) -> list[Site]:
    """Quantizers for the tensors, shared within NNCF's unified-scale groups where that makes sense.

    Args:
        tensors: in order of execution.
        methods: of each, None for float.
        groups: of points which NNCF gives one scale.
    """
    group_of = {point: index for index, group in enumerate(groups) for point in group}
    sites: dict[Any, Site] = {}
    for tensor, method in zip(tensors, methods, strict=True):
        if method is None:
            continue
        axis = producer_axis(tensor.node, graph)
        quantizer = NNCFQuantizer(method, name=tensor.name, producer_axis=axis, index=len(sites))
        group = next((group_of[p] for p in tensor.points if p in group_of), None)
        key: Any = (tensor.node.node_id, tensor.port)
        if group is not None and quantizer.predictor is None:  # a prediction is one tensor's own
            key = ("group", group, method, *(_channels(quantizer, tensor, graph) if quantizer.uses_channels else ()))
        if key in sites:
            sites[key].tensors.append(tensor)
        else:
            sites[key] = Site(quantizer, [tensor])
    return list(sites.values())


def _channels(quantizer: NNCFQuantizer, tensor: Tensors, graph: NNCFGraph) -> tuple[int, int | None]:
    """(channel axis, number of channels) of a tensor."""
    shape = graph.get_input_shape_for_insertion_point(tensor.points[0])
    axis = quantizer.channel_axis
    axis = axis + len(shape) if axis < 0 else axis
    return axis, shape[axis] if axis < len(shape) else None
