"""Predictions as edges of a torch.fx graph: FX and PT2E.

In the converted graph every site has one node that takes its features, every predicted quantizer a regression and a
second argument, and, where a later one reads it, a summary.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import GraphModule, Node

from dqa_plugins.quantizer import ActivationQuantizer

from .connect import connect
from .features import SiteFeatures
from .session import INPUT


def prepare_graph(model: GraphModule, quantizers: Sequence[ActivationQuantizer]) -> None:
    """Connect the predicted quantizers of a prepared graph, in place; nothing if there are none.

    Args:
        quantizers: all of the model, named, in order of execution.
    """
    forwards = connect(quantizers, inputs=sum(node.op == "placeholder" for node in model.graph.nodes))
    if forwards is not None:
        forwards.attach(model)


def wire(model: GraphModule, node: Node, quantizer: ActivationQuantizer) -> None:
    """Give the call of a frozen quantizer its prediction; nothing if it takes none.

    At a site of the extended mode that is its own statistic.

    Args:
        model: being converted; calls before this one are converted already.
        node: calls the quantizer on a tensor.
        quantizer: frozen.
    """
    quantizer.listener = None  # from here on features travel along edges
    predictor = quantizer.predictor
    if predictor is None:
        return
    target = str(node.target)
    first = _first_call(model, target)
    if first is not None and first is not node:  # a shared quantizer predicts once
        node.args = (node.args[0], first.args[1])
        return
    graph = model.graph
    if predictor.reads_itself(quantizer.name):
        with graph.inserting_before(node):
            prediction = graph.call_module(f"{target}.predictor.own", (node.args[0],))
        node.args = (node.args[0], prediction)
        return
    features = _features(model, node, predictor.site or quantizer.name, predictor.mode)
    summaries = [_summary(model, name) for name in predictor.history]
    with graph.inserting_before(node):
        prediction = graph.call_module(f"{target}.predictor", (features, *summaries))
    node.args = (node.args[0], prediction)


def _first_call(model: GraphModule, target: str) -> Node | None:
    """The first node that calls a module; by FX's table, a scan for each site would be quadratic."""
    return next(iter(model.graph.find_nodes(op="call_module", target=target)), None)


def _calls(model: GraphModule, name: str) -> Node:
    """The first call of the quantizer of that name, converted or not."""
    target = f"quantizer_{name.replace('.', '_')}"  # as `host.convert` calls those that are converted
    while (module := getattr(model, target, None)) is not None:
        if isinstance(module, ActivationQuantizer) and module.name == name:
            found = _first_call(model, target)
            if found is not None:
                return found
        target += "_"
    for node in model.graph.nodes:
        if node.op == "call_module":
            module = model.get_submodule(str(node.target))
            module = getattr(module, "quantizer", module)
            if isinstance(module, ActivationQuantizer) and module.name == name:
                return node
    raise KeyError(name)


def _features(model: GraphModule, node: Node, site: str, mode: str) -> Node:
    graph = model.graph
    target = f"predictor_{site.replace('.', '_')}" + ("" if mode == "extended" else f"_{mode}")
    while (module := getattr(model, target, None)) is not None:
        known = _first_call(model, target)
        # by what it is of: 'a.b_c' and 'a_b.c' would give one name
        if isinstance(module, SiteFeatures) and (module.site, module.mode) == (site, mode) and known is not None:
            return known
        target += "_"
    try:
        tap = _calls(model, site)
        source = tap.args[0]
        where = graph.inserting_before(tap)
    except KeyError:
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        source = placeholders[int(site.removeprefix(INPUT + "."))]
        where = graph.inserting_after(placeholders[-1])
    model.add_submodule(target, SiteFeatures(mode, site))
    with where:
        return graph.call_module(target, (source,))


def _summary(model: GraphModule, name: str) -> Node:
    quantized = _calls(model, name)
    target = f"{quantized.target}.predictor.summary"
    known = _first_call(model, target)
    if known is not None:
        return known
    with model.graph.inserting_after(quantized):
        return model.graph.call_module(target, quantized.args)
