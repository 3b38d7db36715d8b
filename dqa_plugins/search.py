"""Searches on the kept calibration values: clip factor, noise, and the error of each channel.

All of them minimise a squared error over the kept values, each with the scale its sample would be quantized with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .grid import Grid

AMPLITUDES = torch.arange(2001, dtype=torch.float64) / 1000  # NoisyQuant: 0 to 2 in 1000ths of the scale
MEANS = torch.arange(-200, 200, dtype=torch.float64) / 200  # the authors' script: 200ths of the scale


@dataclass(frozen=True)
class Kept:
    """The calibration values that a search works on.

    Args:
        rows: (D, K) values; a row is a channel, or a channel and kernel tap of the next convolution.
        grid: plain quantization of each of them, broadcasts against rows.
        channels: C.
        site: the site's name.
        weight: (O, D) float64, the next linear layer, where its output is what counts.
    """

    rows: Tensor
    grid: Grid
    channels: int
    site: str
    weight: Tensor | None = None

    @property
    def taps(self) -> int:
        """Rows per channel."""
        return len(self.rows) // self.channels if self.channels else 1


def channel_errors(kept: Kept) -> Tensor:
    """Mean squared error of plain quantization, per row. Ranks channels where no ranking was given.

    Returns:
        (D,) float64.
    """
    return (kept.grid.fake_quantize(kept.rows) - kept.rows).double().square().mean(1)


def most_important(importance: Tensor, ratio: float, extra_bits: int) -> Tensor:
    """m on the round(ratio * C) channels of highest importance, ties to the lower index; 0 elsewhere.

    Args:
        importance: (C,), higher is more important.
        ratio: share of the channels, in [0, 1].
        extra_bits: m.

    Returns:
        (C,) int64.
    """
    order = importance.argsort(descending=True, stable=True)
    extra = torch.zeros(len(importance), dtype=torch.int64, device=importance.device)
    extra[order[: round(ratio * len(importance))]] = extra_bits
    return extra


def clip_factor(
    rows: Tensor, grid_of: Callable[[Tensor], Grid], steps: int, *, groups: int, weight: Tensor | None = None
) -> Tensor:
    """The multiple of the maximum, in parts of 1 / steps, with the least squared error.

    Args:
        rows: (D, K) kept values.
        grid_of: factor () -> the grid that each value would be quantized with.
        steps: resolution of the search.
        groups: 1, or D for one factor per channel.
        weight: (O, D), the next linear layer: the error is that of its output, and the factor is shared.

    Returns:
        (groups,) in the dtype of rows. The larger factor wins a tie.
    """
    best_error: Tensor | None = None
    best = torch.ones(groups, dtype=rows.dtype, device=rows.device)
    for step in range(steps, 0, -1):
        factor = torch.tensor(step / steps, dtype=rows.dtype, device=rows.device)
        difference = (grid_of(factor).fake_quantize(rows) - rows).double()
        if weight is not None:
            error = output_error(difference, weight).expand(groups)
        else:
            error = difference.square().sum(1)
            error = error if groups > 1 else error.sum().reshape(1)
        if best_error is None:
            best_error = error
        else:
            best = torch.where(error < best_error, factor, best)
            best_error = torch.minimum(error, best_error)
    return best


def output_error(difference: Tensor, weight: Tensor) -> Tensor:
    """Squared error of a linear layer's output: sum |W e|^2. difference: (D, K) float64; weight: (O, D)."""
    if weight.shape[0] > weight.shape[1]:
        return (difference * ((weight.T @ weight) @ difference)).sum()
    return (weight @ difference).square().sum()


def draw_noise(seed: int, name: str, channels: int, distribution: str) -> Tensor:
    """u, one value per channel, from U(-1, 1) ("gaussian": 2 z - 1, z normal).

    The generator is seeded by the seed combined with the site's name, so that a site gets the same noise in every
    framework and process.

    Returns:
        (channels,) float32 on the CPU.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if distribution == "gaussian":
        return 2 * torch.randn(channels, generator=generator) - 1
    return 2 * torch.rand(channels, generator=generator) - 1


def noise_errors(
    rows: Tensor, scale: Tensor, unit: Tensor, mean: float, amplitudes: Tensor, low: int, high: int
) -> Tensor:
    """Squared error of Q(x + t delta) - t delta, t = mean + unit * amplitude, for many amplitudes at once, exactly.

    Args:
        rows: (D, K) values of each channel.
        scale: broadcasts to (D, K), delta of each value; a value whose scale is 0 has no error and is left out.
        unit: (D,) float64, the noise of each channel in units of delta, for an amplitude of one.
        mean: of the noise, in units of delta.
        amplitudes: (T,) float64, ascending and evenly spaced, two or more.
        low, high: code range.

    Returns:
        (T,) float64 on the CPU, unit of x squared.
    """
    from .kernels.noise import noise_sums

    scale = scale.double().expand(rows.shape).cpu()
    values = torch.where(scale > 0, rows.double().cpu() / torch.where(scale > 0, scale, 1), 0.0)
    count, start = len(amplitudes), float(amplitudes[0])
    width = (float(amplitudes[-1]) - start) / (count - 1)
    sums = torch.zeros(2, count + 1, dtype=torch.float64)
    arrays = (values.numpy(), scale.square().numpy(), unit.double().cpu().numpy())
    c0, c1, c2 = noise_sums(*arrays, float(mean), start, width, count, low, high, sums.numpy())
    level, slope = sums[:, :count].cumsum(1)
    a = amplitudes.cpu()
    return level + c0 + 2 * a * (c1 - slope) + a.square() * c2


def search_noise(kept: Kept, unit: Tensor, mean: float | None, amplitude: float | None) -> Tensor:
    """The noise with the least squared error, in units of the scale: unit * amplitude + mean.

    Args:
        kept: with a grid of one scale per value.
        unit: (C,) u.
        mean, amplitude: in units of the scale; None: searched, the mean first.

    Returns:
        (C,) on the device of the values. The first candidate wins a tie: no noise, if nothing beats it.
    """
    rows, step, weight = kept.rows, kept.grid.step, kept.weight
    low, high = int(kept.grid.low), int(kept.grid.high)
    drawn = unit.to(rows.device).double().repeat_interleave(kept.taps)

    def best(candidates: Tensor, slope: Tensor, offset: float) -> float:
        if weight is None:
            errors = noise_errors(rows, step, slope, offset, candidates, low, high)
        else:
            width = step.double().expand(rows.shape)
            safe = torch.where(width > 0, width, 1)
            x = rows.double()
            shifts = (offset + slope * float(a) for a in candidates)
            errors = torch.stack(
                [
                    output_error(((x / safe + t[:, None]).round().clamp(low, high) - t[:, None]) * width - x, weight)
                    for t in shifts
                ]
            )
        none = int(candidates.abs().argmin())  # it wins a tie
        best = int(errors.argmin())
        return float(candidates[none if errors[none] <= errors[best] else best])

    if mean is None:
        mean = best(MEANS, torch.ones_like(drawn), 0.0)
    if amplitude is None:
        amplitude = best(AMPLITUDES, drawn, mean)
    return (unit * amplitude + mean).to(rows.device)
