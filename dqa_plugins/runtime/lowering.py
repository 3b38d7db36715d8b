"""From a converted model to one whose convolutions and linears compute in int8, through the one program.

Requirements this file meets:

- It starts from `export.make_program`, with one node for each quantizer and weight: models of all rooms look alike.
- A layer that cannot be computed exactly stays as it is, and the report says why.
- Outputs equal those of the converted model but for the order of float sums, and values within rounding of a tie.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from dqa_plugins.errors import UnsupportedInput
from dqa_plugins.export.expand import parameter_name
from dqa_plugins.export.frozen import FrozenQuantizer
from dqa_plugins.export.program import as_inputs, make_program
from dqa_plugins.grid import Grid
from dqa_plugins.operators import DEQUANTIZE, FAKE_QUANTIZE, MODULE, grid_of, modules_as_nodes
from dqa_plugins.quantizer import ActivationQuantizer

from .codes import byte_grid
from .layers import Int8Conv2d, Int8Layer, Int8Linear
from .qparams import samples
from .quantizer import Int8Quantizer
from .report import META, LayerReport

aten = torch.ops.aten
_LAYERS: dict[Any, str] = {
    aten.conv2d.default: "conv2d",
    aten.conv2d.padding: "conv2d",
    aten.linear.default: "linear",
    aten.conv1d.default: "conv1d",
    aten.conv1d.padding: "conv1d",
    aten.conv3d.default: "conv3d",
    aten.conv3d.padding: "conv3d",
    aten.conv_transpose1d.default: "conv_transpose1d",
    aten.conv_transpose2d.input: "conv_transpose2d",
    aten.conv_transpose3d.input: "conv_transpose3d",
}
_RELU = (aten.relu.default, aten.relu_.default)
_SHAPES = (aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.dropout.default)


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
    return _Lowering(model, modules).run(inputs)


class _Values(Interpreter):
    """Keeps what goes into quantizers, and their grids."""

    def __init__(self, model: GraphModule, modules: Mapping[str, Callable[..., Tensor]]) -> None:
        super().__init__(model)
        self.modules = modules
        self.seen: dict[Node, tuple[Tensor, Grid]] = {}

    def run_node(self, n: Node) -> Any:
        if n.target not in (FAKE_QUANTIZE, MODULE):
            return super().run_node(n)
        arguments = self.fetch_args_kwargs_from_env(n)[0]
        if n.target is FAKE_QUANTIZE:
            self.seen[n] = (arguments[0].detach(), grid_of(*arguments[1:-1]))
            return super().run_node(n)
        module = self.modules[arguments[1]]
        if isinstance(module, FrozenQuantizer):
            self.seen[n] = (arguments[0][0].detach(), module.original.grid(*arguments[0]))
        return module(*arguments[0])


class _Lowering:
    """Rewrites the graph of an unlifted program.

    Args:
        model: the program.
        modules: of its module nodes: what depends on the sample.
    """

    def __init__(self, model: GraphModule, modules: Mapping[str, Callable[..., Tensor]]) -> None:
        self.model, self.graph, self.modules = model, model.graph, modules
        self.seen: dict[Node, tuple[Tensor, Grid]] = {}
        self.layers: list[LayerReport] = []

    @torch.no_grad()
    def run(self, inputs: tuple[Any, ...]) -> GraphModule:
        values = _Values(self.model, self.modules)
        values.run(*inputs)
        self.seen = values.seen
        for node in list(self.graph.nodes):
            if node in self.seen:
                self._later(node)
            elif node.target is aten.slice.Tensor and node.args[1:] == (0, 0, sys.maxsize):
                node.replace_all_uses_with(node.args[0])  # Brevitas 0.13 takes all outputs of a weight
                self.graph.erase_node(node)
        found: dict[Node, dict[Node, Int8Layer]] = {}
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node.target in _LAYERS:
                layer, site, reason = self._layer(node)
                self.layers.append(LayerReport(self._name(node), _LAYERS[node.target], site, reason))
                if layer is not None:
                    found.setdefault(node.args[0], {})[node] = layer
        for number, (quantizer, layers) in enumerate(found.items()):
            self._replace(quantizer, layers, number)
        for node in list(self.graph.nodes):
            if node.target is MODULE:
                self._enter(node)
        for node in reversed(self.graph.nodes):
            if not node.users and (node.op == "get_attr" or node.target in (FAKE_QUANTIZE, DEQUANTIZE)):
                self.graph.erase_node(node)
        self.graph.eliminate_dead_code()
        self.graph.lint()
        self.model.delete_all_unused_submodules()
        self.model.recompile()
        self.model.meta[META] = tuple(self.layers)
        return self.model

    # ------------------------------------------------------------ constants

    def _constant(self, value: Any) -> Tensor | None:
        """The tensor behind a get_attr node."""
        if not isinstance(value, Node) or value.op != "get_attr":
            return None
        found: Any = self.model
        for part in str(value.target).split("."):
            found = getattr(found, part)
        return found if isinstance(found, Tensor) else None

    def _varies(self, quantizer: Node) -> ActivationQuantizer | None:
        """The quantizer of a node whose qparams depend on the sample."""
        module = self.modules[quantizer.args[1]] if quantizer.target is MODULE else None  # type: ignore[index]
        return module.original if isinstance(module, FrozenQuantizer) else None

    def _site(self, quantizer: Node) -> str:
        varying = self._varies(quantizer)
        return str(quantizer.args[-1]) if varying is None else varying.name

    def _enter(self, node: Node) -> None:
        """A call of the module that a node stands for."""
        key = str(node.args[1])
        path = f"module_{list(self.modules).index(key)}"
        self.model.add_submodule(path, self.modules[key])  # type: ignore[arg-type]
        with self.graph.inserting_before(node):
            called = self.graph.call_module(path, tuple(node.args[0]))  # type: ignore[arg-type]
        called.meta = dict(node.meta)
        node.replace_all_uses_with(called)
        self.graph.erase_node(node)

    def _name(self, node: Node) -> str:
        weight: Any = node.args[1]
        if isinstance(weight, Node) and weight.target is DEQUANTIZE:
            weight = weight.args[0]
        return parameter_name(str(getattr(weight, "target", ""))).removesuffix(".weight") or node.name

    # ------------------------------------------------------------ what can be lowered

    def _later(self, quantizer: Node) -> None:
        """Quantize behind an operation in front of layers, where that is the same: a reshape of a tensor with one grid
        (in front of linears), a maximum of values that quantizing keeps in order (in front of convolutions)."""
        x, grid = self.seen[quantizer]
        tensors = _tensors(grid)
        single = all(p.numel() == 1 or p.numel() == len(p) == len(x) for p in tensors)
        varies = self._varies(quantizer) is not None
        inputs: Any = quantizer.args[0] if varies else [quantizer.args[0]]
        source: Any = inputs[0]
        # thresholds below zero: the largest code may stand for more than what is kept right above it
        ordered = grid.keep is None or (source.target in _RELU and not any(p.any() for p in (grid.keep[0],)))
        for user in list(quantizer.users):
            pool = user.target is aten.max_pool2d.default and ordered
            if not pool and not (user.target in _SHAPES and single):
                continue
            layer, rank = (aten.conv2d.default, 4) if pool else (aten.linear.default, 2)
            value = user.meta["val"]
            if not any(r.target is layer and r.args[0] is user for r in user.users) or value.ndim < rank:
                continue
            if str(value.shape[0]) != str(quantizer.meta["val"].shape[0]):
                continue
            with self.graph.inserting_before(user):
                moved = self.graph.call_function(user.target, (source, *user.args[1:]), user.kwargs)
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

    def _layer(self, node: Node) -> tuple[Int8Layer | None, str, str]:
        """The int8 layer of a node, the site in front of it, and why there is none."""
        x = node.args[0]
        if not isinstance(x, Node) or x not in self.seen:
            return None, "", "no quantizer in front of it"
        site, kind = self._site(x), _LAYERS[node.target]
        made = self._weight(node)
        if isinstance(made, str):
            return None, site, made
        codes, scale = made
        value, grid = self.seen[x]
        bias = self._constant(node.args[2]) if len(node.args) > 2 and node.args[2] is not None else None
        geometry = _geometry(node, codes)
        if kind not in ("conv2d", "linear"):
            return None, site, f"no int8 kernel for {kind}"
        if isinstance(geometry, str):
            return None, site, geometry
        if len(node.args) > 2 and node.args[2] is not None and bias is None:
            return None, site, "its bias is computed"
        if value.dtype != torch.float32 or (value.ndim != 4 and kind == "conv2d"):
            return None, site, f"its input is {value.ndim}-dimensional {str(value.dtype).removeprefix('torch.')}"
        if any(_writes(user, x) for user in x.users):
            return None, site, "what it reads is changed in place"
        reason = self._grid_reason(x, node, codes, geometry)
        if reason:
            return None, site, reason
        bias = torch.zeros(len(codes)) if bias is None else bias.clone()
        if grid.bias is not None and self._varies(x) is None:  # B' = B - W N
            weight = codes.float() * scale.reshape(-1, *[1] * (codes.ndim - 1))
            noise = grid.bias.reshape(-1).expand(value.shape[1 if kind == "conv2d" else -1])
            parts = noise.reshape(geometry[-1] if geometry else 1, -1).repeat_interleave(
                len(codes) // (geometry[-1] if geometry else 1), 0
            )
            bias -= (weight.flatten(2).sum(-1) if weight.ndim > 2 else weight).mul(parts).sum(1)
        if self._folds(x, node):
            scale = scale * grid.step.reshape(-1).repeat_interleave(len(codes) // grid.step.numel())
        name = self._name(node)
        scale, bias = self._with_batch_norm(node, scale, bias)
        if kind == "linear":
            return Int8Linear(codes, scale, bias, name), site, ""
        return Int8Conv2d(codes, scale, bias, name, *geometry), site, ""

    def _weight(self, node: Node) -> tuple[Tensor, Tensor] | str:
        """Codes (int8) and scale (O,) of a layer's weight, or why it has none."""
        weight: Any = node.args[1]
        if not isinstance(weight, Node) or weight.target is not DEQUANTIZE:
            return "its weight is float: quantize weights, too (weight_bits=8)"
        codes, scale, zero = (self._constant(a) for a in weight.args[:3])
        axis, dtype = weight.args[3], weight.args[4]
        if codes is None or scale is None or zero is None or dtype != torch.float32:
            return "its weight is no float32 constant"
        if axis not in (None, 0) and axis % codes.ndim != 0:  # type: ignore[operator]
            return f"the scales of its weight lie along axis {axis}, int8 kernels take one per output"
        shape = [-1] + [1] * (codes.ndim - 1)
        whole = codes.to(torch.int32) - zero.to(torch.int32).reshape(shape if zero.ndim else [])
        if int(whole.min()) < -128 or int(whole.max()) > 127:
            return "its weight is asymmetric: less the zero point the codes take more than 8 bits"
        return whole.to(torch.int8), scale.float().reshape(-1).expand(len(codes)).clone()

    def _grid_reason(self, quantizer: Node, node: Node, codes: Tensor, geometry: Any) -> str:
        """Why the grid of a quantizer does not fit a layer; "" if it does."""
        x, grid = self.seen[quantizer]
        conv = bool(geometry)
        constant = self._varies(quantizer) is None
        for part in tree_leaves(_tensors(grid)):
            for axis in range(1, part.ndim):
                if part.shape[axis] > 1 and axis != (1 if conv else x.ndim - 1):
                    return "its quantizer has channels along another axis than the layer"
        noise = grid.bias is not None and bool(grid.bias.any())
        if noise and not constant:
            return "the noise of its quantizer depends on the sample"
        if noise and conv and any(geometry[1]):
            return "zero padding: the noise of its quantizer folds into the bias of layers without"
        for sample in samples(grid, len(x)):
            found = byte_grid(sample, folded=self._folds(quantizer, node))
            if isinstance(found, str):
                return found
        return ""

    def _folds(self, quantizer: Node, node: Node) -> bool:
        """Whether steps of channels go into the weight: all readers are depthwise convolutions."""
        grid = self.seen[quantizer][1]
        if grid.step.numel() == 1 or self._varies(quantizer) is not None or not isinstance(byte_grid(grid), str):
            return False
        return all(
            user.target is aten.conv2d.default and len(user.args) > 6 and user.args[6] == grid.step.numel()
            for user in quantizer.users
        )

    def _with_batch_norm(self, node: Node, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and bias of a layer and the batch norm that alone reads it, which leaves the graph."""
        users = list(node.users)
        if len(users) != 1 or users[0].target is not aten.batch_norm.default:
            return scale, bias
        norm = users[0]
        gain, offset, mean, variance = (self._constant(a) for a in norm.args[1:5])
        if norm.args[5] or mean is None or variance is None:
            return scale, bias
        factor = torch.rsqrt(variance + norm.args[7])
        if gain is not None:
            factor = factor * gain
        bias = (bias - mean) * factor
        norm.replace_all_uses_with(node)
        self.graph.erase_node(norm)
        return scale * factor, bias if offset is None else bias + offset

    # ------------------------------------------------------------ rewriting

    def _replace(self, quantizer: Node, layers: dict[Node, Int8Layer], number: int) -> None:
        """One Int8Quantizer in place of fake_quantize, and of a sum and a ReLU in front; its layers behind it."""
        _, grid = self.seen[quantizer]
        varying, first = self._varies(quantizer), next(iter(layers))
        x: Any = quantizer.args[0] if varying is None else quantizer.args[0][0]  # type: ignore[index]
        predicted: Any = () if varying is None else quantizer.args[0][1:]  # type: ignore[index]
        relu = x.target in _RELU and set(x.users) == {quantizer}
        relu = relu and (x.target is aten.relu.default or len(x.args[0].users) == 1)
        total = x.args[0] if relu else x
        terms = list(total.args) if relu and _is_sum(total, x) else [total]
        module = Int8Quantizer(
            self._site(quantizer),
            grid if varying is None else copy.deepcopy(varying),
            channels_last=isinstance(layers[first], Int8Conv2d),
            folded=self._folds(quantizer, first),
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


def _tensors(grid: Grid) -> list[Tensor]:
    """The tensors of a grid."""
    found: list[Tensor] = []
    grid.map(lambda p: found.append(p) or p)  # type: ignore[func-returns-value]
    return found


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


def _writes(user: Node, x: Node) -> bool:
    """Whether an operation changes x in place."""
    schema = getattr(user.target, "_schema", None)
    if schema is None:
        return False
    written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    given = dict(zip([a.name for a in schema.arguments], user.args, strict=False), **user.kwargs)
    return any(given.get(name) is x for name in written)


def _geometry(node: Node, codes: Tensor) -> Any:
    """(stride, padding, dilation, groups) of a convolution, () of a linear; or why it cannot be lowered."""
    if _LAYERS[node.target] != "conv2d":
        return ()
    stride, padding, dilation, groups = (*node.args[3:], *([1, 1], [0, 0], [1, 1], 1)[len(node.args) - 3 :])
    stride, dilation = ([v[0], v[-1]] for v in (stride, dilation))
    if padding == "valid":
        padding = [0, 0]
    elif padding == "same":
        reach = [d * (k - 1) for d, k in zip(dilation, codes.shape[2:], strict=True)]
        if any(r % 2 for r in reach):
            return "its padding differs between the sides"
        padding = [r // 2 for r in reach]
    return stride, [padding[0], padding[-1]], dilation, groups
