"""ESPCN: super-resolution that works at the low resolution and shuffles channels into pixels at the end.

Shi et al., "Real-time single image and video super-resolution using an efficient sub-pixel convolutional
neural network" (2016), with ReLU, 64 and 32 channels. Departure: the convolutions predict what bicubic
interpolation lacks, instead of the whole image.

torch.ao (2.13) has no quantized bicubic kernel: after a plain ``prepare_fx`` and ``convert_fx``, running the
model raises ``Could not run 'aten::upsample_bicubic2d.out' ... 'QuantizedCPU'``. Keep that call in floating
point there.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class ESPCN(nn.Module):
    """Upscale a luma image.

    Args:
        scale: factor r of height and width.
        width: channels of the first layer; the second has half as many.

    Shapes: (N, 1, H, W) in [0, 1] -> (N, 1, r * H, r * W), not clamped to [0, 1].
    """

    def __init__(self, scale: int = 2, width: int = 64) -> None:
        super().__init__()
        self.scale = scale
        self.conv1 = nn.Conv2d(1, width, 5, padding=2)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width // 2, 3, padding=1)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width // 2, scale * scale, 3, padding=1)
        self.shuffle = nn.PixelShuffle(scale)
        nn.init.zeros_(self.conv3.weight)  # training starts at bicubic
        nn.init.zeros_(self.conv3.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        bicubic = F.interpolate(x, scale_factor=self.scale, mode="bicubic", align_corners=False)
        y = self.relu1(self.conv1(x))
        y = self.relu2(self.conv2(y))
        return bicubic + self.shuffle(self.conv3(y))


def espcn() -> ESPCN:
    """The network whose weights are shipped: twice the pixels on each side."""
    return ESPCN(scale=2)
