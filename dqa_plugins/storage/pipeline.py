"""prepare_stored and convert_stored: from a float model to one that holds its long-lived values as packed bytes.

    prepared = prepare_stored(model, DQA(bits=3), example_inputs)
    for x in calibration: prepared(x)
    stored = convert_stored(prepared, coding="joint")

The early reader of a value keeps the fresh float tensor, as in the DQA paper; late readers get the unpacked one. A
shortcut that is subsampled before it is used (`x[:, :, ::2, ::2]`, a 1x1 convolution with a stride) is subsampled
before it is stored.

In a model that an adapter prepared or converted, a long-lived value that has a quantizer keeps it: its early reader
reads the quantized value, as the adapter has it, and what is packed are the same codes. So the outputs stay those of
the adapter's converted model.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ..errors import InvalidMethod, UncalibratedQuantizer
from ..methods import Method, check_method
from ..quantizer import ActivationQuantizer
from .codebook import build_codebook, check_coding
from .edges import (
    Edge,
    follow_in_place,
    late_readers,
    operation_name,
    producer_axis,
    quantizer_of,
    record_shapes,
    site_names,
    trace,
)
from .errors import NothingToStore, NotPackable
from .places import Pack, StoredSite, Unpack
from .subsampling import Subsampling, read_subsample, subsampled, subsampling


def prepare_stored(
    model: nn.Module, method: Method, example_inputs: Any, min_lifetime: int = 1, *, skip: tuple[str, ...] = ()
) -> GraphModule:
    """Put a quantizer on every long-lived value.

    Args:
        model: any model that torch.fx can trace, or one prepared or converted by the FX or PT2E adapter. It is
            not changed.
        method: of the quantizers. Values that an adapter's quantizer stands on keep that one.
        example_inputs: a tensor or a tuple of positional inputs, for the shapes.
        min_lifetime: compute layers that must run between the making of a value and a late reader.
        skip: site names to leave in float.

    Returns:
        a prepared model in the mode of `model`; calibrate it by running it. `stored_edges(prepared)` lists the edges.

    Raises:
        TraceFailed: torch.fx cannot trace the model.
        NothingToStore: no value lives that long.
        NotAMethod: `method` is not one.
        InvalidMethod: min_lifetime is less than 1.
        NotPackable: its parameters are predicted (QPP).
    """
    check_method(method, "prepare_stored")
    if min_lifetime < 1:
        raise InvalidMethod(f"prepare_stored: min_lifetime={min_lifetime}: at least 1 compute layer must lie between.")
    if method.source == "predicted":
        raise NotPackable("prepare_stored packs with qparams='static' or 'dynamic'; QPP is not supported there.")
    traced = trace(copy.deepcopy(model))
    follow_in_place(traced)
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    names = site_names(traced)
    late = late_readers(traced, min_lifetime)
    for node, readers in late.items():
        if names[node] in skip:
            continue
        _store(traced, node, readers, method, names[node])
    traced.graph.lint()
    traced.recompile()
    _describe(traced, inputs)
    for name, site in list(traced.named_children()):
        if isinstance(site, StoredSite) and not site.edge.dtype.is_floating_point:
            _remove_site(traced, name)
    if not stored_edges(traced):
        raise NothingToStore(
            f"{type(model).__name__} has no floating-point value that is read again after {min_lifetime} or more "
            "compute layers ran. Lower min_lifetime, or quantize it with an adapter."
        )
    traced.recompile()
    return traced


def _store(model: GraphModule, node: Node, late: list[tuple[Node, int]], method: Method, name: str) -> None:
    """Put a site behind `node`, and let the late readers read it; subsampling readers get a site of their own."""
    existing = quantizer_of(node, model)
    groups: dict[str, tuple[Subsampling | None, list[tuple[Node, int]]]] = {}
    for reader, waited in late:
        how = subsampling(reader, node, model)
        if existing is not None and how is not None and _cuts_channels(existing, how):
            how = None
        groups.setdefault(how.key if how else "", (how, []))[1].append((reader, waited))
    for number, (how, readers) in enumerate(groups.values()):
        if existing is None:
            site_name = f"{name}.stored" if _is_named(model, name) else name
            site_name = f"{site_name}.{number}" if number else site_name
            quantizer = ActivationQuantizer(method, name=site_name, producer_axis=producer_axis(node, model))
        else:
            site_name, quantizer = existing.name or name, existing
        lifetime, operations = max(w for _, w in readers), tuple(operation_name(r, model) for r, _ in readers)
        target = f"stored_{name.replace('.', '_')}" + (f"_{number}" if number else "")
        while hasattr(model, target):
            target += "_"
        model.add_submodule(target, StoredSite(quantizer, Edge(site_name, (), torch.float32, lifetime, operations)))
        arguments = _site_arguments(node, how, existing)
        with model.graph.inserting_after(max(arguments, key=list(model.graph.nodes).index)):
            site = model.graph.call_module(target, arguments)
        for reader, _ in readers:
            current = subsampling(reader, node, model) if how else None
            if current is None:
                reader.replace_input_with(node, site)
            else:
                read_subsample(model, reader, node, current, site, keep=existing is not None)


def _site_arguments(node: Node, how: Subsampling | None, existing: ActivationQuantizer | None) -> tuple[Node, ...]:
    """What a site is called with, see `StoredSite.forward`."""
    if existing is None:
        return (node if how is None else subsampled(node, how, node),)
    source = node.all_input_nodes[0]
    if how is None:
        return source, node
    quantized = subsampled(node, how, node)
    arguments = (subsampled(source, how, quantized), quantized)
    return (*arguments, source) if existing.method.qparams == "dynamic" else arguments


def _cuts_channels(quantizer: ActivationQuantizer, how: Subsampling) -> bool:
    """Whether a subsample may have other channels than the quantizer knows."""
    return quantizer.uses_channels and (quantizer.channel_axis < 0 or quantizer.channel_axis in how.axes)


def _is_named(model: GraphModule, name: str) -> bool:
    return any(isinstance(m, ActivationQuantizer) and m.name == name for m in model.modules())


class _First(nn.Module):
    def forward(self, x: Any, *_: Any) -> Any:
        return x


@torch.no_grad()
def _describe(model: GraphModule, inputs: tuple[Any, ...]) -> None:
    """Write shape and dtype of every site into its edge; statistics stay untouched."""
    twin = copy.deepcopy(model)
    for module in twin.modules():  # not eval(), which exported models refuse
        module.training = False
    for target, module in list(twin.named_children()):
        if isinstance(module, StoredSite):
            setattr(twin, target, _First())
    found = record_shapes(twin, inputs)
    shapes = {str(n.target): found[n] for n in twin.graph.nodes if n.op == "call_module" and n in found}
    for target, module in model.named_children():
        if isinstance(module, StoredSite) and target in shapes:
            shape, dtype = shapes[target]
            edge = module.edge
            module.edge = Edge(edge.name, shape, dtype, edge.lifetime, edge.readers)


def _remove_site(model: GraphModule, target: str) -> None:
    for node in list(model.graph.nodes):
        if node.op == "call_module" and node.target == target:
            node.replace_all_uses_with(node.all_input_nodes[min(1, len(node.all_input_nodes) - 1)])
            model.graph.erase_node(node)
    delattr(model, target)


def stored_edges(model: nn.Module) -> list[Edge]:
    """The long-lived values of a prepared or converted model, in order of execution."""
    if not isinstance(model, GraphModule):
        return []
    modules = (model.get_submodule(str(n.target)) for n in model.graph.nodes if n.op == "call_module")
    return [m.edge for m in modules if isinstance(m, StoredSite | Pack)]


def convert_stored(prepared: GraphModule, coding: str = "joint") -> GraphModule:
    """Freeze the quantizers, and pack every long-lived value when it is made.

    The float tensor is freed once its early readers are done; it is unpacked right before each late reader.

    Args:
        prepared: from `prepare_stored`, calibrated. It is not changed. If an adapter had prepared the model before,
            the adapter's own conversion is run as well.
        coding: "none", "shift_error", "joint" or "auto", see `pack`.

    Returns:
        the converted model. Its outputs equal those of the fake-quantized model: of the adapter's converted model,
        where there was an adapter.

    Raises:
        UnknownCoding, UncalibratedQuantizer, NothingToStore.
    """
    check_coding(coding)
    if not any(isinstance(m, StoredSite) for m in prepared.modules()):
        raise NothingToStore("convert_stored takes what prepare_stored returned; this model has no stored values.")
    model = copy.deepcopy(prepared)
    for module in prepared.modules():
        convert_host = getattr(type(module), "convert_host", None)
        if convert_host is not None:  # an observer of an adapter
            model = convert_host(model)
            break
    order = {node: i for i, node in enumerate(model.graph.nodes)}
    for node in list(model.graph.nodes):
        site = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(site, StoredSite):
            continue
        quantizer, strips = site.quantizer, site.strips
        if strips is None and coding != "none":
            raise UncalibratedQuantizer(
                f"{quantizer.label} was converted without having seen data. Run the prepared model on calibration "
                "batches first."
            )
        quantizer.freeze()
        book = build_codebook(quantizer, coding, strips)
        setattr(model, str(node.target), Pack(quantizer, book, site.edge))
        _drop_quantized(node)
        for user in sorted(node.users, key=order.__getitem__):
            target = f"{node.target}_unpack"
            if not hasattr(model, target):
                model.add_submodule(target, Unpack())
            with model.graph.inserting_before(user):
                unpacked = model.graph.call_module(target, (node,))
            user.replace_input_with(node, unpacked)
    model.graph.lint()
    model.recompile()
    return model


def _drop_quantized(node: Node) -> None:
    """What the adapter's quantizer made is not packed, but the value that it was made from."""
    if len(node.args) < 2:
        return
    dead: Any = node.args[1]
    node.args = (node.args[0], *node.args[2:])
    while not dead.users and dead.op == "call_function":  # the subsample of it
        before = dead.all_input_nodes[0]
        node.graph.erase_node(dead)
        dead = before
