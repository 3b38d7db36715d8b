"""Scores of a model's outputs, one per sample: what ranking compares channels by.

Both functions take classification outputs of any rank: class scores along axis 1, and one class index per sample or
per position (segmentation: the mean over the positions of a sample). They are computed in float64, so that a mean over
samples does not depend on how they were batched beyond rounding at 1e-16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_classification(outputs: Any, targets: Any) -> bool:
    """Whether (outputs, targets) have the shapes and dtypes of class scores (B, K, ...) and class indices (B, ...)."""
    return (
        isinstance(outputs, Tensor)
        and isinstance(targets, Tensor)
        and outputs.is_floating_point()
        and not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
        and outputs.ndim >= 2
        and targets.shape == outputs.shape[:1] + outputs.shape[2:]
    )


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of a sample's positions whose largest score is that of the target class (the first, if several are).

    Args:
        outputs: (B, K, ...) floating point, scores of K classes.
        targets: (B, ...) integers in 0..K-1.

    Returns:
        (B,) float64 in [0, 1]; 0 or 1 where a sample has one target.
    """
    return (outputs.argmax(1) == targets).double().reshape(len(outputs), -1).mean(1)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the softmax of a sample's scores, mean over its positions, in nats.

    Args:
        outputs: (B, K, ...) floating point, logits.
        targets: (B, ...) integers in 0..K-1.

    Returns:
        (B,) float64, differentiable.
    """
    losses = torch.nn.functional.cross_entropy(outputs.double(), targets.long(), reduction="none")
    return losses.reshape(len(outputs), -1).mean(1)
