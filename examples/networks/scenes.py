"""Scenes for segmentation: digits pasted at random places on a cluttered background, with a label per pixel.

A stand-in for Cityscapes, made from scikit-learn's digits: scenes of the two parts are pasted from the
training and the test digits of ``digits.load_split()``, so that a network is tested on handwriting it never
saw. The seed fixes every scene, bit for bit.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.networks import digits

SIZE = 48
CLASSES = 11  # 0 is the background, 1 + d the digit d
INK = 0.35  # grey level from which a pixel belongs to its digit
_DIGITS_PER_SCENE = 4
_GLYPH_SIZES = (14, 16, 18, 20, 22)


def digit_scenes(
    count: int, *, size: int = SIZE, seed: int = 0, part: Literal["train", "test"] = "train"
) -> tuple[Tensor, Tensor]:
    """Paste up to four digits into each scene; a later one covers an earlier one.

    The background is smooth noise of grey levels 0 to 0.5, all of it under weak pixel noise, so that no
    threshold finds the digits.

    Args:
        count: N, number of scenes.
        size: height and width in pixels, at least 22.
        seed: of everything.
        part: which digits are pasted.

    Returns:
        images: (N, 1, size, size) float32, normalised like the digits.
        labels: (N, size, size) int64; 0 background, 1 + d where the ink of digit d is.

    Raises:
        ValueError: ``size`` is too small for a digit, or ``part`` is unknown.
    """
    if size < max(_GLYPH_SIZES):
        raise ValueError(f"size must be at least {max(_GLYPH_SIZES)}, got {size}")
    if part not in ("train", "test"):
        raise ValueError(f"part must be 'train' or 'test', got {part!r}")
    split = digits.load_split()
    glyphs = split.train_images if part == "train" else split.test_images
    names = split.train_labels if part == "train" else split.test_labels
    glyphs = glyphs * digits.STD + digits.MEAN
    sizes = [F.interpolate(glyphs, size=side, mode="bilinear", align_corners=False) for side in _GLYPH_SIZES]

    generator = torch.Generator().manual_seed(seed)

    def draw(stop: int) -> int:
        return int(torch.randint(stop, (), generator=generator))

    coarse = torch.rand(count, 1, size // 8, size // 8, generator=generator) * 0.5
    images = F.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
    labels = torch.zeros(count, size, size, dtype=torch.int64)
    for scene in range(count):
        for _ in range(1 + draw(_DIGITS_PER_SCENE)):
            which = draw(len(glyphs))
            glyph = sizes[draw(len(sizes))][which, 0]
            side = len(glyph)
            y, x = draw(size - side + 1), draw(size - side + 1)
            place = (slice(y, y + side), slice(x, x + side))
            images[scene, 0][place] = torch.maximum(images[scene, 0][place] * (1 - glyph), glyph)
            labels[scene][place] = torch.where(glyph > INK, 1 + names[which], labels[scene][place])
    images = images + 0.05 * torch.randn(images.shape, generator=generator)
    return (images - digits.MEAN) / digits.STD, labels
