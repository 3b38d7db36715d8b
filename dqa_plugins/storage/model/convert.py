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
import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ...errors import InvalidArgument, UncalibratedQuantizer
from ...graph.fx import TensorFacts, follow_in_place, operation_name
from ...graph.record import record_shapes
from ...method import Method
from ...methods import check_method
from ...options import Coding, check_option
from ...progress import busy, counted
from ...quantizer import ActivationQuantizer
from ..format.errors import NothingToStore, NotPackable
from ..format.layout import CODINGS
from ..tables import build_codebook
from .edges import Edge, LateRead, late_reads
from .facts import add_module, producer_axes, quantized_source, quantizer_of, site_names, trace
from .memory import read_sizes_early
from .sites import Pack, StoredSite, Unpack
from .subsampling import Subsampling, read_subsample, subsampled, subsampling


@busy("tracing")
def prepare_stored(
    model: nn.Module, method: Method, example_inputs: Any, min_lifetime: int = 1, *, skip: tuple[str, ...] = ()
) -> GraphModule:
    """Put a quantizer on every long-lived value.

    Args:
        model: any model that torch.fx can trace, or one prepared or converted by the FX or PT2E adapter, or converted
            by Brevitas'. It is not changed.
        method: of the quantizers. Values that an adapter's quantizer stands on keep that one.
        example_inputs: a tensor or a tuple of positional inputs, for the shapes.
        min_lifetime: compute layers that must run between the making of a value and a late reader.
        skip: names of sites, or of edges as `stored_edges` gives them, to leave as they are.

    Returns:
        a prepared model in the mode of `model`; calibrate it by running it. `stored_edges(prepared)` lists the edges.

    Raises:
        TraceFailed: torch.fx cannot trace the model, or misses its quantizers (NNCF calls them in hooks).
        NothingToStore: no value lives that long.
        NotAMethod: `method` is not one.
        InvalidArgument: min_lifetime is less than 1.
        NotPackable: its parameters are predicted (QPP), or those of an adapter's quantizer that is not converted yet.
    """
    check_method(method, "prepare_stored")
    if min_lifetime < 1:
        raise InvalidArgument(
            f"prepare_stored: min_lifetime={min_lifetime}: at least 1 compute layer must lie between."
        )
    if method.source == "predicted":
        raise NotPackable(
            "prepare_stored: qparams=QPP(...) is fitted by an adapter. Quantize the model with it there, and give "
            "prepare_stored the converted model with a method of static or dynamic parameters for the rest."
        )
    for quantizer in (m for m in model.modules() if isinstance(m, ActivationQuantizer)):
        if quantizer.method.source == "predicted" and quantizer.state == "observe":
            raise NotPackable(
                f"{quantizer.label} is not fitted yet, and a copy of the model would not record what its prediction "
                "reads. Convert the model by its adapter first, then give it to prepare_stored."
            )
    traced = trace(copy.deepcopy(model))
    follow_in_place(traced)
    read_sizes_early(traced)
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    seen, names = _shapes(traced, inputs), site_names(traced)
    floats = {node for node, found in seen.items() if found.dtype is not None and found.dtype.is_floating_point}
    axes = producer_axes(traced, seen)
    wanted = {node for node in floats if names[node] not in skip and not _only_predicts(node, traced)}
    late = late_reads(traced, min_lifetime, wanted.__contains__)
    left: set[str] = set()
    for node, reads in late.items():
        _store(traced, node, reads, method, names[node], axes.get(node, 1), seen, (skip, left))
    if not stored_edges(traced):
        raise NothingToStore(
            f"{type(model).__name__} has no floating-point value that is read again after {min_lifetime} or more "
            "compute layers ran. Lower min_lifetime, or quantize it with an adapter."
        )
    traced.graph.lint()
    traced.recompile()
    _describe(traced, inputs)
    return traced


def _store(
    model: GraphModule,
    node: Node,
    reads: list[LateRead],
    method: Method,
    name: str,
    axis: int,
    seen: Mapping[Node, TensorFacts],
    skip: tuple[tuple[str, ...], set[str]],
) -> None:
    """Put a site behind `node`, and let the late readers read it.

    Readers that subsample, and readers behind an operation that changes the value in place, get a site of their own.
    """
    origin, same_axes = quantized_source(node, model, seen)
    if origin is not None and not same_axes:
        return  # its codes are another tensor's: a quantizer of its own would change them, so it stays as it is
    existing = None if origin is None else quantizer_of(origin, model)
    groups: dict[tuple[Node, str], tuple[Subsampling | None, list[LateRead]]] = {}
    for read in reads:
        if existing is not None and read.final is not node:
            continue  # no longer what the quantizer made
        how = subsampling(read.reader, node, model)
        if existing is not None and how is not None and _cuts_channels(existing, how):
            how = None
        groups.setdefault((read.final, how.key if how else ""), (how, []))[1].append(read)
    for number, ((final, _), (how, group)) in enumerate(groups.items()):
        wanted = existing.name or name if existing is not None and origin is node else name
        wanted = f"{wanted}.{number}" if number else wanted
        site_name = _free_name(model, wanted, skip[1], own=existing is None)
        if site_name in skip[0]:
            skip[1].add(site_name)
            continue
        quantizer = existing or ActivationQuantizer(method, name=site_name, producer_axis=axis)
        edge = Edge(
            name=site_name,
            shape=(),
            dtype=torch.float32,
            lifetime=max(read.waited for read in group),
            readers=tuple(operation_name(read.reader, model) for read in group),
        )
        target = add_module(model, f"stored_{name}", StoredSite(quantizer, edge))
        arguments = _site_arguments(node, how, quantizer, origin)
        with model.graph.inserting_after(max((*arguments, final), key=list(model.graph.nodes).index)):
            site = model.graph.call_module(target, arguments)
        for read in group:
            current = subsampling(read.reader, node, model) if how else None
            if current is None:
                read.reader.replace_input_with(node, site)
            else:
                sized = None if origin is None else node.all_input_nodes[0] if origin is node else node
                read_subsample(model, read.reader, node, current, site, sized)


