"""Which layers can be computed in int8 exactly, and why others cannot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from dqa_plugins.operators import DEQUANTIZE

from .codes import byte_grid
from .facts import Facts, tensors, writes
from .layers import Int8Conv2d, Int8Layer, Int8Linear, engine
from .qparams import samples

aten = torch.ops.aten
LAYERS: dict[Any, str] = {
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


class Eligible(Facts):
    """Makes int8 layers of the nodes of a program."""

    def layer(self, node: Any) -> tuple[Int8Layer | None, str, str]:
        """The int8 layer of a node, the site in front of it, and why there is none."""
        x = node.args[0]
        if not isinstance(x, Node) or x not in self.seen:
            return None, "", "no quantizer in front of it"
        site, kind = self.site(x), LAYERS[node.target]
        if kind not in ("conv2d", "linear"):
            return None, site, f"no int8 kernel for {kind}"
        made = self._weight(node)
        if isinstance(made, str):
            return None, site, made
        codes, scale = made
        value, grid = self.seen[x]
        bias = self.constant(node.args[2]) if len(node.args) > 2 and node.args[2] is not None else None
        geometry = _geometry(node, codes)
        if isinstance(geometry, str):
            return None, site, geometry
        if len(node.args) > 2 and node.args[2] is not None and bias is None:
            return None, site, "its bias is computed"
        if value.dtype != torch.float32 or (value.ndim != 4 and kind == "conv2d"):
            return None, site, f"its input is {value.ndim}-dimensional {str(value.dtype).removeprefix('torch.')}"
        if any(writes(user, x) for user in x.users):
            return None, site, "what it reads is changed in place"
        reason = self._grid_reason(x, node, codes, geometry)
        if reason:
            return None, site, reason
        bias = torch.zeros(len(codes)) if bias is None else bias.clone()
        if grid.bias is not None and self.varies(x) is None:  # B' = B - W N
            weight = codes.float() * scale.reshape(-1, *[1] * (codes.ndim - 1))
            noise = grid.bias.reshape(-1).expand(value.shape[1 if kind == "conv2d" else -1])
            parts = noise.reshape(geometry[-1] if geometry else 1, -1).repeat_interleave(
                len(codes) // (geometry[-1] if geometry else 1), 0
            )
            bias -= (weight.flatten(2).sum(-1) if weight.ndim > 2 else weight).mul(parts).sum(1)
        if self.folds(x):
            scale = scale * grid.step.reshape(-1).repeat_interleave(len(codes) // grid.step.numel())
        name = self.name(node)
        if kind == "linear":
            return Int8Linear(codes, *self._with_batch_norm(node, scale, bias), name), site, ""
        tried = Int8Conv2d(codes, scale, bias, name, *geometry)
        if engine() == "onednn" and not all(tried.computed_right(value.shape, zero) for zero in (0, 1)):
            return None, site, "oneDNN computes this geometry wrongly"
        return Int8Conv2d(codes, *self._with_batch_norm(node, scale, bias), name, *geometry), site, ""

    def _weight(self, node: Any) -> tuple[Tensor, Tensor] | str:
        """Codes (int8) and scale (O,) of a layer's weight, or why it has none."""
        weight: Any = node.args[1]
        if getattr(weight, "target", None) is not DEQUANTIZE:
            return "its weight is float: quantize weights, too (weight_bits=8)"
        codes, scale, zero = (self.constant(a) for a in weight.args[:3])
        axis: Any
        axis, dtype = weight.args[3:]
        if codes is None or scale is None or zero is None or dtype != torch.float32:
            return "its weight is no float32 constant"
        if axis not in (None, 0) and axis % codes.ndim != 0:
            return f"the scales of its weight lie along axis {axis}, int8 kernels take one per output"
        shape = [-1] + [1] * (codes.ndim - 1)
        whole = codes.to(torch.int32) - zero.to(torch.int32).reshape(shape if zero.ndim else [])
        if int(whole.min()) < -128 or int(whole.max()) > 127:
            return "its weight is asymmetric: less the zero point the codes take more than 8 bits"
        return whole.to(torch.int8), scale.float().reshape(-1).expand(len(codes)).clone()

    def _grid_reason(self, quantizer: Any, node: Any, codes: Tensor, geometry: Any) -> str:
        """Why the grid of a quantizer does not fit a layer; "" if it does."""
        x, grid = self.seen[quantizer]
        conv = bool(geometry)
        constant = self.varies(quantizer) is None
        for part in tensors(grid):
            for axis in range(1, part.ndim):
                if part.shape[axis] > 1 and axis != (1 if conv else x.ndim - 1):
                    return "its quantizer has channels along another axis than the layer"
        noise = grid.bias is not None and bool(grid.bias.any())
        if noise and not constant:
            return "the noise of its quantizer depends on the sample"
        if noise and conv and any(geometry[1]):
            return "zero padding: the noise of its quantizer folds into the bias of layers without"
        for sample in samples(grid, len(x)):
            found = byte_grid(sample, folded=self.folds(quantizer))
            if isinstance(found, str):
                return found
        return ""

    def passes(self, quantizer: Any) -> bool:
        """Whether the pass can make what readers in float want."""
        x, grid = self.seen[quantizer]
        axes = {axis for p in tensors(grid) for axis in range(1, p.ndim) if p.shape[axis] > 1}
        if x.dtype != torch.float32 or axes - {1 if x.ndim == 4 else x.ndim - 1}:
            return False
        return not any(isinstance(byte_grid(sample), str) for sample in samples(grid, len(x)))

    def folds(self, quantizer: Any) -> bool:
        """Whether steps of channels go into the weight: all readers are depthwise convolutions."""
        grid = self.seen[quantizer][1]
        if grid.step.numel() == 1 or self.varies(quantizer) is not None or not isinstance(byte_grid(grid), str):
            return False
        return all(
            user.target is aten.conv2d.default and len(user.args) > 6 and user.args[6] == grid.step.numel()
            for user in quantizer.users
        )

    def _with_batch_norm(self, node: Any, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and bias of a layer and the batch norm that alone reads it, which leaves the graph."""
        users = list(node.users)
        if len(users) != 1 or users[0].target is not aten.batch_norm.default:
            return scale, bias
        norm = users[0]
        gain, offset, mean, variance = (self.constant(a) for a in norm.args[1:5])
        if norm.args[5] or mean is None or variance is None:
            return scale, bias
        factor = torch.rsqrt(variance + norm.args[7])
        if gain is not None:
            factor = factor * gain
        bias = (bias - mean) * factor
        norm.replace_all_uses_with(node)
        self.graph.erase_node(norm)
        return scale * factor, bias if offset is None else bias + offset


def _geometry(node: Any, codes: Tensor) -> Any:
    """(stride, padding, dilation, groups) of a convolution, () of a linear; or why it cannot be lowered."""
    if LAYERS[node.target] != "conv2d":
        return ()
    given: list[Any] = list(node.args[3:])
    stride, padding, dilation, groups = given + [[1, 1], [0, 0], [1, 1], 1][len(given) :]
    stride, dilation = ([v[0], v[-1]] for v in (stride, dilation))
    if padding == "valid":
        padding = [0, 0]
    elif padding == "same":
        reach = [d * (k - 1) for d, k in zip(dilation, codes.shape[2:], strict=True)]
        if any(r % 2 for r in reach):
            return "its padding differs between the sides"
        padding = [r // 2 for r in reach]
    return stride, [padding[0], padding[-1]], dilation, groups
