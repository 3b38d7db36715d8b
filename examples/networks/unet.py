"""U-Net: an encoder, a decoder, and skips that stay in memory while everything between them runs.

Ronneberger et al., "U-Net: convolutional networks for biomedical image segmentation" (2015), with padded
convolutions and batch norm. The skips are the stored activations the DQA paper is about; they wait the
longer, the larger they are.

The sizes are fixed by the caller (multiples of ``2 ** depth``), so that no shape is read in ``forward`` and
the network can be traced.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DoubleConv(nn.Module):
    """Two times conv 3x3, batch norm, ReLU: (N, in_channels, H, W) -> (N, out_channels, H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(x)))


class UNet(nn.Module):
    """U-Net of ``depth`` levels.

    Args:
        in_channels: channels of the image.
        classes: channels of the output.
        width: channels of the first level; they double at each level down.
        depth: number of levels with a skip.

    Shapes: (N, in_channels, H, W) -> (N, classes, H, W) logits; H and W multiples of ``2 ** depth``.

    Names: ``down.<k>`` makes skip k, ``up.<k>`` brings the decoder to its size, ``merge.<k>`` joins them.
    """

    def __init__(self, in_channels: int = 1, classes: int = 11, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        widths = [width << level for level in range(depth + 1)]
        inputs = [in_channels, *widths[:-1]]
        self.down = nn.ModuleList(DoubleConv(inputs[k], widths[k]) for k in range(depth))
        self.pool = nn.ModuleList(nn.MaxPool2d(2) for _ in range(depth))
        self.bottom = DoubleConv(inputs[depth], widths[depth])
        self.up = nn.ModuleList(nn.ConvTranspose2d(widths[k + 1], widths[k], 2, 2) for k in range(depth))
        self.merge = nn.ModuleList(DoubleConv(2 * widths[k], widths[k]) for k in range(depth))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down, pool in zip(self.down, self.pool, strict=True):
            x = down(x)
            skips.append(x)
            x = pool(x)
        x = self.bottom(x)
        for level in reversed(range(len(skips))):
            x = self.merge[level](torch.cat([self.up[level](x), skips[level]], 1))
        return self.head(x)


def unet() -> UNet:
    """The network whose weights are shipped: eleven classes (background and ten digits), 48-pixel scenes."""
    return UNet()
