"""Networks of torchvision: convolutional ones, backbones and heads of detectors, segmentation, video, transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .entry import Entry, Part, prepare_torchvision


def models() -> Any:
    """torchvision.models."""
    prepare_torchvision()
    import torchvision.models.detection

    return torchvision.models


def plain(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A function that builds a classifier of ten classes."""
    return lambda: getattr(models(), name)(num_classes=10, **options)


def _resnet(block: str, *, groups: int = 1, width: int = 64) -> nn.Module:
    resnet = models().resnet
    return resnet.ResNet(getattr(resnet, block), [1, 1, 1, 1], 10, groups=groups, width_per_group=width)


def _densenet() -> nn.Module:
    return models().DenseNet(growth_rate=16, block_config=(3, 3, 3), num_init_features=32, num_classes=10)


def _convnext() -> nn.Module:
    convnext = models().convnext
    blocks = [convnext.CNBlockConfig(24, 48, 2), convnext.CNBlockConfig(48, 96, 2), convnext.CNBlockConfig(96, None, 1)]
    return convnext.ConvNeXt(blocks, num_classes=10)


def _vit() -> nn.Module:
    return models().VisionTransformer(64, 8, 3, 4, 64, 128, num_classes=10)


def _swin(version: int) -> nn.Module:
    swin = models().swin_transformer
    block, merging = (
        (swin.SwinTransformerBlock, swin.PatchMerging)
        if version == 1
        else (swin.SwinTransformerBlockV2, swin.PatchMergingV2)
    )
    shape: dict[str, Any] = {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}
    return swin.SwinTransformer([4, 4], num_classes=10, block=block, downsample_layer=merging, **shape)


def _maxvit() -> nn.Module:
    return models().MaxVit((64, 64), 16, 4, [16, 32], [1, 1], 8, 0.0, num_classes=10)


def _features(layers: dict[str, str]) -> nn.Module:
    from torchvision.models._utils import IntermediateLayerGetter

    return IntermediateLayerGetter(models().resnet18(), return_layers=layers)


def _out(result: Any) -> Any:
    return result["out"]


def _fcn() -> nn.Module:
    segmentation = models().segmentation
    network = segmentation.FCN(_features({"layer4": "out"}), segmentation.fcn.FCNHead(512, 8))
    return Part(network, _out)


def _lraspp() -> nn.Module:
    network = models().segmentation.lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=8)
    return Part(network, _out)


class _Detector(nn.Module):
    """A feature pyramid and a head on its levels, without the boxes' post-processing."""

    def __init__(self, head: Callable[[int], nn.Module]) -> None:
        super().__init__()
        from torchvision.ops import FeaturePyramidNetwork

        self.body = _features({"layer2": "0", "layer3": "1", "layer4": "2"})
        self.pyramid, self.head = FeaturePyramidNetwork([128, 256, 512], 32), head(32)

    def forward(self, x: Any) -> Any:
        levels = list(self.pyramid(self.body(x)).values())
        found = self.head(levels)
        return tuple(found.values()) if isinstance(found, dict) else tuple(part for parts in found for part in parts)


def _rpn(channels: int) -> nn.Module:
    return models().detection.rpn.RPNHead(channels, 3)


def _retina(channels: int) -> nn.Module:
    return models().detection.retinanet.RetinaNetHead(channels, 3, 5)


class _Ssd(nn.Module):
    """A VGG backbone and SSD's head on three of its levels."""

    def __init__(self) -> None:
        super().__init__()
        features = models().vgg11_bn().features
        self.first, self.second, self.third = features[:14], features[14:21], features[21:]
        self.head = models().detection.ssd.SSDHead([256, 512, 512], [4, 4, 4], 5)

    def forward(self, x: Any) -> Any:
        first = self.first(x)
        second = self.second(first)
        return tuple(self.head([first, second, self.third(second)]).values())


def _video(convolution: str) -> nn.Module:
    resnet = models().video.resnet
    stem = resnet.R2Plus1dStem if convolution == "Conv2Plus1D" else resnet.BasicStem
    return resnet.VideoResNet(resnet.BasicBlock, [getattr(resnet, convolution)] * 4, [1, 1, 1, 1], stem, num_classes=10)


def _entry(family: str, build: Callable[[], nn.Module], **options: Any) -> Entry:
    return Entry(family, "torchvision", build, **options)


ENTRIES = {
    "resnet18": _entry("cnn", plain("resnet18")),
    "resnet_bottleneck": _entry("cnn", lambda: _resnet("Bottleneck")),
    "resnext": _entry("cnn", lambda: _resnet("Bottleneck", groups=8, width=8)),
    "densenet": _entry("cnn", _densenet),
    "squeezenet": _entry("cnn", plain("squeezenet1_1")),
    "mobilenet_v2": _entry("cnn", plain("mobilenet_v2", width_mult=0.5)),
    "mobilenet_v3_small": _entry("cnn", plain("mobilenet_v3_small")),
    "shufflenet_v2": _entry("cnn", plain("shufflenet_v2_x0_5")),
    "efficientnet_b0": _entry("cnn", plain("efficientnet_b0")),
    "convnext": _entry("cnn", _convnext),
    "tv_vit": _entry("vision transformer", _vit),
    "swin": _entry("vision transformer", lambda: _swin(1)),
    "swin_v2": _entry("vision transformer", lambda: _swin(2)),
    "maxvit": _entry("vision transformer", _maxvit),
    "fcn_resnet18": _entry("segmentation", _fcn),
    "lraspp_mobilenet_v3": _entry("segmentation", _lraspp),
    "fpn_rpn_head": _entry("detection", lambda: _Detector(_rpn)),
    "retinanet_head": _entry("detection", lambda: _Detector(_retina)),
    "ssd_vgg11": _entry("detection", _Ssd),
    "r3d": _entry("video", lambda: _video("Conv3DSimple"), shape=(3, 6, 32, 32), batch=2),
    "r2plus1d": _entry("video", lambda: _video("Conv2Plus1D"), shape=(3, 6, 32, 32), batch=2),
}
