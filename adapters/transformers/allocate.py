"""Steps by sensitivity: each channel of the keys and values gets the step that costs the model's loss least.

An error e of a head moves the loss by about e' F e / 2, with F the mean outer product of the loss's gradients (the
empirical Fisher information). With F = R' R, R upper triangular, channel j costs R_jj^2 times the error that is left of
it once the others are made up for (`dqa_plugins.kernels.feedback`), and halving a step costs one bit whatever the
channel: at the optimum step * R_jj is one number for all channels of all layers. Steps are not tied to powers of two.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dqa_plugins.errors import InvalidArgument
from dqa_plugins.quantizer import ActivationQuantizer
from dqa_plugins.rounding import power_of_two
from dqa_plugins.storage.coder.histograms import entropy_bits

from .settings import TensorSettings
from .tables import coded_bits, codes_of, sample, shared_codebooks

_ROUNDS = 6  # corrections by the tables that are really made
_STEPS = 12  # bisection steps
_TOKENS = 256  # of the estimate


def allocate_steps(
    tensors: Sequence[TensorSettings],
    rows: Sequence[Tensor],
    factors: Sequence[Tensor],
    target: float,
    block: int,
) -> list[TensorSettings]:
    """The tensors with steps by sensitivity and shared tables, whose calibration values take `target` bits each.

    Args:
        tensors: static, per channel.
        rows: (C, T) calibration values of each.
        factors: (H, D, D), R of each head.
        target: bits per value, without tables.
        block: tokens of a block.

    Raises:
        InvalidArgument: the target cannot be met.
    """
    roots = [r.diagonal(dim1=1, dim2=2) for r in factors]
    fed = [(r / d[..., None]).mT.tril(-1).float().contiguous() for r, d in zip(factors, roots, strict=True)]
    tensors = [replace(t, feedback=f) for t, f in zip(tensors, fed, strict=True)]
    few = [r[:, :: max(1, r.shape[1] // _TOKENS)] for r in rows]

    def estimate(level: float) -> float:
        made = _with_steps(tensors, roots, level)
        return float(np.mean([_entropy(codes_of(t, r)) for t, r in zip(made, few, strict=True)]))

    finest = max(range(-32, 16, 2), key=estimate)  # below it codes are clipped, and take fewer bits again
    measured: list[tuple[float, float]] = []  # (level, bits with the tables that are really made)
    best, miss = None, np.inf
    for _ in range(_ROUNDS):
        level = _next_level(measured, target, estimate, finest)
        made = shared_codebooks(_with_steps(tensors, roots, level), rows, block)
        measured.append((level, coded_bits(made, [sample(r, 1024, block) for r in rows], block)))
        if abs(measured[-1][1] - target) < miss:
            best, miss = made, abs(measured[-1][1] - target)
        if miss < 0.01 * target:
            break
    if best is None or miss > 0.1 * target:
        raise InvalidArgument(f"target_bits={target}: the nearest that steps can come is {miss:.2f} bits off.")
    return best


def _next_level(
    measured: list[tuple[float, float]], target: float, estimate: Callable[[float], float], finest: float
) -> float:
    """Between the nearest levels on both sides of the target; by the estimate while one side is missing."""
    more, fewer = [p for p in measured if p[1] > target], [p for p in measured if p[1] <= target]
    if more and fewer:
        (a, above), (b, below) = max(more), min(fewer)
        return a + (b - a) * (above - target) / (above - below)
    beyond = measured[-1][1] - estimate(measured[-1][0]) if measured else 0.0
    low, high = finest, 16.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if estimate(middle) + beyond > target else (low, middle)
    return high


def _with_steps(tensors: Sequence[TensorSettings], roots: Sequence[Tensor], level: float) -> list[TensorSettings]:
    """The tensors with steps 2^level / root, roots (H, D) each."""
    steps = [(2.0**level / r).float().flatten() for r in roots]
    return [replace(t, quantizer=_with_step(t, step)) for t, step in zip(tensors, steps, strict=True)]


def _with_step(t: TensorSettings, step: Tensor) -> ActivationQuantizer:
    quantizer = copy.deepcopy(t.quantizer)
    extra = torch.zeros(len(step), dtype=torch.int64)
    if quantizer.method.has_important_channels:
        extra += quantizer.method.bits  # the widest codes: entropy coding makes the unused ones free
        quantizer.set_extra_bits(extra)
    quantizer.scale = step * power_of_two(extra)
    quantizer.derive_grid()
    return quantizer


def _entropy(codes: Tensor) -> float:
    """Order-0 bits per value, each channel by itself."""
    low = int(codes.min())
    size = int(codes.max()) - low + 1
    index = (codes - low) + size * torch.arange(len(codes))[:, None]
    counts = torch.bincount(index.flatten(), minlength=size * len(codes)).view(len(codes), size)
    return float(entropy_bits(counts.numpy().astype(np.float64)).sum()) / codes.numel()
