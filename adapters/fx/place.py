"""Which tensors of an FX-prepared model get a quantizer, under which name.

FX decides where observers go. This pass corrects, at prepare time, what is right for int8 observers and wrong for
low-bit quantizers:

- an operation that only moves or selects values (flatten, transpose, slice, max-pool) is not quantized again;
- a clamp (ReLU, ReLU6, Hardtanh) behind its own observer quantizes its output, not its input: FX would let both share
  one observer, whose scale and sign are those of the input;
- an observer shared by tensors of different channels (both sides of a cat) becomes one per tensor, where the method
  looks at channels or is predicted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.ao.quantization import QConfigMapping
from torch.fx import GraphModule, Interpreter, Node

from dqa_plugins.consumers import find_consumer, geometry
from dqa_plugins.errors import InvalidMethod
from dqa_plugins.qpp.edges import prepare_graph
from dqa_plugins.sites import CLAMPING, PRESERVING, iter_quantizers

from .naming import operation_name, producer_axis, site_name
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


def place(model: GraphModule, mapping: Any, example_inputs: Any, *, qat: bool) -> None:
    """Correct, name and start the observers of a model which FX just prepared. Changes the model in place.

    Args:
        model: what FX's `prepare` returned.
        mapping: the user's QConfigMapping or dict.
        example_inputs: the user's, for shapes.
        qat: True from prepare_qat_fx.
    """
    if next(observer_nodes(model), None) is None:
        return
    _bypass_preserving(model)
    _move_behind_clamps(model)
    _override_by_site(model, mapping)
    _separate_channels(model, example_inputs)
    for index, (node, observer) in enumerate(observer_nodes(model)):
        quantizer = observer.quantizer
        if quantizer.index is not None:
            continue  # a shared observer is named where it is first executed
        producer = node.all_input_nodes[0]
        quantizer.name, quantizer.index = site_name(producer), index
        quantizer.producer_axis = producer_axis(producer, model)
        _link_consumer(node, observer, model)
        if qat:
            quantizer.start_qat()
    model.graph.lint()
    model.recompile()
    _drop_orphans(model)
    prepare_graph(model, [quantizer for _, quantizer in iter_quantizers(model)])


def _drop_orphans(model: GraphModule) -> None:
    """Observers that no node calls any more. torch.fx's own clean-up keeps those that have a second name."""
    called = {node.target for node in model.graph.nodes if node.op == "call_module"}
    for name, module in list(model._modules.items()):
        if isinstance(module, FXObserver) and name not in called:
            delattr(model, name)


def _remove(node: Node) -> None:
    node.replace_all_uses_with(node.all_input_nodes[0])
    node.graph.erase_node(node)


def _own(node: Node, observer: FXObserver, model: GraphModule) -> FXObserver:
    """Give a node an observer of its own."""
    fresh = FXObserver(observer.quantizer.method)
    name = f"{node.name}_own"
    while hasattr(model, name):
        name += "_"
    model.add_submodule(name, fresh)
    node.target = name
    return fresh


def _bypass_preserving(model: GraphModule) -> None:
    for node, _ in observer_nodes(model):
        source = node.all_input_nodes[0]
        if operation_name(source, model) not in PRESERVING:
            continue
        while operation_name(source, model) in PRESERVING and source.all_input_nodes:
            source = source.all_input_nodes[0]
        if observer_of(source, model) is not None:
            _remove(node)


def _move_behind_clamps(model: GraphModule) -> None:
    for node, observer in observer_nodes(model):
        clamp = node.all_input_nodes[0]
        if operation_name(clamp, model) not in CLAMPING or not clamp.all_input_nodes:
            continue
        before = clamp.all_input_nodes[0]
        if observer_of(before, model) is not None:
            _own(node, observer, model)
            if len(before.users) == 1:
                _remove(before)


def _override_by_site(model: GraphModule, mapping: Any) -> None:
    """Honour set_module_name(site, ...) where FX itself does not.

    FX ignores the name of a module that it fused into the one before it, and gives a clamp or a pool the observer,
    and so the method, of its input.
    """
    if not isinstance(mapping, QConfigMapping):
        return
    for node, observer in observer_nodes(model):
        name = site_name(node.all_input_nodes[0])
        if name not in mapping.module_name_qconfigs:
            continue
        qconfig = mapping.module_name_qconfigs[name]
        wanted = None if qconfig is None else qconfig.activation()
        if wanted is None:
            _remove(node)
        elif isinstance(wanted, FXObserver) and wanted.quantizer.method != observer.quantizer.method:
            _own(node, wanted, model)