def _free_name(model: GraphModule, name: str, left: set[str], *, own: bool) -> str:
    """A site name that no stored or left value has, nor, if the site gets a quantizer of its own, any quantizer."""
    taken = left | {edge.name for edge in stored_edges(model)}
    if own:
        taken |= {m.name for m in model.modules() if isinstance(m, ActivationQuantizer)}
    names = itertools.chain([name, f"{name}.stored"], (f"{name}.stored.{k}" for k in itertools.count(1)))
    return next(free for free in names if free not in taken)


def _site_arguments(
    node: Node, how: Subsampling | None, quantizer: ActivationQuantizer, origin: Node | None
) -> tuple[Node, ...]:
    """What a site is called with, see `StoredSite.forward`.

    Args:
        origin: the adapter's quantizer of the value: `node` itself, or what it was made from.
    """
    if origin is None:
        return (node if how is None else subsampled(node, how, node),)
    source = origin.all_input_nodes[0]
    quantized = node if how is None else subsampled(node, how, node)
    value = quantized
    if origin is node:  # what the adapter's quantizer was given
        value = source if how is None else subsampled(source, how, quantized)
    other = how is not None or origin is not node
    return (value, quantized, source) if other and quantizer.method.source != "static" else (value, quantized)


def _cuts_channels(quantizer: ActivationQuantizer, how: Subsampling) -> bool:
    """Whether a subsample may have other channels than the quantizer knows."""
    return quantizer.uses_channels and (quantizer.channel_axis < 0 or quantizer.channel_axis in how.axes)


class _First(nn.Module):
    def forward(self, x: Any, *_: Any) -> Any:
        return x


def _shapes(model: GraphModule, inputs: tuple[Any, ...]) -> dict[Node, TensorFacts]:
    """Shape and dtype of every tensor, found on a copy whose sites store nothing."""
    twin = copy.deepcopy(model)
    for target, module in list(twin.named_children()):
        if isinstance(module, StoredSite):
            setattr(twin, target, _First())
    seen = {node.name: found for node, found in record_shapes(twin, inputs).items()}
    return {node: seen[node.name] for node in model.graph.nodes if node.name in seen}


def _describe(model: GraphModule, inputs: tuple[Any, ...]) -> None:
    """Write shape and dtype of every site into its edge."""
    for node, found in _shapes(model, inputs).items():
        site = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(site, StoredSite) and found.shape is not None and found.dtype is not None:
            site.edge = replace(site.edge, shape=found.shape, dtype=found.dtype)


def stored_edges(model: nn.Module) -> list[Edge]:
    """The long-lived values of a prepared or converted model, in order of execution."""
    if not isinstance(model, GraphModule):
        return []
    modules = (model.get_submodule(str(n.target)) for n in model.graph.nodes if n.op == "call_module")
    return [m.edge for m in modules if isinstance(m, StoredSite | Pack)]


def convert_stored(prepared: GraphModule, coding: Coding = "joint") -> GraphModule:
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
        InvalidArgument, UncalibratedQuantizer, NothingToStore.
    """
    check_option("convert_stored", "coding", coding, CODINGS)
    if not any(isinstance(m, StoredSite) for m in prepared.modules()):
        raise NothingToStore("convert_stored takes what prepare_stored returned; this model has no stored values.")
    model = copy.deepcopy(prepared)
    for module in prepared.modules():
        convert_host = getattr(type(module), "convert_host", None)
        if convert_host is not None:  # an observer of an adapter
            model = convert_host(model)
            break
    order = {node: i for i, node in enumerate(model.graph.nodes)}
    for node in counted(list(model.graph.nodes), what="building tables", unit="node"):
        site = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(site, StoredSite):
            continue
        quantizer, samples = site.quantizer, site.samples
        if samples is None and coding != "none":
            raise UncalibratedQuantizer(
                f"{quantizer.label} was converted without having seen data. Run the prepared model on calibration "
                "batches first."
            )
        quantizer.freeze()
        setattr(model, str(node.target), Pack(quantizer, build_codebook(quantizer, coding, samples), site.edge))
        _take_prediction(node, model)
        _drop_quantized(node)
        unpack = add_module(model, f"{node.target}_unpack", Unpack())
        for user in sorted(node.users, key=order.__getitem__):
            with model.graph.inserting_before(user):
                unpacked = model.graph.call_module(unpack, (node,))
            user.replace_input_with(node, unpacked)
    model.graph.lint()
    model.recompile()
    return model


def _only_predicts(node: Node, model: GraphModule) -> bool:
    """Whether a value is features that nothing but predictors of quantizers read: a handful of numbers per sample."""

    def predicts(user: Node) -> bool:
        parent = str(user.target).rpartition(".")[0] if user.op == "call_module" else ""
        return isinstance(model.get_submodule(parent), ActivationQuantizer)

    return bool(node.users) and all(predicts(user) for user in node.users)


def _take_prediction(node: Node, model: GraphModule) -> None:
    """Hand a predicted quantizer's prediction to the site that packs its value: it travels with the packed bytes."""
    origin = quantized_source(node.args[1], model, {})[0] if len(node.args) > 1 else None  # type: ignore[arg-type]
    quantizer = None if origin is None else quantizer_of(origin, model)
    if origin is not None and quantizer is not None and quantizer.method.source == "predicted" and len(origin.args) > 1:
        node.kwargs = {"prediction": origin.args[1]}


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
