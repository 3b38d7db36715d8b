"""scikit-learn's handwritten digits, as a small classification task that installs with pip.

``load_digits`` holds 1797 real digits of 8 x 8 pixels (UCI, BSD licence with scikit-learn). They are
upsampled to 16 pixels, so that a CIFAR-style network with two strides fits, and split once into 1000 for
training and 797 for testing. This is a stand-in: no number measured on it replicates a paper's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

SIZE = 16
TRAIN_COUNT = 1000
TEST_COUNT = 797
CLASSES = 10
# Grey levels in [0, 1]: about the mean and standard deviation of the upsampled set.
MEAN = 0.30
STD = 0.37


@dataclass(frozen=True)
class DigitsSplit:
    """Normalised images and labels.

    Attributes:
        train_images: (1000, 1, size, size) float32, ``(grey - MEAN) / STD`` with grey in [0, 1].
        train_labels: (1000,) int64 in 0..9.
        test_images: (797, 1, size, size) float32, likewise.
        test_labels: (797,) int64 in 0..9.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_split(size: int = SIZE, seed: int = 0) -> DigitsSplit:
    """Load the digits, upsample them bilinearly, normalise them and split them 1000 / 797.

    Args:
        size: height and width in pixels.
        seed: of the permutation before the split. The shipped weights were trained with seed 0: another seed
            moves training digits into the test part.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed; the message names the package.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the digits need scikit-learn: pip install scikit-learn") from error
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16  # the data set counts 0..16
    images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
    images = (images - MEAN) / STD
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = order[:TRAIN_COUNT], order[TRAIN_COUNT:]
    return DigitsSplit(images[train], labels[train], images[test], labels[test])


def calibration_subset(split: DigitsSplit, count: int = 256, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw ``count`` different training images, to calibrate or to rank channels with.

    Returns:
        images: (count, 1, size, size) float32; labels: (count,) int64. Never an image of the test part.

    Raises:
        ValueError: ``count`` is not in 1..1000.
    """
    available = len(split.train_images)
    if not 1 <= count <= available:
        raise ValueError(f"count must lie in 1..{available} (the training images), got {count}")
    chosen = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:count]
    return split.train_images[chosen], split.train_labels[chosen]


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, scale and shift each image on its own, as training does.

    Rotation up to 0.25 rad, scale within 12.5 %, shift within 15 % of half the width; borders are repeated.

    Args:
        images: (N, C, H, W) float.
        generator: source of every random number.

    Returns:
        (N, C, H, W), the same dtype.
    """
    count = len(images)
    angle, zoom = (torch.rand(2, count, generator=generator) - 0.5).unbind()
    angle = angle * 0.5
    scale = 1 + zoom * 0.25
    shift = (torch.rand(count, 2, generator=generator) - 0.5) * 0.3
    cosine, sine = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = (torch.stack([cosine, -sine, shift[:, 0]], 1), torch.stack([sine, cosine, shift[:, 1]], 1))
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid.to(images.dtype), padding_mode="border", align_corners=False)


def batches(images: Tensor, labels: Tensor, size: int = 128) -> list[tuple[Tensor, Tensor]]:
    """Cut images and labels into ``ceil(N / size)`` batches, in order; the last may be smaller."""
    count = math.ceil(len(images) / size)
    return [(images[i * size : (i + 1) * size], labels[i * size : (i + 1) * size]) for i in range(count)]
