"""Searches on the kept calibration values: clip factor, noise, and the error of each channel.

All of them minimise a squared error over the kept values, each with the scale its sample would be quantized with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from .functional import affine_fake_quantize, code_range, grid_fake_quantize
from .methods import Method, NoisyQuant
from .qparams import QParams

AMPLITUDES = torch.arange(2001, dtype=torch.float64) / 1000  # NoisyQuant: 0 to 2 in 1000ths of the scale
MEANS = torch.arange(-200, 200, dtype=torch.float64) / 200  # the authors' script: 200ths of the scale


def quantize_rows(method: Method, rows: Tensor, qparams: QParams, signed: bool) -> Tensor:
    """Direct fake quantization of kept values at n bits. rows: (D, K); qparams broadcast against it."""
    if qparams.scale is not None:
        return grid_fake_quantize(rows, qparams.scale, *code_range(method.bits, signed))
    if qparams.lower is None or qparams.upper is None:
        raise TypeError("qparams hold neither a scale nor thresholds")
    return affine_fake_quantize(rows, qparams.lower, qparams.upper, method.bits)


def channel_errors(method: Method, rows: Tensor, qparams: QParams, signed: bool) -> Tensor:
    """Mean squared error of Direct at n bits, per row. Ranks channels where no ranking was given.

    Returns:
        (D,) float64.
    """
    return (quantize_rows(method, rows, qparams, signed) - rows).double().square().mean(1)


def clip_factor(
    method: Method,
    rows: Tensor,
    qparams_for: Callable[[Tensor], QParams],
    signed: bool,
    *,
    groups: int,
    weight: Tensor | None = None,
) -> Tensor:
    """The multiple of the maximum, in steps of 1/100 (NoisyQuant: clip_steps), with the least squared error.

    Args:
        rows: (D, K) kept values.
        qparams_for: factor () -> qparams that broadcast against rows.
        groups: 1, or D for one factor per channel.
        weight: (O, D), the next linear layer: the error is that of its output, and the factor is shared.

    Returns:
        (groups,) in the dtype of rows. The larger factor wins a tie.
    """
    steps = method.clip_steps if isinstance(method, NoisyQuant) else 100
    best_error: Tensor | None = None
    best = torch.ones(groups, dtype=rows.dtype, device=rows.device)
    for step in range(steps, 0, -1):
        factor = torch.tensor(step / steps, dtype=rows.dtype, device=rows.device)
        difference = (quantize_rows(method, rows, qparams_for(factor), signed) - rows).double()
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


def noise_errors(rows: Tensor, scale: Tensor, shifts: Tensor, low: int, high: int) -> Tensor:
    """Squared error of Q(x + t delta) - t delta for many shifts t at once, per channel, exactly.

    Between its rounding ties a value keeps its code q, and its error is a quadratic in t: added where the candidates
    reach that code, taken away where they leave it, summed up along the candidates. A value meets as many codes as
    the candidates are wide (five for shifts of -2..2), so the cost does not grow with the bits.

    Args:
        rows: (D, K) values of each channel.
        scale: broadcasts to (D, K), delta of each value; a value whose scale is 0 has no error and is left out.
        shifts: (D, T) float64, candidate shifts of each channel in units of delta.
        low, high: code range.

    Returns:
        (D, T) float64, unit of x squared.
    """
    scale = scale.double().expand(rows.shape)
    weights = scale.square()
    values = torch.where(scale > 0, rows.double() / torch.where(scale > 0, scale, 1), 0.0)
    shifts, order = shifts.double().sort(dim=1)
    count = shifts.shape[1]
    first = (values + shifts[:, :1]).round().clamp(low, high)
    last = (values + shifts[:, -1:]).round().clamp(low, high)
    totals = [torch.zeros(len(rows), count + 1, dtype=torch.float64, device=rows.device) for _ in range(3)]
    begin = torch.zeros_like(values, dtype=torch.int64)
    for k in range(int((last - first).max()) + 1):
        code = first + k
        end = torch.searchsorted(shifts, code + 0.5 - values).masked_fill(code >= last, count)
        gap, weight = code - values, weights * (code <= last)
        for power, total in enumerate(totals):
            moment = weight * gap**power
            total.scatter_add_(1, begin, moment).scatter_add_(1, end, -moment)
        begin = end
    none, linear, square = (total[:, :count].cumsum(1) for total in totals)
    errors = square - 2 * shifts * linear + shifts.square() * none
    return torch.empty_like(errors).scatter_(1, order, errors)


def search_noise(
    method: NoisyQuant,
    unit: Tensor,
    rows: Tensor,
    scale: Tensor,
    signed: bool,
    *,
    taps: int = 1,
    weight: Tensor | None = None,
) -> tuple[float, float]:
    """Mean and amplitude of the noise, in units of the scale, with the least squared error.

    Args:
        unit: (C,) u.
        rows: (C * taps, K) kept values.
        scale: broadcasts to rows.
        taps: rows per channel (kernel taps of a convolution; 1 otherwise).
        weight: (O, C * taps), the next linear layer, for objective="output".

    Returns:
        (mean, amplitude). The first candidate wins a tie: no noise, if nothing beats it.
    """
    low, high = code_range(method.bits, signed)
    unit = unit.to(rows.device).double().repeat_interleave(taps)

    def best(candidates: Tensor, shifts: Tensor) -> float:
        if weight is None:
            errors = noise_errors(rows, scale, shifts, low, high).sum(0)
        else:
            step = scale.double().expand(rows.shape)
            safe = torch.where(step > 0, step, 1)
            x = rows.double()
            errors = torch.stack(
                [
                    output_error(((x / safe + t[:, None]).round().clamp(low, high) - t[:, None]) * step - x, weight)
                    for t in shifts.T
                ]
            )
        return float(candidates[int(errors.argmin())])

    mean, amplitude = method.mean, method.amplitude
    if mean is None:
        # zero first: it wins a tie
        candidates = torch.cat([MEANS[MEANS == 0], MEANS[MEANS != 0]]).to(rows.device)
        mean = best(candidates, candidates.expand(len(rows), -1))
    if amplitude is None:
        candidates = AMPLITUDES.to(rows.device)
        amplitude = best(candidates, mean + unit[:, None] * candidates)
    return mean, amplitude
