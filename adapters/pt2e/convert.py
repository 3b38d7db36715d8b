"""What becomes of an observer in convert_pt2e: the frozen quantizer, as a module of the converted graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.fx import GraphModule, Node

from dqa_plugins.qpp import fit
from dqa_plugins.qpp.edges import wire
from dqa_plugins.quantizer import ActivationQuantizer

from .consumers import consumer_weight, find_consumer

if TYPE_CHECKING:
    from .observer import PT2EObserver


def convert_site(observer: PT2EObserver, model: GraphModule, node: Node) -> None:
    """Freeze the quantizer and call it where the observer was called.

    An observer shared by several nodes stays one quantizer. The node itself stays, so that its users, its place in
    the order and its metadata do too.

    Raises:
        UncalibratedQuantizer: the observer saw no data.
    """
    quantizer = observer.quantizer
    if quantizer.predictor is not None and not quantizer.predictor.fitted:
        fit(model)
    quantizer.freeze(_consumer_weight(quantizer, model, node))
    target = f"quantizer_{quantizer.name.replace('.', '_')}"
    while getattr(model, target, quantizer) is not quantizer:
        target += "_"
    if not hasattr(model, target):
        model.add_submodule(target, quantizer)
    node.target = target
    wire(model, node, quantizer)


def _consumer_weight(quantizer: ActivationQuantizer, model: GraphModule, node: Node) -> Tensor | None:
    if not quantizer.method.needs_next_layer or quantizer.consumer_missing:
        return None
    layer = find_consumer(list(node.users), model)
    return None if layer is None else consumer_weight(layer, model)
