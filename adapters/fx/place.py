"""Between FX's prepared graph and the judge of placement.

FX decides where observers go by rules for int8, and which layers are quantized by its QConfigMapping. Of ours the
second stays: this pass takes our observers out of the prepared graph, asks the judge (`host.placement`) with the
methods that FX found for each node, and puts observers where it says. Observers of torch.ao are left alone.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.ao.nn import quantizable
from torch.ao.quantization import FakeQuantizeBase, ObserverBase, QConfigMapping
from torch.fx import GraphModule, Node

from dqa_plugins.errors import UnsupportedCombination
from dqa_plugins.graph.aliases import dropped_writes
from dqa_plugins.graph.fx import TensorFacts, describe, follow_in_place
from dqa_plugins.graph.names import require_unique
from dqa_plugins.graph.operations import Operation
from dqa_plugins.graph.record import record_shapes
from dqa_plugins.host.convert import link_reader
from dqa_plugins.host.placement import Group, Placement, Site, judge
from dqa_plugins.host.quantize import require_float
from dqa_plugins.host.settings import warn_idle
from dqa_plugins.host.sites import Summary, keep_summary, summaries
from dqa_plugins.host.skip import resolve_skip
from dqa_plugins.method import Method
from dqa_plugins.qpp.edges import prepare_graph
from dqa_plugins.sites import iter_quantizers

from .config import SKIP, PluginQConfigMapping
from .names import Seen, site_name
from .observer import FXObserver

logger = logging.getLogger(__name__)


def observer_of(node: Any, model: GraphModule) -> FXObserver | None:
    """The FXObserver that a node calls, if it is one."""
    if isinstance(node, Node) and node.op == "call_module":
        module = model.get_submodule(str(node.target))
        if isinstance(module, FXObserver):
            return module
    return None


def observer_nodes(model: GraphModule) -> Iterator[tuple[Node, FXObserver]]:
    """Nodes which call one of our observers, in order of execution."""
    for node in list(model.graph.nodes):
        observer = observer_of(node, model)
        if observer is not None:
            yield node, observer


def place(model: GraphModule, mapping: Any, example_inputs: Any, seen: Seen, *, qat: bool) -> None:
    """Put the observers of a model which FX just prepared where the judge says. Changes the model in place.

    Args:
        model: what FX's `prepare` returned.
        mapping: the user's QConfigMapping.
        example_inputs: the user's, for shapes.
        seen: what the model calls, for settings that match nothing.
        qat: True from prepare_qat_fx.

    Raises:
        DuplicateSites: two sites have one name.
    """
    asked = _Asked(model, mapping)
    if asked.anything:
        require_float(model, "prepare_fx")
        _take_out(model)
        follow_in_place(model)
        placement = find_sites(model, asked, example_inputs)
        placement.idle += asked.unmatched(seen)
        _put_in(model, placement, asked, qat=qat)
        summary = placement.summary()
        keep_summary(summary, model, [observer.quantizer for _, observer in observer_nodes(model)])
        warn_idle(summary)
    elif isinstance(mapping, PluginQConfigMapping) and not any(asked.qconfigs.values()):
        warn_idle(Summary(), asked=False)
    number(model)
    prepare_graph(model, [quantizer for _, quantizer in iter_quantizers(model)])


def find_sites(model: GraphModule, asked: _Asked, example_inputs: Any) -> Placement:
    """Ask the judge about a prepared model without our observers."""
    custom = model.meta["_observed_graph_module_attrs"].prepare_custom_config
    inputs = [node for node in model.graph.nodes if node.op == "placeholder"]
    done = {inputs[k] for k in custom.input_quantized_indexes if k < len(inputs)}
    operations = describe(
        model,
        _shapes(model, example_inputs),
        site_of=site_name,
        quantized=lambda node: node in done or _is_stock_observer(node, model),
    )
    dropped = [op for op in dropped_writes(operations) if op.op not in ("setitem", "__setitem__")]
    if dropped:
        raise UnsupportedCombination(
            f"'{dropped[0].site}' ({dropped[0].op}) writes in place through a view, and the tensor behind the view is "
            "read again; torch.fx takes such a write for dead code and drops it in silence. Write the model without "
            "it (y = y + 1 for y.view(...).add_(1)), or quantize it with PT2E."
        )
    placement = judge(operations, asked.method_of, overrides=asked.by_name)
    _refuse_integers(model, placement, custom)
    return placement


def _refuse_integers(model: GraphModule, placement: Placement, custom: Any) -> None:
    """Refuse what FX does with integer tensors only: ours are float tensors that hold quantized values.

    Raises:
        UnsupportedCombination: a quantized output, a static LSTM or attention with our QConfig.
    """
    ours = {site.value.key for site in placement.sites}
    output: Any = next(iter(reversed(model.graph.nodes)))
    given = output.args[0] if isinstance(output.args[0], tuple | list) else (output.args[0],)
    for index in custom.output_quantized_indexes:
        if index < len(given) and given[index] in ours:
            raise UnsupportedCombination(
                f"set_output_quantized_indexes([{index}]): our quantizers give float tensors, so this output would be "
                "float too. Leave the index out, or give the last layer a QConfig of torch.ao."
            )
    for path, module in model.named_modules():
        if type(module) in (quantizable.LSTM, quantizable.MultiheadAttention):
            if any(isinstance(part, FXObserver) for part in module.modules()):
                raise UnsupportedCombination(
                    f"'{path}': FX converts {type(module).__name__} of torch.ao.nn.quantizable to int8 arithmetic, "
                    "which only torch.ao's own observers serve. Leave it out of set_float_to_observed_mapping: what "
                    "it reads and gives is quantized then, and its inside stays float."
                )


class _Asked:
    """What a QConfigMapping says about the nodes of a prepared model.

    Args:
        model: prepared by FX, which found the QConfig of each node.
        mapping: the user's.
    """

    def __init__(self, model: GraphModule, mapping: QConfigMapping) -> None:
        self.mapping = mapping
        self.known: dict[int, tuple[Any, Method | None]] = {}
        self.qconfigs = model.meta["_observed_graph_module_attrs"].node_name_to_qconfig
        # a QConfig of ours and none say what happens to a site; torch.ao's own do not
        names = {name: q for name, q in mapping.module_name_qconfigs.items() if not name.startswith(SKIP)}
        named = {name: (q is None, self._method(q)) for name, q in names.items()}
        self.by_name = {name: method for name, (none, method) in named.items() if none or method is not None}

    @property
    def anything(self) -> bool:
        """True if a method of ours is set anywhere."""
        methods = (*map(self._method, self.qconfigs.values()), *self.by_name.values())
        return any(method is not None for method in methods)

    def method_of(self, operation: Operation) -> Method | None:
        """The method that FX found for an operation's node."""
        return self.of_node(operation.outputs[0].key) if operation.outputs else None

    def of_node(self, node: Node) -> Method | None:
        """The method that FX found for a node."""
        return self._method(self.qconfigs.get(node.name))

    def unmatched(self, seen: Seen) -> list[tuple[str, str]]:
        """(setting, reason) of types and patterns that match nothing; those of torch.ao's own QConfigs are not said."""
        everywhere, found = self._method(self.mapping.global_qconfig), []
        for kind, qconfig in self.mapping.object_type_qconfigs.items():
            same = qconfig is not None and self._method(qconfig) == everywhere  # other weights at most
            if kind not in seen.types and not same and self._concerns_us(qconfig):
                found.append((getattr(kind, "__name__", str(kind)), "the model calls none of that type"))
        for pattern, qconfig in self.mapping.module_name_regex_qconfigs.items():
            if not any(re.match(pattern, path) for path in seen.paths) and self._concerns_us(qconfig):
                found.append((pattern, "a pattern that no module's name matches"))
        return found

    def _concerns_us(self, qconfig: Any) -> bool:
        return qconfig is None or self._method(qconfig) is not None

    def _method(self, qconfig: Any) -> Method | None:
        if qconfig is None:
            return None
        if id(qconfig.activation) not in self.known:
            observer = qconfig.activation()
            method = observer.quantizer.method if isinstance(observer, FXObserver) else None
            self.known[id(qconfig.activation)] = (qconfig.activation, method)  # held: ids are reused
        return self.known[id(qconfig.activation)][1]


