"""Between a traced model and the judge of placement, for `quantize_model`.

Activation modules become Brevitas' layers, other sites a QuantIdentity behind the tensor; layers with weights become
Brevitas' own.

Where the host differs:

- Batch norms stay what they are, where FX and PT2E fold them into the layer before: sites have the same names.
- Brevitas has one quantizer per module: a QuantIdentity that several sites share is called at each of them.
- NoisyQuant(objective="output"): a layer of Brevitas does not know the next one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import brevitas.nn as qnn
from brevitas.graph.base import ModuleToModuleByInstance
from brevitas.quant import Int8WeightPerChannelFloat
from torch import nn
from torch.fx import GraphModule, Node, Tracer

from dqa_plugins.errors import InvalidArgument, UnsupportedInput
from dqa_plugins.graph.fx import describe, follow_in_place
from dqa_plugins.graph.record import record_shapes
from dqa_plugins.host.placement import Group, Placement, Site, judge
from dqa_plugins.host.quantize import methods_by_name
from dqa_plugins.host.settings import warn_idle
from dqa_plugins.host.sites import keep_summary
from dqa_plugins.method import Method
from dqa_plugins.options import check_weights
from dqa_plugins.sites import iter_quantizers

from .config import get_act_quant
from .proxy import PluginActProxy
from .substitute import LAYERS, substitute

_WEIGHTED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: qnn.QuantConv1d,
    nn.Conv2d: qnn.QuantConv2d,
    nn.Conv3d: qnn.QuantConv3d,
    nn.ConvTranspose1d: qnn.QuantConvTranspose1d,
    nn.ConvTranspose2d: qnn.QuantConvTranspose2d,
    nn.ConvTranspose3d: qnn.QuantConvTranspose3d,
    nn.Linear: qnn.QuantLinear,
}


class _Tracer(Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or type(m).__module__.startswith("brevitas.")


def trace(model: nn.Module) -> GraphModule:
    """The model as a torch.fx graph.

    Raises:
        UnsupportedInput: torch.fx cannot trace it.
    """
    try:
        traced = GraphModule(model, _Tracer().trace(model), type(model).__name__)
    except Exception as error:
        raise UnsupportedInput(
            f"quantize_model: torch.fx cannot trace {type(model).__name__} ({type(error).__name__}: {error}). Use "
            "substitute_layers(model, {nn.ReLU: method, ...}) and brevitas.graph.calibrate.calibration_mode instead."
        ) from error
    follow_in_place(traced)
    traced.recompile()
    return traced


def place(model: GraphModule, method: Method | None, named: Mapping[str, Method | None], example: Any) -> Placement:
    """Ask the judge about a traced model; changes nothing.

    Args:
        model: see `trace`.
        method: of every operation that is not named.
        named: {site or module: method or None}.
        example: inputs, for shapes.

    Raises:
        InvalidArgument: a name is neither a site nor a module.
        DuplicateSites: two sites have one name.
    """
    operations = describe(model, record_shapes(model, example))
    placement = judge(operations, methods_by_name(method, named), overrides=named)
    if placement.unmatched:
        known = sorted({op.path for op in operations if op.how == "module"})
        raise InvalidArgument(
            f"quantize_model: {placement.unmatched[0]!r} is no module or site of the model; modules are "
            f"{', '.join(known[:8])}, ..."
        )
    return placement


def insert(model: GraphModule, placement: Placement, weight_bits: int | None) -> None:
    """Put Brevitas' layers where the placement says. Changes the model in place.

    Args:
        model: see `trace`.
        placement: its.
        weight_bits: 2 to 8; None leaves weights float.

    Raises:
        InvalidArgument: another number.
    """
    check_weights("quantize_model", weight_bits)
    groups: dict[Group, list[Site]] = {}
    for site in placement.sites:
        groups.setdefault(site.group, []).append(site)
    start = next(node for node in model.graph.nodes if node.op != "placeholder")
    for index, (group, sites) in enumerate(groups.items()):
        layer = _activation(model, sites) or _identity(model, sites, group.method, start)
        proxy: Any = next(module for module in layer.modules() if isinstance(module, PluginActProxy))
        proxy.judged_axis = True
        quantizer, first = proxy.quantizer, sites[0]
        quantizer.name, quantizer.index, quantizer.producer_axis = first.name, index, first.channel_axis
    if weight_bits is not None:
        _quantize_weights(model, placement, weight_bits)
    summary = placement.summary()
    keep_summary(summary, model, [quantizer for _, quantizer in iter_quantizers(model)])
    warn_idle(summary)
    model.graph.lint()
    model.recompile()


def _activation(model: GraphModule, sites: list[Site]) -> nn.Module | None:
    """Brevitas' layer in place of the activation module whose result is the only site; None: there is none."""
    node: Node = sites[0].value.key
    if len(sites) > 1 or sites[0].readers is not None or node.op != "call_module":
        return None
    old = model.get_submodule(str(node.target))
    called = sum(n.op == "call_module" and model.get_submodule(str(n.target)) is old for n in model.graph.nodes)
    if type(old) not in LAYERS or called > 1:
        return None
    layer = substitute(sites[0].name, old, sites[0].method, return_quant_tensor=False)
    model.set_submodule(str(node.target), layer)
    return layer


def _identity(model: GraphModule, sites: list[Site], method: Method, start: Node) -> nn.Module:
    """A QuantIdentity behind the tensors of the sites; in front of `start`, behind all inputs, for one of those."""
    layer = qnn.QuantIdentity(act_quant=get_act_quant(method)).train(model.training)
    target = f"quant_{sites[0].name.replace('.', '_')}"
    while hasattr(model, target):
        target += "_"
    model.add_submodule(target, layer)
    for site in sites:
        node: Node = site.value.key
        users = list(node.users)
        if site.readers is not None:
            reading = {reader.outputs[0].key if reader.outputs else None for reader in site.readers}
            users = [user for user in users if user in reading]
        with model.graph.inserting_before(start) if node.op == "placeholder" else model.graph.inserting_after(node):
            called = model.graph.call_module(target, (node,))
        for user in users:
            user.replace_input_with(node, called)
    return layer


def _quantize_weights(model: GraphModule, placement: Placement, bits: int) -> None:
    done: set[nn.Module] = set()
    for pattern in placement.patterns:
        if pattern.root.how != "module":
            continue
        layer = model.get_submodule(pattern.root.path)
        if type(layer) in _WEIGHTED and layer not in done:
            done.add(layer)
            rewriter = ModuleToModuleByInstance(
                layer, _WEIGHTED[type(layer)], weight_quant=Int8WeightPerChannelFloat, weight_bit_width=bits
            )
            rewriter.apply(model)
