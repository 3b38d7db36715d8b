"""Rankings without a search: quantization error, first-order loss change, random."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedInput
from ..metrics import cross_entropy, is_classification
from ..quantizer import ActivationQuantizer
from ..resolve import kept_values
from ..search import channel_errors
from .errors import MetricError, RankingError
from .evaluate import Batches, Metric, forward
from .progress import Progress
from .stage import Seam, Stage


def error_scores(quantizer: ActivationQuantizer) -> Tensor:
    """Mean squared error of Direct at n bits on the kept calibration values, (C,): what an unranked quantizer uses.

    Args:
        quantizer: calibrated, not frozen.
    """
    method, channels = quantizer.method, quantizer.num_channels or 0
    _, kept = kept_values(method, quantizer.calibration, quantizer.signed, channels=channels, site=quantizer.name)
    return channel_errors(kept)


def measured_errors(stage: Stage, batches: Batches) -> dict[str, Tensor]:
    """Mean squared error of Direct at n bits on the activations of the float model for these batches.

    For frozen quantizers, which have forgotten their calibration values (Brevitas and NNCF models are frozen as soon as
    they are calibrated).

    Args:
        stage: a frozen copy; nothing in it is quantized here.
        batches: (inputs, anything).

    Returns:
        {site name: (C,) float64}.
    """
    totals: dict[str, tuple[Tensor, int]] = {}

    def tap_of(seam: Seam) -> Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]:
        def tap(x: Tensor, direct: Callable[[Tensor], Tensor]) -> Tensor:
            squared = seam.channels_first((x - direct(x.clone())).double().square()).flatten(2)
            total, count = totals.get(seam.name, (torch.zeros(squared.shape[1], dtype=torch.float64), 0))
            totals[seam.name] = (total + squared.sum((0, 2)).cpu(), count + squared.shape[0] * squared.shape[2])
            return x

        return tap

    for seam in stage.seams:
        seam.tap = tap_of(seam) if seam.rankable else None
    try:
        for inputs, _ in batches:
            forward(stage.model, copy.deepcopy(inputs))
    finally:
        for seam in stage.seams:
            seam.tap = None
    for seam in stage.seams:  # a layer that these batches never reach has no error
        totals.setdefault(seam.name, (torch.zeros(seam.quantizer.num_channels or 0, dtype=torch.float64), 1))
    return {name: total / max(count, 1) for name, (total, count) in totals.items()}


def random_scores(name: str, channels: int, seed: int) -> Tensor:
    """(C,) uniform numbers, of the seed combined with the site's name: the same in every framework and process."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(channels, generator=generator, dtype=torch.float64)


def taylor_scores(stage: Stage, batches: Batches, metric: Metric | None, progress: Progress) -> dict[str, Tensor]:
    """Squared first-order change of the loss when a channel is quantized, mean over samples.

    With g the gradient of a sample's loss at the float activation x, and Q Direct at n bits, the change is the sum of
    (x - Q(x)) * g over the positions of a channel. One backward pass per batch gives it for all layers.

    Args:
        stage: a frozen copy; nothing in it is quantized here.
        batches: (inputs, targets).
        metric: differentiable, its negative is the loss; None: cross-entropy.

    Returns:
        {site name: (C,) float64 scores}.

    Raises:
        MetricError: the metric has no gradient, or none was given and this is no classification.
        RankingError: the model overwrites values that the backward pass needs.
    """
    totals: dict[str, Tensor] = {}
    samples = 0
    for inputs, targets in batches:
        taps = _Taps()
        for seam in stage.seams:
            seam.active = False
            seam.tap = taps.of(seam) if seam.rankable else None
        try:
            with torch.enable_grad():
                loss = _loss(forward(stage.model, copy.deepcopy(inputs)), targets, metric)
                points = [point for point, _, _ in taps.seen]
                gradients = torch.autograd.grad(loss.sum(), points, allow_unused=True) if loss.requires_grad else ()
        except RuntimeError as failure:
            if "inplace operation" not in str(failure):
                raise
            raise RankingError(
                "strategy='taylor' needs a backward pass, and the model overwrites a value in place that it needs "
                f"again ({str(failure).splitlines()[0][:160]}). Use strategy='greedy'."
            ) from failure
        finally:
            for seam in stage.seams:
                seam.tap = None
        if not gradients:
            raise MetricError(
                "strategy='taylor' needs a loss with a gradient: the metric's result does not depend on the "
                "activations in a differentiable way. Leave metric=None (cross-entropy), or use strategy='greedy'."
            )
        changes: dict[str, Tensor] = {}
        for (_, seam, error), gradient in zip(taps.seen, gradients, strict=True):
            found = error * 0 if gradient is None else error * gradient
            found = seam.channels_first(found.double()).flatten(2).sum(2)
            changes[seam.name] = changes[seam.name] + found if seam.name in changes else found
        for name, change in changes.items():
            totals[name] = totals.get(name, torch.zeros(())) + change.square().sum(0).cpu()
        samples += len(loss)
    for seam in stage.seams:
        if seam.rankable:
            channels = seam.quantizer.num_channels or 0
            totals[seam.name] = totals.get(seam.name, torch.zeros(channels, dtype=torch.float64)) / samples
            progress.advance(channels)
    return totals


class _Taps:
    """Where the gradient of each activation is taken: (point, seam, x - Q(x)) of every call."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Seam, Tensor]] = []

    def of(self, seam: Seam) -> Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]:
        def tap(x: Tensor, direct: Callable[[Tensor], Tensor]) -> Tensor:
            if not x.is_floating_point():
                raise UnsupportedInput(f"{seam.quantizer.label} quantizes floating-point tensors; got {x.dtype}.")
            with torch.no_grad():
                error = x.detach() - direct(x.detach().clone())
            point = x.clone() if x.requires_grad else x.detach().clone().requires_grad_()
            self.seen.append((point, seam, error))
            return point.clone()  # an in-place operation behind it must not move the point

        return tap


def _loss(outputs: Any, targets: Any, metric: Metric | None) -> Tensor:
    """(B,) loss of each sample."""
    if isinstance(outputs, Tensor) and isinstance(targets, Tensor):
        targets = targets.to(outputs.device)
    if metric is None:
        if not is_classification(outputs, targets):
            raise MetricError(
                "strategy='taylor' takes the cross-entropy of outputs (B, K, ...) and integer targets (B, ...), and "
                "these are neither. Give metric=f, differentiable, with one score per sample, higher is better."
            )
        return cross_entropy(outputs, targets)
    scores = metric(outputs, targets)
    if not isinstance(scores, Tensor) or scores.ndim != 1:
        raise MetricError("the metric must return one score per sample, a tensor of shape (B,).")
    return -scores