def _is_stock_observer(node: Node, model: GraphModule) -> bool:
    if node.op != "call_module":
        return False
    return isinstance(model.get_submodule(str(node.target)), ObserverBase | FakeQuantizeBase)


def _take_out(model: GraphModule) -> None:
    for node, _ in observer_nodes(model):
        node.replace_all_uses_with(node.all_input_nodes[0])
        model.graph.erase_node(node)
    # torch.fx's own clean-up keeps modules that have a second name
    for name, module in list(model._modules.items()):
        if isinstance(module, FXObserver):
            delattr(model, name)
    model.recompile()


def _put_in(model: GraphModule, placement: Placement, asked: _Asked, *, qat: bool) -> None:
    observers: dict[Group, str] = {}
    start = [node for node in model.graph.nodes if node.op == "placeholder"][-1]
    for site in placement.sites:
        if site.group not in observers:
            name = f"observer_{len(observers)}"
            while hasattr(model, name):
                name += "_"
            model.add_submodule(name, _observer(site))
            observers[site.group] = name
        called = _call(model, site, observers[site.group], start)
        start = called if site.value.key.op == "placeholder" else start
    model.graph.lint()
    model.recompile()
    for node, observer in observer_nodes(model):
        neighbours = [*node.all_input_nodes, *node.users]
        observer.by_name |= not any(asked.qconfigs.get(n.name) for n in neighbours)
        link_reader(observer.quantizer, model, node)
        if qat and observer.quantizer.state == "observe":
            observer.quantizer.start_qat()


