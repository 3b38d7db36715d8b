"""Augmented calibration: each batch runs a second time with changed exposure, contrast and noise, half of it negative.

Only the regressions learn from the second run. What it changes is drawn per sample from the seed and the sample's
number, so it does not depend on batches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .bus import Bus

if TYPE_CHECKING:
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


def augmented(bus: Bus, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The changed inputs of the forward that just ran; None if there is nothing to run."""
    if bus.augmenting or bus.fitted or not any(q.state == "observe" for q in bus.quantizers):
        return None
    function = augmentation(bus.quantizers)
    if function is None or not any(isinstance(x, Tensor) and x.is_floating_point() for x in inputs):
        return None
    with torch.no_grad():
        changed = function(inputs, bus.first_sample)
    return changed if isinstance(changed, tuple) else (changed,)


class Foreign:
    """What an augmented run must not change: observers of the framework, and batch-norm statistics."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self.observers = [m for m in modules if hasattr(m, "calculate_qparams") and not hasattr(m, "quantizer")]
        self.norms = [m for m in modules if getattr(m, "track_running_stats", False) and m.training]

    def __enter__(self) -> None:
        self.states = [{k: v.clone() for k, v in m.state_dict().items()} for m in self.observers]
        for norm in self.norms:
            norm.training = False

    def __exit__(self, *_: Any) -> None:
        for observer, state in zip(self.observers, self.states, strict=True):
            observer.load_state_dict(state)
        for norm in self.norms:
            norm.training = True


def run_augmented(bus: Bus, model: nn.Module) -> Any:
    """Make every calibration forward of a model start the bus and run again with changed inputs.

    Returns:
        an object whose `remove()` undoes it.
    """

    def before(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        bus.begin(inputs)

    def after(module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        changed = augmented(bus, inputs)
        if changed is not None:
            with bus.augment(), torch.no_grad(), Foreign(module):
                module(*changed, **kwargs)

    handles = [model.register_forward_pre_hook(before)]
    handles.append(model.register_forward_hook(after, with_kwargs=True))
    return Handles(handles)


class Handles:
    """Several hooks to remove as one."""

    def __init__(self, handles: Sequence[Any]) -> None:
        self.handles = handles

    def remove(self) -> None:
        """Remove them."""
        for handle in self.handles:
            handle.remove()
