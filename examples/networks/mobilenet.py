"""A slim MobileNetV2 for 16-pixel digits: ReLU6, linear bottlenecks, residual additions.

Sandler et al., "MobileNetV2: inverted residuals and linear bottlenecks" (2018). What makes it worth
quantizing next to a ResNet: the additions sit on linear bottlenecks, so that the stored activations carry a
sign and unsigned codes do not apply to them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# expansion, channels, blocks, stride of the first block
_STAGES = ((1, 16, 1, 1), (6, 16, 3, 1), (6, 32, 3, 2), (6, 64, 3, 2))


class InvertedResidual(nn.Module):
    """Expand (1x1), filter each channel (3x3), project (1x1, linear); add the input where shapes agree.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the bottleneck at the output.
        stride: of the 3x3 convolution.
        expansion: the hidden channels are ``expansion * in_channels``; 1 leaves the first convolution out.

    Shapes: (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = expansion * in_channels
        self.expands = expansion != 1
        self.residual = stride == 1 and in_channels == out_channels
        if self.expands:
            self.conv1 = nn.Conv2d(in_channels, hidden, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(hidden)
            self.relu1 = nn.ReLU6()
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.relu2 = nn.ReLU6()
        self.conv3 = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x))) if self.expands else x
        y = self.relu2(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """Ten inverted residuals between a 3x3 stem and a 1x1 head.

    Args:
        in_channels: channels of the image.
        classes: number of outputs.
        head_channels: channels before the pooling.

    Shapes: (N, in_channels, H, W) -> (N, classes) logits; any H and W of at least 4.
    """

    def __init__(self, in_channels: int = 1, classes: int = 10, head_channels: int = 160) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu1 = nn.ReLU6()
        blocks: list[nn.Module] = []
        channels = 16
        for expansion, stage_channels, count, stride in _STAGES:
            for block_stride in [stride] + [1] * (count - 1):
                blocks.append(InvertedResidual(channels, stage_channels, block_stride, expansion))
                channels = stage_channels
        self.blocks = nn.Sequential(*blocks)
        self.conv2 = nn.Conv2d(channels, head_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(head_channels)
        self.relu2 = nn.ReLU6()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(head_channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.blocks(x)
        x = self.relu2(self.bn2(self.conv2(x)))
        return self.fc(torch.flatten(self.pool(x), 1))


def mobilenetv2() -> MobileNetV2:
    """The network whose weights are shipped."""
    return MobileNetV2()
