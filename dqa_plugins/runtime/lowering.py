"""From a converted model to one whose convolutions and linears compute in int8, through the one program.

Requirements this file meets:

- It starts from `export.make_program`, with one node for each quantizer and weight: models of all rooms look alike.
- A layer that cannot be computed exactly stays as it is, and the report says why.
- Outputs equal those of the converted model but for the order of float sums, and values within rounding of a tie.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from dqa_plugins.errors import UnsupportedInput
from dqa_plugins.export.frozen import FrozenPredictor
from dqa_plugins.export.program import as_inputs, make_program
from dqa_plugins.operators import DEQUANTIZE, FAKE_QUANTIZE, MODULE, modules_as_nodes
from dqa_plugins.progress import busy

from .eligible import LAYERS, Eligible
from .facts import tensors
from .layers import Int8Conv2d, Int8Layer, Int8Linear
from .quantizer import Int8Quantizer
from .report import META, LayerReport

aten = torch.ops.aten
_RELU = (aten.relu.default, aten.relu_.default)
_SHAPES = (aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.dropout.default)


@busy("lowering")
def lower(converted: nn.Module, example_inputs: Any, *, dynamic_batch: bool = True) -> GraphModule:
    """Compute the convolutions and linears of a converted model in int8, where that is exact.

    Lowered are conv2d and linear layers with an int8 weight behind a quantizer whose codes fit a byte. The rest stays
    in float; `lowering_report` says what and why. The result is for inference on a CPU, in float32.

    Args:
        converted: by any room; its weights quantized, too (weight_bits=8).
        example_inputs: a tensor or a tuple of them; the first dimension of the first one is the batch.
        dynamic_batch: False: the model takes batches of this size only.

    Returns:
        a GraphModule whose outputs equal the model's to 1e-5 of the largest, rounding ties aside.

    Raises:
        UnsupportedInput: the model is on another device than the CPU.
        UncalibratedQuantizer, UnsupportedCombination, ExportFailed: as `export.make_program`.
    """
    inputs = as_inputs(example_inputs)
    tensors = [*converted.parameters(), *converted.buffers(), *inputs]
    elsewhere = {str(t.device) for t in tensors if isinstance(t, Tensor) and t.device.type != "cpu"}
    if elsewhere:
        raise UnsupportedInput(f"lower() makes models for the CPU, this one is on {', '.join(sorted(elsewhere))}.")
    with modules_as_nodes() as modules:
        program = make_program(converted, inputs, dynamic_batch=dynamic_batch)
    model: Any = program.module()
    with torch.no_grad():
        return _Lowering(model, modules, inputs).run()


class _Lowering(Eligible):
    """Rewrites the graph of an unlifted program."""

    def run(self) -> GraphModule:
        """See `lower`."""
        rows: list[LayerReport] = []
        for node in list(self.graph.nodes):
            if node in self.seen:
                self._later(node)
            elif node.target is aten.slice.Tensor and node.args[1:] == (0, 0, sys.maxsize):
                node.replace_all_uses_with(node.args[0])  # Brevitas 0.13 takes all outputs of a weight
                self.graph.erase_node(node)
        found: dict[Node, dict[Node, Int8Layer]] = {}
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node.target in LAYERS:
                layer, site, reason = self.layer(node)
                others = found.get(node.args[0], {}).values()
                if layer is not None and any(type(other) is not type(layer) for other in others):
                    layer, reason = None, "its quantizer feeds int8 layers in another memory format"
                rows.append(LayerReport(self.name(node), LAYERS[node.target], site, reason))
                if layer is not None:
                    found.setdefault(node.args[0], {})[node] = layer
        if found:  # the others by the same pass, in the same memory format
            for node in self.graph.nodes:
                if node in self.seen and node not in found and self.passes(node):
                    found[node] = {}
        for number, (quantizer, layers) in enumerate(found.items()):
            self._replace(quantizer, layers, number)
        for node in list(self.graph.nodes):
            if node.target is MODULE:
                self._enter(node)
            elif node.op == "call_module":
                self._join(node)
        self._regress_at_once()
        for node in reversed(self.graph.nodes):
            if not node.users and (node.op == "get_attr" or node.target in (FAKE_QUANTIZE, DEQUANTIZE)):
                self.graph.erase_node(node)
        self.graph.eliminate_dead_code()
        self.graph.lint()
        self.model.delete_all_unused_submodules()
        self.model.recompile()
        self.model.meta[META] = tuple(rows)
        return self.model

    def _join(self, node: Any) -> None:
        """Let a convolution that alone feeds a quantizer make its bytes."""
        module, source = self.model.get_submodule(node.target), node.args[0]
        if not isinstance(module, Int8Quantizer) or source.op != "call_module" or len(source.users) != 1:
            return
        layer = self.model.get_submodule(source.target)
        joins = module.quantizer is None and not module.added and not (module.values and module.folded)
        if isinstance(layer, Int8Conv2d) and joins:
            layer.then = module
            node.replace_all_uses_with(source)
            self.graph.erase_node(node)

    def _later(self, quantizer: Any) -> None:
        """Quantize behind an operation in front of layers, where that is the same: a reshape of a tensor with one grid
        (in front of linears), a maximum of values that quantizing keeps in order (in front of convolutions)."""
        x, grid = self.seen[quantizer]
        parts = tensors(grid)
        single = all(p.numel() == 1 or p.numel() == len(p) == len(x) for p in parts)
        varies = self.varies(quantizer) is not None
        inputs: Any = quantizer.args[0] if varies else [quantizer.args[0]]
        source: Any = inputs[0]
        # thresholds below zero: the largest code may stand for more than what is kept right above it
        ordered = grid.keep is None or (source.target in _RELU and not any(p.any() for p in (grid.keep[0],)))
        for user in list(quantizer.users):
            # dynamic qparams are those of the tensor in front
            pool = user.target is aten.max_pool2d.default and ordered and (not varies or len(inputs) > 1)
            if not pool and not (user.target in _SHAPES and single):
                continue
            layer, rank = (aten.conv2d.default, 4) if pool else (aten.linear.default, 2)
            value = user.meta["val"]
            if not any(r.target is layer and r.args[0] is user for r in user.users) or value.ndim < rank:
                continue
            if str(value.shape[0]) != str(quantizer.meta["val"].shape[0]):
                continue
            # a maximum, then the ReLU: the pass that quantizes takes it along
            relu = pool and source.target in _RELU and set(source.users) <= {quantizer}
            with self.graph.inserting_before(user):
                front = source.args[0] if relu else source
                moved = self.graph.call_function(user.target, (front, *user.args[1:]), user.kwargs)
                moved.meta = dict(user.meta)
                moved = self.graph.call_function(source.target, (moved,)) if relu else moved
                arguments: tuple[Any, ...] = (moved, *quantizer.args[1:])
                if varies:
                    _, key, *_ = quantizer.args
                    arguments = ([moved, *inputs[1:]], key, [*value.shape[1:]], value.dtype)
                again = self.graph.call_function(quantizer.target, arguments)
            moved.meta, again.meta = dict(user.meta), dict(user.meta)
            self.seen[again] = (user.target(x, *user.args[1:]) if pool else x.reshape(len(x), *value.shape[1:]), grid)
            user.replace_all_uses_with(again)
            self.graph.erase_node(user)
        if not quantizer.users:
            self.graph.erase_node(quantizer)

    def _enter(self, node: Any) -> None:
        """A call of the module that a node stands for."""
        key = str(node.args[1])
        path = f"module_{list(self.modules).index(key)}"
        module: Any = self.modules[key]
        self.model.add_submodule(path, module)
        with self.graph.inserting_before(node):
            called = self.graph.call_module(path, tuple(node.args[0]))
        called.meta = dict(node.meta)
        node.replace_all_uses_with(called)
        self.graph.erase_node(node)

    def _regress_at_once(self) -> None:
        """One regression for all sites that are predicted from the same features alone, as in the paper's mode."""
        alike: dict[Any, list[Any]] = {}
        modules: dict[str, Any] = dict(self.model.named_modules())
        for node in self.graph.nodes:
            module = modules.get(str(node.target)) if node.op == "call_module" else None
            if isinstance(module, FrozenPredictor) and len(node.args) == module.groups == 1 and module.mode == "paper":
                alike.setdefault(node.args[0], []).append(node)
        for number, (features, nodes) in enumerate(alike.items()):
            parts = [modules[node.target] for node in nodes]
            whole, first = copy.deepcopy(parts[0]), 0
            for name in ("weight", "bias", "logarithmic", "low", "high"):
                whole.register_buffer(name, torch.cat([getattr(part, name) for part in parts], -1))
            self.model.add_submodule(f"regression_{number}", whole)
            with self.graph.inserting_after(features):
                found = self.graph.call_module(f"regression_{number}", (features,))
            for node, part in zip(nodes, parts, strict=True):
                with self.graph.inserting_before(node):
                    own = self.graph.call_function(torch.narrow, (found, 1, first, part.sides))
                first += part.sides
                node.replace_all_uses_with(own)
                self.graph.erase_node(node)

    def _replace(self, quantizer: Any, layers: dict[Node, Int8Layer], number: int) -> None:
        """One Int8Quantizer in place of fake_quantize, and of a sum and a ReLU in front; its layers behind it."""
        value, grid = self.seen[quantizer]
        varying = self.varies(quantizer)
        x: Any = quantizer.args[0] if varying is None else quantizer.args[0][0]
        predicted: Any = () if varying is None else quantizer.args[0][1:]
        relu = x.target in _RELU and set(x.users) == {quantizer}
        relu = relu and (x.target is aten.relu.default or len(x.args[0].users) == 1)
        total = x.args[0] if relu else x
        terms = list(total.args) if relu and _is_sum(total, x) else [total]
        module = Int8Quantizer(
            self.site(quantizer),
            grid if varying is None else copy.deepcopy(varying),
            channels_last=value.ndim == 4 and not any(isinstance(v, Int8Linear) for v in layers.values()),
            folded=bool(layers) and self.folds(quantizer),
            added=len(terms) == 2,
            relu=relu,
            values=len(layers) < len(quantizer.users),
        )
        path = f"int8_quantizer_{number}"
        self.model.add_submodule(path, module)
        with self.graph.inserting_before(quantizer):
            codes = self.graph.call_module(path, (*terms, *predicted))
        for index, (node, layer) in enumerate(layers.items()):
            self.model.add_submodule(f"int8_layer_{number}_{index}", layer)
            with self.graph.inserting_before(node):
                lowered = self.graph.call_module(f"int8_layer_{number}_{index}", (codes,))
            lowered.meta = dict(node.meta)
            node.replace_all_uses_with(lowered)
            self.graph.erase_node(node)
        if quantizer.users:
            with self.graph.inserting_after(codes):
                values = self.graph.call_function(getattr, (codes, "values"))
            values.meta = dict(quantizer.meta)
            quantizer.replace_all_uses_with(values)
        self.graph.erase_node(quantizer)
        for node in [x, total] if len(terms) == 2 else [x] if relu else []:
            self.graph.erase_node(node)


def _is_sum(node: Any, reader: Node) -> bool:
    """A sum of two tensors of one shape, which only `reader` reads."""
    if node.target not in (aten.add.Tensor, aten.add_.Tensor) or set(node.users) != {reader} or node.kwargs:
        return False
    if not all(isinstance(a, Node) for a in node.args) or len(node.args) != 2:
        return False
    values = [a.meta.get("val") for a in node.args]
    if any(not isinstance(v, Tensor) or v.dtype != torch.float32 for v in values):
        return False
    return str(values[0].shape) == str(values[1].shape) and (
        node.target is aten.add.Tensor or len(node.args[0].users) == 1
    )
