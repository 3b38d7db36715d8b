"""prepare_stored and convert_stored: from a float model to one that holds its long-lived values as packed bytes.

    prepared = prepare_stored(model, DQA(bits=3), example_inputs)
    for x in calibration: prepared(x)
    stored = convert_stored(prepared, coding="joint")

The early reader of a value keeps the fresh float tensor, as in the DQA paper; late readers get the unpacked one. A
shortcut that is subsampled before it is used (`x[:, :, ::2, ::2]`, a 1x1 convolution with a stride) is subsampled
before it is stored.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..errors import UncalibratedQuantizer
from ..methods import Method, check_method
from ..quantizer import ActivationQuantizer
from .codebook import Codebook, build_codebook, check_coding
from .edges import Edge, follow_in_place, late_readers, operation_name, producer_axis, record_shapes, site_names, trace
from .errors import NothingToStore
from .layer import read_codebook, write_codebook
from .packed import PackedActivation, pack
from .strips import STRIP_SAMPLES, Strips, join, take_strips


class StoredSite(nn.Module):
    """Stands where a long-lived value is stored: observes while calibrating, fake-quantizes once frozen.

    Besides what the quantizer itself keeps, it keeps strips of neighbouring values for the entropy tables.
    """

    def __init__(self, quantizer: ActivationQuantizer, edge: Edge) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.edge = edge
        self.strips: Strips | None = None
        self.paused = False  # True while gradients are taken: neither observe nor quantize

    def forward(self, x: Tensor) -> Tensor:
        """Observe or fake-quantize x."""
        if self.paused:
            return x
        out: Tensor = self.quantizer(x)
        taken = 0 if self.strips is None else len(self.strips.values)
        if self.quantizer.state == "observe" and taken < STRIP_SAMPLES and x.numel():
            self.strips = join(self.strips, take_strips(x[: STRIP_SAMPLES - taken], self.quantizer))
        return out


class Pack(nn.Module):
    """Packs what it is given; the codebook is part of the state_dict."""

    def __init__(self, quantizer: ActivationQuantizer, codebook: Codebook, edge: Edge) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.codebook = codebook
        self.edge = edge

    def forward(self, x: Tensor) -> PackedActivation | Tensor:
        """The packed value (tensors without data, of the meta device, pass through)."""
        if x.device.type == "meta":
            return x
        return pack(x, self.quantizer, self.codebook.coding, self.codebook)

    def get_extra_state(self) -> Tensor:
        """The codebook section, as uint8: loads with weights_only."""
        return torch.frombuffer(bytearray(write_codebook(self.codebook)), dtype=torch.uint8).clone()

    def set_extra_state(self, state: Tensor) -> None:
        """Inverse of `get_extra_state`."""
        self.codebook = read_codebook(memoryview(state.cpu().numpy().tobytes()))


class Unpack(nn.Module):
    """Unpacks right before a late reader."""

    def forward(self, packed: PackedActivation | Tensor) -> Tensor:
        """The fake-quantized value."""
        return packed if isinstance(packed, Tensor) else packed.unpack()


def prepare_stored(
    model: nn.Module, method: Method, example_inputs: Any, min_lifetime: int = 1, *, skip: tuple[str, ...] = ()
) -> GraphModule:
    """Put a quantizer on every long-lived value.

    Args:
        model: any model that torch.fx can trace, or one prepared or converted by the FX or PT2E adapter. It is
            not changed.
        method: of the quantizers.
        example_inputs: a tensor or a tuple of positional inputs, for the shapes.
        min_lifetime: compute layers that must run between the making of a value and a late reader.
        skip: site names to leave in float.

    Returns:
        a prepared model in the mode of `model`; calibrate it by running it. `stored_edges(prepared)` lists the edges.

    Raises:
        TraceFailed: torch.fx cannot trace the model.
        NothingToStore: no value lives that long.
        NotAMethod: `method` is not one.
    """
    check_method(method, "prepare_stored")
    training = model.training
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
    return traced.train(training)


def _store(model: GraphModule, node: Node, late: list[tuple[Node, int]], method: Method, name: str) -> None:
    """Put a site behind `node`, and let the late readers read it; subsampling readers get a site of their own."""
    groups: dict[str, tuple[Node | None, list[tuple[Node, int]]]] = {}
    for reader, waited in late:
        subsample = _subsampling(reader, node, model)
        key = repr(subsample)
        if key not in groups:
            groups[key] = (subsample_node(model, node, subsample) if subsample else None, [])
        groups[key][1].append((reader, waited))
    for number, (sampled, readers) in enumerate(groups.values()):
        source = node if sampled is None else sampled
        site_name = f"{name}.stored" if _is_named(model, name) else name
        if number:
            site_name = f"{site_name}.{number}"
        quantizer = ActivationQuantizer(method, name=site_name, producer_axis=producer_axis(node, model))
        edge = Edge(
            site_name,
            (),
            torch.float32,
            max(w for _, w in readers),
            tuple(operation_name(r, model) for r, _ in readers),
        )
        target = f"stored_{name.replace('.', '_')}" + (f"_{number}" if number else "")
        while hasattr(model, target):
            target += "_"
        model.add_submodule(target, StoredSite(quantizer, edge))
        with model.graph.inserting_after(source):
            site = model.graph.call_module(target, (source,))
        for reader, _ in readers:
            _read_stored(model, reader, node, site, sampled is not None)


def _is_named(model: GraphModule, name: str) -> bool:
    return any(isinstance(m, ActivationQuantizer) and m.name == name for m in model.modules())


def _subsampling(reader: Node, source: Node, model: GraphModule) -> tuple[Any, ...] | None:
    """The index that a reader subsamples with before anything else, or None."""
    name = operation_name(reader, model)
    if reader.op == "call_function" and name == "getitem" and reader.args[0] is source:
        index = reader.args[1]
        index = index if isinstance(index, tuple) else (index,)
        steps = [i.step for i in index if isinstance(i, slice)]
        plain = all(
            isinstance(i, slice) and all(v is None or isinstance(v, int) for v in (i.start, i.stop, i.step))
            for i in index
        )
        if plain and len(index) > 1 and index[0] == slice(None) and any(s not in (None, 1) for s in steps):
            return index
    if reader.op == "call_module" and reader.args[0] is source:
        conv = model.get_submodule(str(reader.target))
        if isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d) and set(conv.kernel_size) == {1}:
            if any(s > 1 for s in conv.stride) and not isinstance(conv.padding, str) and set(conv.padding) == {0}:
                return (slice(None), slice(None), *(slice(None, None, s) for s in conv.stride))
    return None


def _is_plain(index: Any) -> bool:
    """A slice of Python numbers: nothing in it depends on data."""
    return isinstance(index, slice) and all(isinstance(v, int | None) for v in (index.start, index.stop, index.step))


def subsample_node(model: GraphModule, node: Node, index: tuple[Any, ...]) -> Node:
    """node[index], right behind node."""
    with model.graph.inserting_after(node):
        return model.graph.call_function(operator.getitem, (node, index))


def _read_stored(model: GraphModule, reader: Node, node: Node, site: Node, subsampled: bool) -> None:
    if not subsampled:
        reader.replace_input_with(node, site)
        return
    if reader.op == "call_function":  # the slice itself: the stored value is its result
        reader.replace_all_uses_with(site)
        model.graph.erase_node(reader)
        return
    conv: Any = copy.copy(model.get_submodule(str(reader.target)))  # shares the weights
    conv.stride = (1,) * len(conv.stride)
    target = f"{str(reader.target).replace('.', '_')}_subsampled"
    model.add_submodule(target, conv)
    reader.target = target
    reader.replace_input_with(node, site)


@torch.no_grad()
def _describe(model: GraphModule, inputs: tuple[Any, ...]) -> None:
    """Write shape and dtype of every site into its edge; statistics stay untouched."""
    twin = copy.deepcopy(model).eval()
    for target, module in list(twin.named_children()):
        if isinstance(module, StoredSite):
            setattr(twin, target, nn.Identity())
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
            node.replace_all_uses_with(node.all_input_nodes[0])
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
        prepared: from `prepare_stored`, calibrated. It is not changed.
        coding: "none", "shift_error", "joint" or "auto", see `pack`.

    Returns:
        the converted model. Its outputs equal those of the fake-quantized model.

    Raises:
        UnknownCoding, UncalibratedQuantizer, NothingToStore.
    """
    check_coding(coding)
    if not any(isinstance(m, StoredSite) for m in prepared.modules()):
        raise NothingToStore("convert_stored takes what prepare_stored returned; this model has no stored values.")
    model = copy.deepcopy(prepared)
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
