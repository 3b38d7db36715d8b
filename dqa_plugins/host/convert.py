"""What becomes of an observer in a torch.fx graph when it is converted: the frozen quantizer, as a module."""

from __future__ import annotations

import logging

from torch import Tensor
from torch.fx import GraphModule, Node

from dqa_plugins.graph.names import require_unique
from dqa_plugins.graph.readers import geometry, next_linear, weight_rows
from dqa_plugins.qpp import fit
from dqa_plugins.qpp.edges import wire
from dqa_plugins.quantizer import ActivationQuantizer

logger = logging.getLogger(__name__)


def link_reader(quantizer: ActivationQuantizer, model: GraphModule, node: Node) -> None:
    """Tell a quantizer the geometry of the linear layer that reads it, where its method asks for one.

    Args:
        quantizer: before it has seen data.
        model: of the graph.
        node: calls the quantizer, or makes what it reads.
    """
    if not quantizer.method.needs_next_layer or quantizer.consumer_geometry is not None or quantizer.consumer_missing:
        return
    layer = next_linear(node.users, model)
    if layer is None:
        quantizer.consumer_missing = True
        logger.warning("%s feeds no linear layer: its noise is searched on the activation", quantizer.label)
    else:
        quantizer.consumer_geometry = geometry(layer, model)


def run_switched(quantizer: ActivationQuantizer, x: Tensor, *, observing: bool, quantizing: bool) -> Tensor:
    """A quantizer under a host's switches for observers and for fake quantization.

    Args:
        quantizer: in the state "observe" or "qat".
        x: (B, ...).
        observing: the observer's switch, and in "qat" training mode too.
        quantizing: the switch of fake quantization; calibration does none.
    """
    if quantizer.state == "observe":
        return quantizer(x) if observing else x
    quantizer.training = observing
    if quantizing:
        return quantizer(x)
    if observing:
        quantizer(x)
    return x


def convert_site(quantizer: ActivationQuantizer, model: GraphModule, node: Node) -> None:
    """Freeze a quantizer and call it where its observer was called.

    A quantizer shared by several nodes stays one. The node itself stays, so that its users, its place in the order and
    its metadata do too.

    Raises:
        UncalibratedQuantizer: it saw no data.
        DuplicateSites: another quantizer of the model has its name.
    """
    if quantizer.predictor is not None and not quantizer.predictor.fitted:
        fit(model)
    quantizer.freeze(_reader_weight(quantizer, model, node))
    target = f"quantizer_{quantizer.name.replace('.', '_')}"
    while (other := getattr(model, target, quantizer)) is not quantizer:
        if isinstance(other, ActivationQuantizer):
            require_unique((other.name, quantizer.name), "the converted model")
        target += "_"
    if not hasattr(model, target):
        model.add_submodule(target, quantizer)
    node.target = target
    wire(model, node, quantizer)


def _reader_weight(quantizer: ActivationQuantizer, model: GraphModule, node: Node) -> Tensor | None:
    if not quantizer.method.needs_next_layer or quantizer.consumer_missing:
        return None
    layer = next_linear(node.users, model)
    return None if layer is None else weight_rows(layer, model)
