"""Segmentation networks of segmentation-models-pytorch, on a ResNet-18."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .entry import Entry, prepare_torchvision


def decoder(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A function that builds a network of three classes with random weights."""

    def build() -> nn.Module:
        prepare_torchvision()
        import segmentation_models_pytorch as smp

        network: nn.Module = getattr(smp, name)("resnet18", encoder_weights=None, classes=3, **options)
        return network

    return build


def _entry(name: str, **options: Any) -> Entry:
    return Entry("segmentation", "segmentation-models-pytorch", decoder(name, **options))


SHALLOW: dict[str, Any] = {"encoder_depth": 3, "decoder_channels": (64, 32, 16)}

ENTRIES = {
    "smp_unet": _entry("Unet", **SHALLOW),
    "smp_unet_plus_plus": _entry("UnetPlusPlus", **SHALLOW),
    "smp_linknet": _entry("Linknet", encoder_depth=3),
    "smp_fpn": _entry("FPN", decoder_pyramid_channels=32),
    "smp_pspnet": _entry("PSPNet", psp_out_channels=64),
}
