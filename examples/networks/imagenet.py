"""ResNet-18 and MobileNetV2 in the geometry of ImageNet, with random weights: for timing, which needs no others."""

from __future__ import annotations

import torch
from torch import nn

from .mobilenet import InvertedResidual
from .resnet import BasicBlock

# expansion, channels, blocks, stride of the first one (Sandler et al., 2018, table 2)
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def _convolution(inputs: int, outputs: int, kernel: int, stride: int, activation: nn.Module | None) -> nn.Sequential:
    layers = [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([] if activation is None else [activation]))


def _head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)]


def resnet18() -> nn.Sequential:
    """(N, 3, H, W) to (N, 1000): 11.7 M parameters."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [_convolution(3, 64, 7, 2, nn.ReLU()), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for width, stride in ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)):
        block = BasicBlock(channels, width, stride)
        if stride > 1:
            block.shortcut = _convolution(channels, width, 1, stride, None)
        layers.append(block)
        channels = width
    return nn.Sequential(*layers, *_head(channels)).eval()


def mobilenetv2() -> nn.Sequential:
    """(N, 3, H, W) to (N, 1000): 3.5 M parameters."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [_convolution(3, 32, 3, 2, nn.ReLU6())]
    channels = 32
    for expansion, width, blocks, first in _STAGES:
        for index in range(blocks):
            layers.append(InvertedResidual(channels, width, first if index == 0 else 1, expansion))
            channels = width
    layers.append(_convolution(channels, 1280, 1, 1, nn.ReLU6()))
    return nn.Sequential(*layers, *_head(1280)).eval()
