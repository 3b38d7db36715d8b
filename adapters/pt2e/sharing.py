"""Whose observer an annotation asks for: ours stay ours beside other Quantizers."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from .host import ANNOTATION, QuantizationSpec, SharedQuantizationSpec


class Placed(QuantizationSpec):
    """The spec of one of our quantizers."""


class Shared(SharedQuantizationSpec):
    """A spec by which sites of ours share a quantizer."""


def separate(model: GraphModule) -> None:
    """Take our observers away from the operations that other Quantizers let share them; these need none of their own.

    XNNPACKQuantizer gives an operation that moves values the observer of what it reads (torchao 0.18): behind a permute
    ours would see channels on another axis.
    """
    annotations = [node.meta[ANNOTATION] for node in model.graph.nodes if ANNOTATION in node.meta]
    entries = [(a, read) for a in annotations for read, spec in a.input_qspec_map.items() if _borrowed(spec)]
    outputs = [a for a in annotations if _borrowed(a.output_qspec)]
    for annotation, read in entries:
        annotation.input_qspec_map[read] = None
    for annotation in outputs:
        annotation.output_qspec = None


def _borrowed(spec: Any) -> bool:
    """Whether another Quantizer's sharing leads to one of our quantizers."""
    if not isinstance(spec, SharedQuantizationSpec) or isinstance(spec, Shared):
        return False
    seen: list[Any] = []
    while isinstance(spec, SharedQuantizationSpec) and spec not in seen:
        seen.append(spec)
        shared = spec.edge_or_node
        annotation = (shared if isinstance(shared, Node) else shared[1]).meta.get(ANNOTATION)
        if annotation is None:
            return False
        spec = annotation.output_qspec if isinstance(shared, Node) else annotation.input_qspec_map.get(shared[0])
    return isinstance(spec, Placed)
