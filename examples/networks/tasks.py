"""What each network is trained for: where a batch comes from, what the loss is, what the score is.

A task knows nothing of optimizers or networks; ``training.py`` knows nothing of data. ``digits.py``,
``scenes.py`` and ``photos.py`` hold the data themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.networks import digits, photos, scenes, scores

Batch = tuple[Tensor, Tensor]


class Task(Protocol):
    """What ``train`` asks of a task."""

    metric: str
    """Name of the score, with its unit; higher is better."""

    def steps(self, batch_size: int) -> int:
        """Batches in one epoch."""

    def epoch(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Yield ``steps(batch_size)`` training batches of (inputs, targets)."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The scalar to be minimised."""

    def score(self, model: nn.Module) -> float:
        """Score of a model in eval mode on data that training never sees."""


class DigitClassification:
    """Ten classes of digits: images (N, 1, 16, 16) -> labels (N,); augmented, cross-entropy, accuracy."""

    metric = "accuracy_percent"

    def __init__(self) -> None:
        self.split = digits.load_split()

    def steps(self, batch_size: int) -> int:
        return -(-len(self.split.train_images) // batch_size)

    def epoch(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        order = torch.randperm(len(self.split.train_images), generator=generator)
        for chosen in order.split(batch_size):
            images = digits.augment(self.split.train_images[chosen], generator)
            yield images, self.split.train_labels[chosen]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)

    def score(self, model: nn.Module) -> float:
        return scores.accuracy(model, self.split.test_images, self.split.test_labels)


class SceneSegmentation:
    """Which digit is at each pixel: scenes (N, 1, 48, 48) -> labels (N, 48, 48); cross-entropy, mean IoU.

    The background, 86 % of the pixels, has a fifth of the weight in the loss: at full weight the ink is found
    long before the digits are told apart.
    """

    metric = "mean_iou_percent"
    background_weight = 0.2

    def __init__(self, train_count: int = 1500, test_count: int = 200) -> None:
        self.train = scenes.digit_scenes(train_count, seed=0, part="train")
        self.test = scenes.digit_scenes(test_count, seed=1, part="test")

    def steps(self, batch_size: int) -> int:
        return -(-len(self.train[0]) // batch_size)

    def epoch(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        order = torch.randperm(len(self.train[0]), generator=generator)
        for chosen in order.split(batch_size):
            yield self.train[0][chosen], self.train[1][chosen]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        weights = torch.ones(scenes.CLASSES)
        weights[0] = self.background_weight
        return F.cross_entropy(outputs, targets, weights)

    def score(self, model: nn.Module) -> float:
        return scores.mean_iou(model, *self.test, classes=scenes.CLASSES)


class SuperResolution:
    """Twice the pixels: luma patches (N, 1, 24, 24) -> (N, 1, 48, 48); L1 loss, PSNR on whole photos."""

    metric = "psnr_db"

    def __init__(self, scale: int = 2, patch: int = 24, steps_per_epoch: int = 100) -> None:
        self.scale = scale
        self.patch = patch
        self.steps_per_epoch = steps_per_epoch
        self.train = photos.super_resolution_pairs(photos.TRAIN_PHOTOS, scale)
        self.test = photos.super_resolution_pairs(photos.TEST_PHOTOS, scale)

    def steps(self, batch_size: int) -> int:
        return self.steps_per_epoch

    def epoch(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        for _ in range(self.steps_per_epoch):
            patches = [self._patch(generator) for _ in range(batch_size)]
            yield torch.cat([low for low, _ in patches]), torch.cat([high for _, high in patches])

    def _patch(self, generator: torch.Generator) -> Batch:
        """One random patch of one random photo, flipped and transposed at random."""
        low, high = self.train[_randint(len(self.train), generator)]
        size, scale = self.patch, self.scale
        y = _randint(low.shape[2] - size + 1, generator)
        x = _randint(low.shape[3] - size + 1, generator)
        low = low[..., y : y + size, x : x + size]
        high = high[..., y * scale : (y + size) * scale, x * scale : (x + size) * scale]
        if _randint(2, generator):
            low, high = low.flip(2), high.flip(2)
        if _randint(2, generator):
            low, high = low.transpose(2, 3), high.transpose(2, 3)
        return low, high

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.l1_loss(outputs, targets)

    def score(self, model: nn.Module) -> float:
        return scores.psnr(model, self.test, border=self.scale)


def _randint(stop: int, generator: torch.Generator) -> int:
    return int(torch.randint(stop, (), generator=generator))