def _separate_channels(model: GraphModule, example_inputs: Any) -> None:
    users: dict[int, list[tuple[Node, FXObserver]]] = {}
    for node, observer in observer_nodes(model):
        users.setdefault(id(observer), []).append((node, observer))
    shared = [calls for calls in users.values() if len(calls) > 1 and _looks_closer(calls[0][1])]
    for calls in [c for c in shared if c[0][1].quantizer.predictor is not None]:
        for node, observer in calls[1:]:  # what is predicted for one tensor says nothing of another
            _own(node, observer, model)
    shared = [calls for calls in shared if calls[0][1].quantizer.predictor is None]
    if not shared:
        return
    shapes = _shapes(model, example_inputs)
    for calls in shared:
        seen: dict[Any, FXObserver] = {}
        for node, observer in calls:
            shape = shapes.get(node)
            if shape is None:
                continue
            method = observer.quantizer.method
            axis = producer_axis(node.all_input_nodes[0], model)
            axis = axis if method.channel_axis is None else method.channel_axis
            in_range = -len(shape) <= axis < len(shape)
            key = ("last" if axis < 0 else axis, shape[axis] if in_range else None)
            if not seen:
                seen[key] = observer
            elif key in seen:
                node.target = next(n.target for n, o in calls if observer_of(n, model) is seen[key])
            else:
                seen[key] = _own(node, observer, model)


def _looks_closer(observer: FXObserver) -> bool:
    return observer.quantizer.uses_channels or observer.quantizer.predictor is not None


class _ShapeRecorder(Interpreter):
    """Runs the graph once and notes the shape of every tensor."""

    def __init__(self, model: GraphModule) -> None:
        super().__init__(model)
        self.shapes: dict[Node, tuple[int, ...]] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.shapes[n] = tuple(value.shape)
        return value


def _shapes(model: GraphModule, example_inputs: Any) -> dict[Node, tuple[int, ...]]:
    inputs = example_inputs if isinstance(example_inputs, list | tuple) else (example_inputs,)
    modes = {module: module.training for module in model.modules()}
    observers = [observer for _, observer in observer_nodes(model)]
    stock = [m for m in model.modules() if isinstance(m, torch.ao.quantization.ObserverBase | nn.Module)]
    recorder = _ShapeRecorder(model)
    try:
        model.eval()  # a forward pass in training mode would move batch-norm statistics
        for observer in observers:
            observer.paused = True
        with torch.no_grad(), _stock_observers_disabled(stock):
            recorder.run(*inputs)
    except Exception as error:
        logger.warning(
            "shapes could not be traced with the example inputs given to prepare_fx (%s: %s); observers stay shared "
            "as FX placed them",
            type(error).__name__,
            error,
        )
        return {}
    finally:
        for observer in observers:
            observer.paused = False
        for module, training in modes.items():
            module.training = training
    return recorder.shapes


class _stock_observers_disabled:
    """Restores the state of torch.ao's own observers, which a forward pass would feed."""

    def __init__(self, modules: list[Any]) -> None:
        self.observers = [
            m
            for m in modules
            if isinstance(m, torch.ao.quantization.ObserverBase | torch.ao.quantization.FakeQuantizeBase)
            and not isinstance(m, FXObserver)
        ]

    def __enter__(self) -> None:
        self.states = [{k: v.clone() for k, v in m.state_dict().items()} for m in self.observers]

    def __exit__(self, *_: Any) -> None:
        for observer, state in zip(self.observers, self.states, strict=True):
            observer.load_state_dict(state)


def _link_consumer(node: Node, observer: FXObserver, model: GraphModule) -> None:
    quantizer = observer.quantizer
    if not quantizer.method.needs_next_layer:
        return
    layer = find_consumer(node, model)
    if layer is None:
        quantizer.consumer_missing = True
        logger.warning("%s feeds no linear layer: its noise is searched on the activation", quantizer.label)
    else:
        quantizer.consumer_geometry = geometry(layer)


def resolve_skip(model: GraphModule, skip: tuple[str, ...]) -> list[str]:
    """Module names of "first", "last" and plain names, in a fused model.

    Raises:
        InvalidMethod: a name is no module of the model.
    """
    layers = [
        str(node.target)
        for node in model.graph.nodes
        if node.op == "call_module" and _has_weight(model.get_submodule(str(node.target)))
    ]
    names = []
    for item in skip:
        if item in ("first", "last"):
            if layers:
                names.append(layers[0] if item == "first" else layers[-1])
        elif any(name == item or name.startswith(item + ".") for name, _ in model.named_modules()):
            names.append(item)
        else:
            raise InvalidMethod(f"skip={item!r}: the model has no such module; layers are {', '.join(layers[:8])}, ...")
    return names


def _has_weight(module: nn.Module) -> bool:
    if isinstance(module, nn.Sequential):  # FX's fused modules
        return any(_has_weight(child) for child in module)
    kinds = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)
    return isinstance(module, kinds)
