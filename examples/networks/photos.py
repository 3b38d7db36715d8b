"""Real photos that install with pip, for super-resolution and to compare a quantized ImageNet network.

scikit-learn brings two photos (china, flower), the scikit-image wheel a dozen more. The files are read from
the installed packages by path: ``skimage.data`` would go to the network for some of them. Their licences vary
(see ``skimage/data/README.txt``), so they are read where they lie and never copied into this repository.

The usual benchmarks (Set5, Set14, ImageNet) cannot be downloaded by pip; nothing here replicates a number on
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

_SCIKIT_IMAGE_FILES = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "chelsea": "chelsea.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "hubble": "hubble_deep_field.jpg",
    "immunohistochemistry": "ihc.png",
    "motorcycle": "motorcycle_left.png",
    "page": "page.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
}
_SCIKIT_LEARN_FILES = {"china": 0, "flower": 1}  # the order of load_sample_images().images

TRAIN_PHOTOS = (
    "china",
    "flower",
    "astronaut",
    "rocket",
    "coins",
    "brick",
    "grass",
    "gravel",
    "page",
    "immunohistochemistry",
)
TEST_PHOTOS = ("chelsea", "coffee", "camera", "motorcycle", "retina", "hubble")
OBJECT_PHOTOS = ("chelsea", "coffee", "astronaut", "rocket", "motorcycle", "china", "flower")
"""Photos of things ImageNet has classes for."""

_TEST_SIZE = 512  # retina and hubble have a million pixels: the middle is enough


@cache
def load_photo(name: str) -> Tensor:
    """Read one photo: (3, H, W) uint8, RGB; a grey photo has three equal channels.

    The tensor is cached and shared: do not write into it.

    Raises:
        ValueError: no photo has that name; the message lists those that do.
        ModuleNotFoundError: the package that brings the photo is not installed; the message names it.
    """
    if name in _SCIKIT_LEARN_FILES:
        try:
            from sklearn.datasets import load_sample_images
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{name!r} needs scikit-learn: pip install scikit-learn") from error
        pixels = torch.tensor(load_sample_images().images[_SCIKIT_LEARN_FILES[name]])
    elif name in _SCIKIT_IMAGE_FILES:
        try:
            import skimage
            from skimage.io import imread
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{name!r} needs scikit-image: pip install scikit-image") from error
        pixels = torch.tensor(imread(Path(skimage.__file__).parent / "data" / _SCIKIT_IMAGE_FILES[name]))
    else:
        valid = ", ".join(sorted([*_SCIKIT_LEARN_FILES, *_SCIKIT_IMAGE_FILES]))
        raise ValueError(f"no photo is called {name!r}; valid names: {valid}")
    if pixels.dim() == 2:
        pixels = pixels[..., None].expand(-1, -1, 3)
    return pixels[..., :3].permute(2, 0, 1).contiguous()


def luma(photo: Tensor) -> Tensor:
    """The Y of ITU-R BT.601 in full range: (3, H, W) uint8 -> (1, 1, H, W) float32 in [0, 1]."""
    weights = torch.tensor([0.299, 0.587, 0.114]) / 255
    return (photo.float() * weights[:, None, None]).sum(0)[None, None]


def super_resolution_pairs(names: Sequence[str], scale: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Luma images and what is left of them after downscaling (bicubic, antialiased, rounded to 8 bits).

    Args:
        names: photos, see ``TRAIN_PHOTOS`` and ``TEST_PHOTOS``; test photos are cut to their middle 512
            pixels.
        scale: the factor between the two sizes.

    Returns:
        One (low (1, 1, h, w), high (1, 1, scale * h, scale * w)) per name, float32 in [0, 1].
    """
    pairs = []
    for name in names:
        high = luma(load_photo(name))
        if name in TEST_PHOTOS:
            high = _middle(high, min(high.shape[2], _TEST_SIZE), min(high.shape[3], _TEST_SIZE))
        high = _middle(high, high.shape[2] // scale * scale, high.shape[3] // scale * scale)
        low = F.interpolate(high, scale_factor=1 / scale, mode="bicubic", align_corners=False, antialias=True)
        pairs.append(((low.clamp(0, 1) * 255).round() / 255, high))
    return pairs


def photo_crops(per_photo: int = 16, size: int = 224, seed: int = 0, names: Sequence[str] = OBJECT_PHOTOS) -> Tensor:
    """Random square crops of photos, resized (bicubic, antialiased), to compare networks on.

    A crop has 60 % to 100 % of the shorter side. The order is shuffled, so that any slice mixes the photos.

    Args:
        per_photo: crops of each photo.
        size: height and width of the result in pixels.
        seed: of places, sizes and order.
        names: of the photos; the default are the seven of things ImageNet has classes for.

    Returns:
        (len(names) * per_photo, 3, size, size) float32, RGB in 0..255.
    """
    generator = torch.Generator().manual_seed(seed)
    crops = []
    for name in names:
        photo = load_photo(name)[None].float()
        height, width = photo.shape[2:]
        shorter = min(height, width)
        for _ in range(per_photo):
            side = int(torch.randint(shorter * 6 // 10, shorter + 1, (), generator=generator))
            y = int(torch.randint(height - side + 1, (), generator=generator))
            x = int(torch.randint(width - side + 1, (), generator=generator))
            crop = photo[..., y : y + side, x : x + side]
            crops.append(F.interpolate(crop, size=size, mode="bicubic", align_corners=False, antialias=True))
    order = torch.randperm(len(crops), generator=generator)
    return torch.cat(crops)[order].clamp(0, 255)


def _middle(image: Tensor, height: int, width: int) -> Tensor:
    """The middle (height, width) of (..., H, W)."""
    y, x = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
    return image[..., y : y + height, x : x + width]
