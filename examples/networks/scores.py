"""The score of each task: accuracy, mean intersection over union, PSNR.

None of these functions calls ``model.eval()``: modules from ``torch.export`` (PT2E) raise there, and a
quantized model's state must not depend on who measures it. Give them a model that is already in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Model = Callable[[Tensor], Tensor]


@torch.no_grad()
def predict(model: Model, inputs: Tensor, batch_size: int = 128) -> Tensor:
    """Run the model batch by batch and put the outputs together: (N, ...) -> (N, ...)."""
    return torch.cat([model(part) for part in inputs.split(batch_size)])


def accuracy(model: Model, images: Tensor, labels: Tensor, batch_size: int = 128) -> float:
    """Share of images whose largest logit is the label's, in percent.

    Args:
        images: (N, C, H, W). labels: (N,) int64.
    """
    hits = predict(model, images, batch_size).argmax(1) == labels
    return 100 * hits.double().mean().item()


def mean_iou(model: Model, images: Tensor, labels: Tensor, classes: int, batch_size: int = 32) -> float:
    """Mean over the classes of intersection / union of the pixels, in percent.

    Args:
        images: (N, C, H, W). labels: (N, H, W) int64 in 0..classes-1.
        classes: K, the number of classes; a class found neither in the labels nor in the outputs is left out.
    """
    guess = predict(model, images, batch_size).argmax(1)
    confusion = torch.bincount((labels * classes + guess).flatten(), minlength=classes * classes)
    confusion = confusion.reshape(classes, classes).double()
    intersection = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - intersection
    present = union > 0
    return 100 * (intersection[present] / union[present]).mean().item()


@torch.no_grad()
def psnr(model: Model, pairs: Iterable[tuple[Tensor, Tensor]], border: int = 2) -> float:
    """Mean over the images of the peak signal-to-noise ratio, in dB (peak 1.0).

    Args:
        pairs: (low (1, 1, h, w), high (1, 1, H, W)) with values in [0, 1]; images may differ in size.
        border: pixels left out on every side, as is usual in super-resolution.
    """
    values = []
    for low, high in pairs:
        inner = (slice(None), slice(None), slice(border, -border), slice(border, -border))
        error = (model(low).clamp(0, 1) - high)[inner]
        values.append(-10 * torch.log10(error.double().square().mean()))
    return torch.stack(values).mean().item()
