"""What a model's outputs are worth: the metric's score and the cross-entropy of each sample, and their means."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..metrics import accuracy, cross_entropy, is_classification
from .errors import MetricError

Metric = Callable[[Any, Any], Tensor]
Batches = list[tuple[Any, Any]]


@dataclass
class SiteScores:
    """Means over all samples for each channel of a layer.

    Attributes:
        scores: C means of the metric, higher is better.
        losses: C mean cross-entropies, or None where outputs and targets are no classification.
    """

    scores: list[float]
    losses: list[float] | None

    def order(self, strict: bool) -> tuple[int, ...]:
        """Best first: by score, then by lower loss (unless strict), then by lower index."""
        losses = [0.0] * len(self.scores) if strict or self.losses is None else self.losses
        return tuple(sorted(range(len(self.scores)), key=lambda c: (-self.scores[c], losses[c], c)))


class Scorer:
    """A metric and, where it is defined, the cross-entropy that breaks its ties.

    Args:
        metric: (outputs, targets) -> (B,) one score per sample, higher is better; None: accuracy.
    """

    def __init__(self, metric: Metric | None) -> None:
        self.metric = metric
        self.name = "accuracy" if metric is None else str(getattr(metric, "__name__", type(metric).__name__))

    def __call__(self, outputs: Any, targets: Any, where: str) -> tuple[Tensor, Tensor | None]:
        """Score each sample.

        Args:
            where: the layer and channel, for messages.

        Returns:
            (B,) float64 scores; (B,) float64 cross-entropies or None. On the CPU.

        Raises:
            MetricError: not one finite score per sample; or no metric was given and this is no classification.
        """
        if isinstance(outputs, Tensor) and isinstance(targets, Tensor):
            targets = targets.to(outputs.device)
        losses = None
        if is_classification(outputs, targets):
            losses = self._finite(cross_entropy(outputs, targets), where, "cross-entropy")
        elif self.metric is None:
            raise MetricError(
                f"{where}: accuracy needs outputs (B, K, ...) of class scores and integer targets (B, ...); got "
                f"{_described(outputs)} and {_described(targets)}. Give metric=f, with f(outputs, targets) returning "
                "one score per sample, higher is better."
            )
        scores = accuracy(outputs, targets) if self.metric is None else self.metric(outputs, targets)
        samples = batch_size(targets, outputs)
        if not isinstance(scores, Tensor) or scores.ndim != 1 or (samples is not None and len(scores) != samples):
            raise MetricError(
                f"{where}: the metric {self.name} returned {_described(scores)}; it must return one score per sample, "
                f"a tensor of shape ({'B' if samples is None else samples},)."
            )
        return self._finite(scores.detach().double(), where, f"metric {self.name}"), losses

    @staticmethod
    def _finite(values: Tensor, where: str, what: str) -> Tensor:
        if not torch.isfinite(values).all():
            raise MetricError(
                f"{where}: the {what} of {int((~torch.isfinite(values)).sum())} of {len(values)} samples is NaN or "
                "Inf. Check the outputs of the float model on these batches."
            )
        return values.cpu()


class Means:
    """Means over batches that do not depend on the order of summation (math.fsum is correctly rounded)."""

    def __init__(self) -> None:
        self._scores: list[float] = []
        self._losses: list[float] | None = []
        self._count = 0

    def add(self, scores: Tensor, losses: Tensor | None) -> None:
        """Add the (B,) scores and losses of a batch."""
        self._scores.append(math.fsum(scores.tolist()))
        if losses is None:
            self._losses = None
        elif self._losses is not None:
            self._losses.append(math.fsum(losses.tolist()))
        self._count += len(scores)

    def to_list(self) -> list[Any]:
        """JSON-compatible; the inverse of `from_list`."""
        return [self._scores, self._losses, self._count]

    @classmethod
    def from_list(cls, state: list[Any]) -> Means:
        """What another process measured."""
        found = cls()
        found._scores, found._losses, found._count = state
        return found

    @property
    def score(self) -> float:
        """Mean score over the samples added."""
        return math.fsum(self._scores) / self._count

    @property
    def loss(self) -> float | None:
        """Mean cross-entropy, or None."""
        return None if self._losses is None else math.fsum(self._losses) / self._count


def site_scores(means: list[Means]) -> SiteScores:
    """Collect the means of all channels."""
    losses = [m.loss for m in means]
    known = [loss for loss in losses if loss is not None]
    return SiteScores([m.score for m in means], known if len(known) == len(losses) else None)


def forward(model: Any, inputs: Any) -> Any:
    """Call a model with a tuple of positional inputs, or a dict of keyword inputs."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def batch_size(*values: Any) -> int | None:
    """Length of axis 0 of the first tensor among values, or None."""
    for value in values:
        if isinstance(value, Tensor) and value.ndim:
            return len(value)
    return None


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
