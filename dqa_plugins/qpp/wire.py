"""Predictions as edges of a torch.fx graph: FX and PT2E.

In the prepared graph one node without users starts each forward. In the converted graph every site has one predictor
node (its features), every predicted quantizer a regression and a second argument, and, where a later one reads it, a
note.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from dqa_plugins.quantizer import ActivationQuantizer

from .augment import run_augmented
from .bus import INPUT, Bus, connect
from .features import SiteFeatures

START = "qpp_start"


class Start(nn.Module):
    """Starts the forwards of a prepared graph.

    Args:
        bus: of the model.
    """

    def __init__(self, bus: Bus) -> None:
        super().__init__()
        self.bus = bus

    def forward(self, *inputs: Any) -> None:
        """Take the inputs of the model."""
        self.bus.begin(inputs)


def prepare_graph(model: GraphModule, quantizers: Sequence[ActivationQuantizer]) -> None:
    """Connect the predicted quantizers of a prepared graph, in place; nothing if there are none.

    Args:
        quantizers: all of the model, named, in order of execution.
    """
    inputs = [node for node in model.graph.nodes if node.op == "placeholder"]
    bus = connect(quantizers, inputs=len(inputs))
    if bus is None:
        return
    model.add_submodule(START, Start(bus))
    with model.graph.inserting_after(inputs[-1]):
        model.graph.call_module(START, tuple(inputs))
    model.graph.lint()
    model.recompile()
    run_augmented(bus, model)


def drop_start(model: GraphModule) -> None:
    """Remove the node that starts calibration forwards, if it is still there."""
    for node in [n for n in model.graph.nodes if n.op == "call_module" and n.target == START]:
        model.graph.erase_node(node)
    if hasattr(model, START):
        delattr(model, START)


def wire(model: GraphModule, node: Node, quantizer: ActivationQuantizer) -> None:
    """Give the call of a frozen quantizer its prediction; nothing if it takes none.

    At a site of the extended mode that is its own statistic.

    Args:
        model: being converted; calls before this one are converted already.
        node: calls the quantizer on a tensor.
        quantizer: frozen.
    """
    drop_start(model)
    quantizer.tap = None  # from here on features travel along edges
    predictor = quantizer.predictor
    if predictor is None:
        return
    target = str(node.target)
    first = next(n for n in model.graph.nodes if n.op == "call_module" and n.target == target)
    if first is not node:  # a shared quantizer predicts once
        node.args = (node.args[0], first.args[1])
        return
    graph = model.graph
    if predictor.reads_itself(quantizer):
        with graph.inserting_before(node):
            prediction = graph.call_module(f"{target}.predictor.own", (node.args[0],))
        node.args = (node.args[0], prediction)
        return
    features = _features(model, node, predictor.site or quantizer.name, predictor.mode)
    notes = [_note(model, name) for name in predictor.history]
    with graph.inserting_before(node):
        prediction = graph.call_module(f"{target}.predictor", (features, *notes))
    node.args = (node.args[0], prediction)


def _calls(model: GraphModule, name: str) -> Node:
    """The first call of the quantizer of that name, converted or not."""
    for node in model.graph.nodes:
        if node.op == "call_module":
            module = model.get_submodule(str(node.target))
            module = getattr(module, "quantizer", module)
            if isinstance(module, ActivationQuantizer) and module.name == name:
                return node
    raise KeyError(name)


def _features(model: GraphModule, node: Node, site: str, mode: str) -> Node:
    target = f"predictor_{site.replace('.', '_')}" + ("" if mode == "extended" else f"_{mode}")
    graph = model.graph
    known = next((n for n in graph.nodes if n.op == "call_module" and n.target == target), None)
    if known is not None:
        return known
    try:
        tap = _calls(model, site)
        source = tap.args[0]
        where = graph.inserting_before(tap)
    except KeyError:
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        source = placeholders[int(site.removeprefix(INPUT + "."))]
        where = graph.inserting_after(placeholders[-1])
    model.add_submodule(target, SiteFeatures(mode))
    with where:
        return graph.call_module(target, (source,))


def _note(model: GraphModule, name: str) -> Node:
    quantized = _calls(model, name)
    target = f"{quantized.target}.predictor.note"
    for user in model.graph.nodes:
        if user.op == "call_module" and user.target == target:
            return user
    with model.graph.inserting_after(quantized):
        return model.graph.call_module(target, quantized.args)
