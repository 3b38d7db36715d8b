"""Scores of channels without a search: quantization error, first-order loss change, random."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedInput
from ..metrics import cross_entropy, is_classification
from ..processes import Processes
from ..progress import Progress
from ..quantizer import ActivationQuantizer
from ..resolve import kept_values
from ..search import channel_errors
from ..sharing import by_batch, by_piece
from .errors import MetricError, RankingError
from .scoring import Batches, Metric, forward
from .search_model import SearchModel, SearchSite


def error_scores(quantizer: ActivationQuantizer) -> Tensor:
    """Mean squared error of Direct at n bits on the kept calibration values, (C,): what an unranked quantizer uses.

    Args:
        quantizer: calibrated, not frozen.
    """
    method, channels = quantizer.method, quantizer.num_channels or 0
    _, kept = kept_values(method, quantizer.calibration, quantizer.signed, channels=channels, site=quantizer.name)
    return channel_errors(kept)


def kept_errors(sites: dict[str, ActivationQuantizer], ranks: Processes) -> dict[str, Tensor]:
    """`error_scores` of every site, {site name: (C,) float64}; ranks share the sites."""
    quantizers = list(sites.values())
    found = by_piece(len(quantizers), lambda k: error_scores(quantizers[k]), ranks, "error scores")
    return dict(zip(sites, found, strict=True))


def measured_errors(search: SearchModel, batches: Batches, ranks: Processes) -> dict[str, Tensor]:
    """Mean squared error of Direct at n bits on the activations of the float model for these batches.

    For frozen quantizers, which have forgotten their calibration values (Brevitas and NNCF models are frozen as soon as
    they are calibrated).

    Args:
        search: a frozen copy; nothing in it is quantized here.
        batches: (inputs, anything).
        ranks: share the batches.

    Returns:
        {site name: (C,) float64}; zeros for a layer that these batches never reach.
    """
    sites = [site for site in search.sites if site.rankable]
    totals = {site.name: torch.zeros(site.channels, dtype=torch.float64) for site in sites}
    counts = dict.fromkeys(totals, 0)

    def measure(number: int) -> dict[str, Tensor]:
        calls: list[tuple[SearchSite, Tensor, int]] = []

        def record(site: SearchSite, x: Tensor, *predictions: Tensor) -> Tensor:
            error = (x - site.quantize(x.clone(), *predictions)).double().square()
            squared = site.channels_first(error).flatten(2)
            calls.append((site, squared.sum((0, 2)).cpu(), squared.shape[0] * squared.shape[2]))
            return x

        with _replaced(sites, record):
            forward(search.model, copy.deepcopy(batches[number][0]))
        return {f"{call} {sites.index(site)} {count}": squared for call, (site, squared, count) in enumerate(calls)}

    for found in by_batch(len(batches), measure, ranks):
        for key, squared in found.items():
            _, site, count = map(int, key.split())
            totals[sites[site].name] += squared
            counts[sites[site].name] += count
    return {name: total / max(counts[name], 1) for name, total in totals.items()}


@contextlib.contextmanager
def _replaced(sites: list[SearchSite], function: Callable[..., Tensor]) -> Iterator[None]:
    """Meanwhile each site calls `function(site, x, *predictions)`."""
    for site in sites:
        site.replacement = functools.partial(function, site)
    try:
        yield
    finally:
        for site in sites:
            site.replacement = None


def random_scores(name: str, channels: int, seed: int) -> Tensor:
    """(C,) uniform numbers, of the seed combined with the site's name: the same in every framework and process."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(channels, generator=generator, dtype=torch.float64)


def taylor_scores(
    search: SearchModel, batches: Batches, metric: Metric | None, progress: Progress, ranks: Processes
) -> dict[str, Tensor]:
    """Squared first-order change of the loss when a channel is quantized, mean over samples.

    With g the gradient of a sample's loss at the float activation x, and Q Direct at n bits, the change is the sum of
    (x - Q(x)) * g over the positions of a channel. One backward pass per batch gives it for all layers.

    Args:
        search: a frozen copy; nothing in it is quantized here.
        batches: (inputs, targets).
        metric: differentiable, its negative is the loss; None: cross-entropy.
        ranks: share the batches.

    Returns:
        {site name: (C,) float64 scores}; zeros for a layer that these batches never reach.

    Raises:
        MetricError: the metric has no gradient, or none was given and this is no classification.
        RankingError: the model overwrites values that the backward pass needs.
    """
    sites = [site for site in search.sites if site.rankable]
    totals = {site.name: torch.zeros(site.channels, dtype=torch.float64) for site in sites}
    samples = 0

    def measure(number: int) -> dict[str, Tensor]:
        inputs, targets = batches[number]
        calls: list[tuple[SearchSite, Tensor, Tensor]] = []  # site, activation, x - Q(x)

        def record(site: SearchSite, x: Tensor, *predictions: Tensor) -> Tensor:
            if not x.is_floating_point():
                raise UnsupportedInput(f"{site.quantizer.label} quantizes floating-point tensors; got {x.dtype}.")
            with torch.no_grad():
                error = x.detach() - site.quantize(x.detach().clone(), *predictions)
            activation = x.clone() if x.requires_grad else x.detach().clone().requires_grad_()
            calls.append((site, activation, error))
            return activation.clone()  # an in-place operation behind it must not change the activation

        with _replaced(sites, record):
            gradients, count = _gradients(search, inputs, targets, metric, calls)
        changes: dict[str, Tensor] = {}
        for (site, _, error), gradient in zip(calls, gradients, strict=True):
            found = error * 0 if gradient is None else error * gradient
            found = site.channels_first(found.double()).flatten(2).sum(2)
            changes[site.name] = changes[site.name] + found if site.name in changes else found
        return {"": torch.tensor(count)} | {name: change.square().sum(0).cpu() for name, change in changes.items()}

    for found in by_batch(len(batches), measure, ranks):
        samples += int(found.pop(""))
        for name, change in found.items():
            totals[name] += change
    progress.advance(sum(map(len, totals.values())))
    return {name: total / samples for name, total in totals.items()}


def _gradients(
    search: SearchModel,
    inputs: Any,
    targets: Any,
    metric: Metric | None,
    calls: list[tuple[SearchSite, Tensor, Tensor]],
) -> tuple[tuple[Tensor | None, ...], int]:
    """The gradient of the loss at each activation that the forward pass adds to `calls`; the number of samples."""
    try:
        with torch.enable_grad():
            loss = _loss(forward(search.model, copy.deepcopy(inputs)), targets, metric)
            activations = [activation for _, activation, _ in calls]
            if loss.requires_grad:
                return torch.autograd.grad(loss.sum(), activations, allow_unused=True), len(loss)
    except RuntimeError as failure:
        if "inplace operation" not in str(failure):
            raise
        raise RankingError(
            "strategy='taylor' needs a backward pass, and the model overwrites a value in place that it needs "
            f"again ({str(failure).splitlines()[0][:160]}). Use strategy='greedy'."
        ) from failure
    raise MetricError(
        "strategy='taylor' needs a loss with a gradient: the metric's result does not depend on the "
        "activations in a differentiable way. Leave metric=None (cross-entropy), or use strategy='greedy'."
    )


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
