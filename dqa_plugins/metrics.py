"""Scores of a model's outputs, one per sample (what ranking compares channels by), and of predicted thresholds.

The scores take classification outputs of any rank: class scores along axis 1, and one class index per sample or
per position (segmentation: the mean over the positions of a sample). They are computed in float64, so that a mean over
samples does not depend on how they were batched beyond rounding at 1e-16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import InvalidTarget

IGNORED = -100  # target of a position that does not count, as in torch.nn.CrossEntropyLoss


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


def check_targets(outputs: Tensor, targets: Tensor) -> Tensor:
    """Which positions count: those whose target is not IGNORED. Arguments as `cross_entropy`.

    Returns:
        (B, ...) bool, of the shape of targets.

    Raises:
        InvalidTarget: a target is no class of the model.
    """
    counted = targets != IGNORED
    classes = outputs.shape[1]
    wrong = counted & ((targets < 0) | (targets >= classes))
    if bool(wrong.any()):
        raise InvalidTarget(
            f"the targets hold class {int(targets[wrong][0])}, the outputs {tuple(outputs.shape)} have scores of "
            f"{classes} classes. Give targets of 0 to {classes - 1}, and {IGNORED} where a position does not count."
        )
    return counted


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """(B,) mean over the positions that count; 0 where a sample has none."""
    values, counted = (t.reshape(len(t), -1) for t in (values.double().masked_fill(~counted, 0.0), counted))
    return values.sum(1) / counted.sum(1).clamp(min=1)


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of a sample's positions whose largest score is that of the target class (the first, if several are).

    Args:
        outputs: (B, K, ...) floating point, scores of K classes.
        targets: (B, ...) integers in 0..K-1, IGNORED where a position does not count.

    Returns:
        (B,) float64 in [0, 1]; 0 or 1 where a sample has one target.

    Raises:
        InvalidTarget: a target is no class of the model.
    """
    return _mean(outputs.argmax(1) == targets, check_targets(outputs, targets))


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the softmax of a sample's scores, mean over its positions that count, in nats.

    Args:
        outputs: (B, K, ...) floating point, logits.
        targets: (B, ...) integers in 0..K-1, IGNORED where a position does not count.

    Returns:
        (B,) float64, differentiable.

    Raises:
        InvalidTarget: a target is no class of the model.
    """
    counted = check_targets(outputs, targets)
    losses = torch.nn.functional.cross_entropy(outputs.double(), targets.long(), reduction="none", ignore_index=IGNORED)
    return _mean(losses, counted)


def density(x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Share of a sample's values strictly outside two thresholds: what Dense+Sparse keeps in float.

    Args:
        x: (B, ...).
        lower, upper: broadcast against x, unit of x.

    Returns:
        (B,) float64 in [0, 1].
    """
    return ((x < lower) | (x > upper)).flatten(1).double().mean(1)


def failure_rate(densities: Tensor, target: float = 0.01, margin: float = 0.005) -> float:
    """FR (QPP paper, section 8): share of (sample, layer) pairs whose density lies outside target +- margin.

    Args:
        densities: any shape, in [0, 1].
        target: density asked for.
        margin: in [0, 1]; the paper's FR(1) and FR(0.5) are 0.01 and 0.005 at a target of 0.01.

    Returns:
        in [0, 1]; nan without pairs.
    """
    if densities.numel() == 0:
        return float("nan")
    return float(((densities.double() - target).abs() > margin * (1 + 1e-6)).double().mean())


def prediction_error(predicted: Tensor, dynamic: Tensor) -> Tensor:
    """Error of predicted parameters relative to the sample's own, |p - d| / |d| (QPP paper, figure 7).

    Args:
        predicted, dynamic: (B, ...) of one shape.

    Returns:
        (B,) float64, the mean over a sample's parameters; one whose own value is zero is measured by the sample's
        largest.
    """
    difference, own = (predicted - dynamic).abs().double().flatten(1), dynamic.abs().double().flatten(1)
    largest = own.amax(1, keepdim=True).clamp(min=1e-30)
    return (difference / torch.where(own > 0, own, largest)).mean(1)
