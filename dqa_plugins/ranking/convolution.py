"""Convolutions that add and rectify in the same pass, for the copy of the model that evaluates stacked candidates.

A 3x3 convolution with stride 1 goes by Winograd's algorithm (`kernels.winograd`); any other by oneDNN with a weight in
oneDNN's own layout, which it then need not convert in every call. Both sum in an order of their own: their results
differ from those of `nn.Conv2d` by about 1e-7 of the largest.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

WORKING_SET = 2**19  # bytes of the transformed tiles that are worked on together: half of the second-level cache
THREADS = 4  # with more, the part of Winograd's algorithm that runs in one thread costs what its products save

_onednn: Any = torch.ops.mkldnn


class Convolution(Protocol):
    """A convolution and what follows it."""

    def __call__(self, x: Tensor, addend: Tensor | None, relu: bool) -> Tensor:
        """relu(conv(x) + addend), either of which can be left out.

        Args:
            x: (N, C, H, W) float32 on the CPU.
            addend: of the output's shape and dtype, or None.
            relu: whether negative values become 0.

        Returns:
            a new tensor, (N, O, H', W') in channels-last format.
        """


class Winograd:
    """A convolution by Winograd's algorithm, F(4x4, 3x3).

    Args:
        conv: one that `winograd_fits`.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        from ..kernels import lanes, winograd

        self._kernels = winograd
        transform = torch.from_numpy(winograd.weight_transform())
        weight = torch.einsum("ai,ocij,bj->abco", transform, conv.weight.detach().double(), transform)
        self.weight = weight.flatten(0, 1).float().contiguous()
        self.bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach().contiguous()
        self.pad_y, self.pad_x = _pair(conv.padding)
        self._scratch = torch.empty(0)
        self._compiled = lanes.wide()  # else products are the library's, which are faster

    def __call__(self, x: Tensor, addend: Tensor | None, relu: bool) -> Tensor:
        points, channels, outputs = self.weight.shape
        batch, _, height, width = x.shape
        high, wide = height + 2 * self.pad_y - 2, width + 2 * self.pad_x - 2
        source = x.permute(0, 2, 3, 1).contiguous()
        result = torch.empty(batch, high, wide, outputs)
        added = result if addend is None else addend.permute(0, 2, 3, 1).contiguous()
        size, group = self._kernels.TILE, self._kernels.GROUP
        total = batch * -(-high // size) * -(-wide // size)
        # tiles at a time; more where the weight does not stay in the cache from one time to the next
        fitting = WORKING_SET // (4 * points * (channels + outputs))
        step = max(fitting, 1 if self.weight.numel() * 4 <= 2 * WORKING_SET else 4 * group)
        step = -(-min(max(step // group, 1) * group, total) // group) * group
        planes = step * channels + 16, step * outputs + 16
        if len(self._scratch) < points * sum(planes):
            self._scratch = torch.zeros(points * sum(planes))
        left, right = self._scratch.split_with_sizes([points * planes[0], len(self._scratch) - points * planes[0]])
        x_, y_, addend_ = _flat(source), _flat(result), _flat(added)
        shape, padding = (height, width, channels), (self.pad_y, self.pad_x)
        rest = _flat(self.bias), addend_, addend is not None, relu, y_
        if self._compiled:
            weight = _flat(self.weight)
            self._kernels.convolve(
                x_, batch, *shape, *padding, weight, outputs, *rest, _flat(left), _flat(right), step
            )  # fmt: skip
            return result.permute(0, 3, 1, 2)
        for first in range(0, total, step):
            tiles = min(step, total - first)
            self._kernels.spread(x_, first, tiles, *shape, *padding, _flat(left), planes[0])
            factor = left.as_strided((points, tiles, channels), (planes[0], channels, 1))
            product = torch.bmm(factor, self.weight)
            self._kernels.collect(_flat(product), tiles * outputs, first, tiles, high, wide, outputs, *rest)
        return result.permute(0, 3, 1, 2)


class Packed:
    """A convolution by oneDNN, with its weight in oneDNN's layout.

    Args:
        conv: with zeros as padding, float32 on the CPU.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        self.conv, self.weight = conv, conv.weight.detach()
        self.settings = (list(_pair(conv.padding)), list(conv.stride), list(conv.dilation), conv.groups)
        self._packed: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, x: Tensor, addend: Tensor | None, relu: bool) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        shape = tuple(x.shape[1:])
        weight = self._packed.get(shape)
        if weight is None:
            weight = _onednn._reorder_convolution_weight(self.weight, *self.settings, list(x.shape))
            self._packed[shape] = weight
        unary = "relu" if relu else "none"
        if addend is None:
            return _onednn._convolution_pointwise(x, weight, self.conv.bias, *self.settings, unary, [], "")
        addend = addend.contiguous(memory_format=torch.channels_last)
        return _onednn._convolution_pointwise.binary(
            x, addend, weight, self.conv.bias, *self.settings, "add", None, "relu" if relu else None, [], None
        )


def convolution(conv: nn.Module) -> Convolution | None:
    """The fastest of the above that computes what `conv` does; None where there is none."""
    if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return None
    if conv.weight.device.type != "cpu" or conv.weight.dtype != torch.float32:
        return None
    if conv._forward_hooks or conv._forward_pre_hooks:
        return None
    if winograd_fits(conv):
        try:
            return Winograd(conv)
        except ImportError:  # numba does not run here
            pass
    packable = torch.backends.mkldnn.is_available() and hasattr(_onednn, "_reorder_convolution_weight")
    return Packed(conv) if packable and hasattr(_onednn, "_convolution_pointwise") else None


def winograd_fits(conv: nn.Conv2d) -> bool:
    """Whether Winograd's algorithm applies, and pays."""
    applies = conv.kernel_size == (3, 3) and conv.stride == (1, 1) and conv.dilation == (1, 1) and conv.groups == 1
    lanes = conv.in_channels % 16 == 0 and conv.out_channels % 16 == 0
    return applies and lanes and torch.get_num_threads() <= THREADS


def _flat(x: Tensor) -> Any:
    return x.view(-1).numpy()


def _pair(padding: str | tuple[int, ...]) -> tuple[int, int]:
    if isinstance(padding, str):
        raise TypeError(f"padding={padding!r}: two numbers are needed")
    return padding[0], padding[1]