def _observer(site: Site) -> FXObserver:
    """Named after the site that executes first; the others of its group share it."""
    observer = FXObserver(site.method)
    observer.quantizer.name, observer.quantizer.producer_axis = site.name, site.channel_axis
    return observer


def _call(model: GraphModule, site: Site, observer: str, start: Node) -> Node:
    """Call an observer on a site's tensor; behind all inputs, `start`, if that is one."""
    node: Node = site.value.key
    users = list(node.users)
    if site.readers is not None:
        reading = {reader.outputs[0].key if reader.outputs else None for reader in site.readers}
        users = [user for user in users if user in reading]
    with model.graph.inserting_after(start if node.op == "placeholder" else node):
        called = model.graph.call_module(observer, (node,))
    for user in users:
        user.replace_input_with(node, called)
    return called


def number(model: GraphModule) -> None:
    """Give the quantizers of a prepared model their place in the order of execution, those of standalone modules too.

    FX prepares standalone modules by themselves: their sites are named relative to themselves until now.

    Raises:
        DuplicateSites: two sites have one name.
    """
    seen: dict[int, None] = {}
    quantizers = []
    for node in model.graph.nodes:
        if node.op != "call_module":
            continue
        module = model.get_submodule(str(node.target))
        if id(module) in seen:
            continue
        seen[id(module)] = None
        if isinstance(module, FXObserver):
            quantizers.append(module.quantizer)
        elif isinstance(module, GraphModule) and node.target:
            inner = [quantizer for _, quantizer in iter_quantizers(module)]
            for quantizer in inner:
                quantizer.name = f"{node.target}.{quantizer.name}"
            for summary in list(summaries(module)):
                keep_summary(summary.inside(str(node.target)), module, inner)
            quantizers += inner
    for index, quantizer in enumerate(quantizers):
        quantizer.index = index
    require_unique([quantizer.name for quantizer in quantizers])


def _shapes(model: GraphModule, example_inputs: Any) -> dict[Node, TensorFacts] | None:
    if not example_inputs and any(node.op == "placeholder" for node in model.graph.nodes):
        return None  # a standalone module is prepared without (torch 2.13)
    try:
        return record_shapes(model, example_inputs)
    except Exception as error:
        logger.warning(
            "shapes could not be traced with the example inputs given to prepare_fx (%s: %s); channels and integer "
            "tensors are not known, and concatenations share one observer",
            type(error).__name__,
            error,
        )
        return None


def layers_to_skip(model: GraphModule, skip: tuple[str, ...]) -> list[str]:
    """Module names of "first", "last" and plain names, in a fused model.

    Raises:
        InvalidArgument: a name is no module of the model.
    """
    layers = [
        str(node.target)
        for node in model.graph.nodes
        if node.op == "call_module" and _has_weight(model.get_submodule(str(node.target)))
    ]
    return resolve_skip(skip, layers, [name for name, _ in model.named_modules()])


def _has_weight(module: nn.Module) -> bool:
    if isinstance(module, nn.Sequential):  # FX's fused modules
        return any(_has_weight(child) for child in module)
    kinds = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)
    return isinstance(module, kinds)
