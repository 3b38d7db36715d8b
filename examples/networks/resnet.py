"""CIFAR-style ResNet of depth 6n + 2 with parameter-free shortcuts, the network of the DQA paper's tables.

He et al., "Deep residual learning for image recognition" (2016), section 4.2: three groups of n blocks with
16, 32 and 64 channels, 3x3 convolutions, option-A shortcuts (subsample, then pad the channels with zeros).

Two requirements shape this file:

* ``torch.fx.symbolic_trace`` and plain ``prepare_fx`` take it as it is. Every convolution, batch norm and
  ReLU is a module of its own, in that order, so that conv + bn + relu fuse; pads and strides are Python
  numbers, so that no shape is read while tracing.
* No module is called twice. A ReLU shared by two places would give both places one quantizer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SubsampleShortcut(nn.Module):
    """Option A: every second pixel, then zero channels on both sides. It has no parameters.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, at least ``in_channels``.
        stride: 1 or 2, the step of the subsampling.

    Shapes: (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        missing = out_channels - in_channels
        if missing < 0:
            raise ValueError(f"a shortcut cannot drop channels: {in_channels} -> {out_channels}")
        self.stride = stride
        self.front = missing // 2
        self.back = missing - self.front

    def forward(self, x: Tensor) -> Tensor:
        kept = x[:, :, :: self.stride, :: self.stride]
        return F.pad(kept, (0, 0, 0, 0, self.front, self.back))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: ``relu2(bn2(conv2(relu1(bn1(conv1(x))))) + shortcut(x))``.

    Shapes: (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = SubsampleShortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu2(y + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet for small images, depth ``6 * blocks_per_group + 2``.

    Args:
        blocks_per_group: n; 5 gives ResNet-32 (0.46 M parameters), 3 ResNet-20 (0.27 M).
        in_channels: channels of the image; 1 for the digits, 3 for CIFAR.
        classes: number of outputs.
        width: channels of the first group; the others have twice and four times as many.

    Shapes: (N, in_channels, H, W) -> (N, classes) logits; any H and W of at least 4.
    """

    def __init__(
        self,
        blocks_per_group: int = 5,
        in_channels: int = 1,
        classes: int = 10,
        width: int = 16,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        blocks: list[nn.Module] = []
        channels = width
        for group, group_width in enumerate((width, 2 * width, 4 * width)):
            for index in range(blocks_per_group):
                stride = 2 if group > 0 and index == 0 else 1
                blocks.append(BasicBlock(channels, group_width, stride))
                channels = group_width
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.pool(self.blocks(x))
        return self.fc(torch.flatten(x, 1))


def resnet32(in_channels: int = 1, classes: int = 10) -> ResNet:
    """ResNet-32 as in the DQA paper: 15 blocks, 0.46 M parameters."""
    return ResNet(5, in_channels, classes)


def resnet20(in_channels: int = 1, classes: int = 10) -> ResNet:
    """ResNet-20: 9 blocks, 0.27 M parameters."""
    return ResNet(3, in_channels, classes)
