"""Augmented calibration: each batch runs a second time with changed exposure, contrast and noise, half of it negative.

Only the regressions learn from the second run. What it changes is drawn per sample from the seed and the sample's
number, so it does not depend on batches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dqa_plugins.quantizer import ActivationQuantizer

Augmentation = Callable[[tuple[Any, ...], int], Any]

EXPOSURE, CONTRAST, NOISE = 0.8, 0.3, 0.03  # ranges of log gain and log contrast; share of the value range
GAMMA = 1.1  # range of the log exponent that bends negatives


def change(inputs: tuple[Any, ...], first_sample: int, *, seed: int = 0) -> tuple[Any, ...]:
    """The default augmentation of a batch: log-uniform exposure and contrast, normal noise; every second sample, at
    random, is turned into its negative before, its tones bent by a log-uniform exponent.

    A sample differs from its neighbours less than photos differ from photos: negatives show the regressions dark where
    there was light.

    Args:
        inputs: of the model; floating-point tensors of two dimensions or more, (B, ...), are changed.
        first_sample: number of the first sample.
        seed: of the draws.
    """
    return tuple(
        _change(x, first_sample, seed + 7919 * k)
        if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1
        else x
        for k, x in enumerate(inputs)
    )


def _change(x: Tensor, first_sample: int, seed: int) -> Tensor:
    changed = torch.empty_like(x)
    for row, sample in enumerate(x):
        draw = torch.Generator().manual_seed((seed * 1_000_003 + first_sample + row) % 2**63)
        gain, contrast, noise, negative, bend = (torch.rand(5, generator=draw) * 2 - 1).tolist()
        values = sample.float()
        low, high = values.min(), values.max()
        if negative > 0 and high > low:
            values = low + (high - low) * ((high - values) / (high - low)) ** 2.718281828 ** (bend * GAMMA)
        values = low + (values - low) * 2.718281828 ** (gain * EXPOSURE)
        mean = values.mean()
        values = mean + (values - mean) * 2.718281828 ** (contrast * CONTRAST)
        strength = (noise + 1) / 2 * NOISE * (high - low)
        values = values + torch.randn(sample.shape, generator=draw).to(values.device) * strength
        changed[row] = (values.clamp(min=0.0) if low >= 0 else values).to(x.dtype)
    return changed


def augmentation(quantizers: Sequence[ActivationQuantizer]) -> Augmentation | None:
    """What the predicted quantizers of a model ask for; None: nothing."""
    for quantizer in quantizers:
        source = quantizer.method.prediction
        if source.mode == "extended" and callable(source.augment):
            return source.augment
    for quantizer in quantizers:
        source = quantizer.method.prediction
        if source.mode == "extended" and source.augment is True:
            return functools.partial(change, seed=source.seed)
    return None


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Within it a forward leaves observers of the framework and batch-norm statistics as they are."""
    modules = list(model.modules())
    observers = [m for m in modules if hasattr(m, "calculate_qparams") and not hasattr(m, "quantizer")]
    norms = [m for m in modules if getattr(m, "track_running_stats", False) and m.training]
    states = [{k: v.clone() for k, v in m.state_dict().items()} for m in observers]
    for norm in norms:
        norm.training = False
    try:
        yield
    finally:
        for observer, state in zip(observers, states, strict=True):
            observer.load_state_dict(state)
        for norm in norms:
            norm.training = True
