"""Networks of the QPP paper that others wrote: ResNet-18 and -34 of torchvision, HRNet of timm with its head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.zoo.entry import prepare_torchvision


def torchvision_resnet(name: str, *, trained: bool = True) -> nn.Module:
    """ResNet-18 or -34 with torchvision's own ImageNet weights, the ones that papers quantize.

    Args:
        name: "resnet18" or "resnet34".
        trained: load the weights; torchvision takes them from its cache or downloads them.

    Raises:
        ModuleNotFoundError: torchvision is not installed (the extra `zoo`).
    """
    prepare_torchvision()
    from torchvision.models import get_model

    model: nn.Module = get_model(name, weights="IMAGENET1K_V1" if trained else None)
    return model.eval()


class HRNetSegmentation(nn.Module):
    """HRNetV2-W18 with the head of its authors: four resolutions, upsampled and joined, then two 1x1 convolutions.

    Args:
        classes: of the pixels.

    Raises:
        ModuleNotFoundError: timm is not installed (the extra `zoo`).
    """

    def __init__(self, classes: int = 19) -> None:
        super().__init__()
        prepare_torchvision()  # timm imports it
        import timm

        # branch features of the last stage, without the classification head
        self.backbone = timm.create_model(
            "hrnet_w18", pretrained=False, features_only=True, feature_location="", out_indices=(1, 2, 3, 4)
        )
        width = sum(self.backbone.feature_info.channels())
        self.conv, self.norm, self.act = nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.ReLU()
        self.classifier = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, classes, H, W); H and W are multiples of 32."""
        features = self.backbone(x)
        finest = [features[0]]
        for scale, feature in zip((2, 4, 8), features[1:], strict=True):
            finest.append(F.interpolate(feature, scale_factor=float(scale), mode="bilinear", align_corners=False))
        y = self.classifier(self.act(self.norm(self.conv(torch.cat(finest, 1)))))
        return F.interpolate(y, scale_factor=4.0, mode="bilinear", align_corners=False)
