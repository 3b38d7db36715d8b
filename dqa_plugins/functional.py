"""The quantization maths as pure functions, to be read beside the papers.

One implementation of the numerics for every adapter, backend and test. Plain torch, any device. Conventions:

- Arithmetic is float32 whatever the input (float64 input: float64), with one final cast to the input's dtype.
- round is half to even; a value is divided by its scale, never multiplied by the inverse (they differ at ties).
- `scale`, `lower`, `upper` broadcast against x: () for a whole tensor, (B, 1, ...) per sample, (1, C, 1, ...) per
  channel. Their unit is that of x. A scale of zero (an all-zero tensor or channel) gives zeros, never NaN.
- Per-channel vectors (`extra_bits`, `noise`) are (C,) and are laid along `channel_axis`.
- The `*_fake_quantize` functions are differentiable: straight-through inside the clip range, zero outside it;
  one everywhere for Dense+Sparse. Parameters get no gradient.

Notation of the papers: n = bits, m = extra bits, delta_n = scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rounding import (
    along_channels,
    bound,
    code_range,
    compute_dtype,
    narrow,
    nonzero,
    power_of_two,
    prepare,
    straight_through,
    wants_gradient,
)

# ---------------------------------------------------------------- Direct


def direct_quantize(
    x: Tensor,
    scale: Tensor,
    bits: int,
    *,
    signed: bool = True,
    zero_point: Tensor | None = None,
    clamp: bool = True,
) -> Tensor:
    """Codes of Direct: clamp(round(x / scale)) (DQA paper, eq. 1); with a zero point, eq. 12 of the QPP paper.

    Args:
        x: (B, ...) floating point.
        scale: broadcasts against x, unit of x.
        bits: n.
        signed: two's complement codes; ignored with a zero point, whose codes are unsigned.
        zero_point: broadcasts against x, in codes: clamp(round(x / scale) + zero_point, 0, 2^n - 1).
        clamp: False reproduces the paper, whose top code 2^(n-1) needs one more bit.

    Returns:
        int16, the shape of x (int32 where clamp is False).
    """
    y, scale = prepare(x, scale)
    codes = torch.round(y / nonzero(scale))
    if zero_point is not None:
        codes, signed = codes + zero_point, False
    if not clamp:
        return codes.to(torch.int32)
    return codes.clamp(*code_range(bits, signed)).to(torch.int16)


def direct_dequantize(codes: Tensor, scale: Tensor, *, zero_point: Tensor | None = None) -> Tensor:
    """scale * (codes - zero_point), in the dtype of scale.

    Args:
        codes: integers, any shape.
        scale, zero_point: broadcast against codes.
    """
    codes = codes.to(scale.dtype)
    return (codes if zero_point is None else codes - zero_point) * scale


def direct_fake_quantize(x: Tensor, scale: Tensor, bits: int, *, signed: bool = True, clamp: bool = True) -> Tensor:
    """direct_dequantize(direct_quantize(x)), in the dtype of x, differentiable. Symmetric; see `affine_*` for a, b."""
    if not clamp:
        y, scale = prepare(x, scale)
        return narrow(torch.round(y / nonzero(scale)) * scale, x.dtype)
    return _uniform(x, scale, *code_range(bits, signed))


def _uniform(x: Tensor, step: Tensor, low: Tensor | int, high: Tensor | int, bias: Tensor | float = 0.0) -> Tensor:
    """step * clamp(round((x + bias) / step), low, high) - bias: what Direct, DQA and NoisyQuant share."""
    y, step = prepare(x.detach() if wants_gradient(x) else x, step)
    rounded = torch.round((y + bias) / nonzero(step))
    codes = bound(rounded, low, high)
    return straight_through(x, narrow(codes * step - bias, x.dtype), (rounded, codes))


# ---------------------------------------------------------------- asymmetric Direct, and the dense part of D+S


def affine_qparams(lower: Tensor, upper: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the range [lower, upper] (QPP paper, eq. 12).

    s = (b - a) / (2^n - 1), z = round(-a / s); where b <= a, s = 0 and z is of no consequence.

    Args:
        lower, upper: a and b, unit of x, any shape (equal).
    """
    # of the halves, which is the same number: b - a itself overflows where both are near the largest float
    scale = torch.clamp(upper * 0.5 - lower * 0.5, min=0) / ((2**bits - 1) / 2)
    return scale, torch.round(-lower / nonzero(scale))


def affine_fake_quantize(x: Tensor, lower: Tensor, upper: Tensor, bits: int) -> Tensor:
    """(clamp(round(x / s) + z, 0, 2^n - 1) - z) * s: Direct with `symmetric=False`, values outside [a, b] clamped.

    Args:
        x: any shape, floating point.
        lower, upper: a <= b, broadcast against x, unit of x. Where a == b the result is a.
    """
    y, lower, upper = prepare(x.detach() if wants_gradient(x) else x, lower, upper)
    rounded, codes, dense = _affine(y, lower, upper, bits)
    return straight_through(x, narrow(dense, x.dtype), (rounded, codes))


def _affine(y: Tensor, lower: Tensor, upper: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes before and after the clamp, and the value of the clamped ones; a where the range is empty."""
    scale, zero_point = affine_qparams(lower, upper, bits)
    rounded = torch.round(y / nonzero(scale)) + zero_point
    codes = rounded.clamp(0, 2**bits - 1)
    dense = (codes - zero_point) * scale
    # NaN, and an infinite range, stay NaN
    return rounded, codes, torch.where(scale == 0, lower + 0 * y, dense)


# ---------------------------------------------------------------- DQA


def dqa_grid(scale: Tensor, extra_bits: Tensor, bits: int, *, signed: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """The fine grid of each channel: step delta_n / 2^m and the range of the (n+m)-bit code.

    Args:
        scale: delta_n, broadcasts against extra_bits.
        extra_bits: m per channel, integers (negative: coarser), any shape.
        bits: n.

    Returns:
        (step, low, high), floating point in the dtype of scale; low and high have the shape of extra_bits.
    """
    width = power_of_two(extra_bits + bits - int(signed), scale.dtype)
    step = scale * power_of_two(-extra_bits, scale.dtype)
    return step, (-width if signed else torch.zeros_like(width)), width - 1


def dqa_quantize(
    x: Tensor,
    scale: Tensor,
    extra_bits: Tensor,
    bits: int,
    *,
    signed: bool = True,
    channel_axis: int = 1,
    clamp: bool = True,
) -> tuple[Tensor, Tensor]:
    """Quantize with per-channel extra bits, then shift them off (DQA paper, algorithm 1, lines 5 to 8).

    q = clamp(round(x / (delta_n / 2^m))) in n+m bits; code = q >> m, shift_error = q & (2^m - 1). Where m is
    negative the channel is coarser: q has n+m bits, is the code itself, and there is no shift error.

    Args:
        x: (B, C, ...) floating point, the activation.
        scale: delta_n, the width of one n-bit step, unit of x; broadcasts against x.
        extra_bits: (C,) integers, m on important channels, 0 on the others.
        bits: n, the width of a stored code.
        signed: two's complement codes, else unsigned.
        clamp: False reproduces the paper: the top code may need one more bit.

    Returns:
        codes: int16 (int32 where clamp is False), the shape of x: n-bit values.
        shift_errors: uint8, the shape of x: the m bits shifted off; 0 where m is 0.

    Raises:
        ChannelMismatch: extra_bits does not have one entry per channel of x.
    """
    y, scale = prepare(x, scale)
    extra = along_channels(extra_bits.to(x.device), x, channel_axis)
    step, low, high = dqa_grid(scale, extra, bits, signed=signed)
    q = torch.round(y / nonzero(step))
    q = (bound(q, low, high) if clamp else q).to(torch.int32)
    shift = extra.clamp(min=0).to(torch.int32)
    codes = q >> shift  # arithmetic: rounds towards minus infinity, so the shift error is never negative
    shift_errors = (q - (codes << shift)).to(torch.uint8)
    return codes.to(torch.int16 if clamp else torch.int32), shift_errors


def dqa_dequantize(
    codes: Tensor, shift_errors: Tensor, scale: Tensor, extra_bits: Tensor, *, channel_axis: int = 1
) -> Tensor:
    """delta_n * (code + shift_error / 2^m), computed as delta_{n+m} * q, which it is exactly (eq. 3, algorithm 2).

    Args:
        codes, shift_errors: as `dqa_quantize` returned them.
        scale: delta_n, broadcasts against codes.
        extra_bits: (C,) integers.
    """
    extra = along_channels(extra_bits.to(codes.device), codes, channel_axis)
    q = (codes.to(torch.int32) << extra.clamp(min=0).to(torch.int32)) + shift_errors.to(torch.int32)
    return q.to(scale.dtype) * (scale * power_of_two(-extra, scale.dtype))


def dqa_fake_quantize(
    x: Tensor,
    scale: Tensor,
    extra_bits: Tensor,
    bits: int,
    *,
    signed: bool = True,
    channel_axis: int = 1,
) -> Tensor:
    """dqa_dequantize(dqa_quantize(x)): a per-channel step and a per-channel clip range. Differentiable."""
    extra = along_channels(extra_bits.to(x.device), x, channel_axis)
    scale = torch.as_tensor(scale, dtype=compute_dtype(x.dtype), device=x.device)
    return _uniform(x, *dqa_grid(scale, extra, bits, signed=signed))


# ---------------------------------------------------------------- NoisyQuant


def noisyquant_quantize(
    x: Tensor, scale: Tensor, noise: Tensor, bits: int, *, signed: bool = True, channel_axis: int = 1
) -> Tensor:
    """Codes of x + N, with N = noise * scale (NoisyQuant, CVPR 2023, eq. 4).

    Args:
        x: (B, C, ...) floating point.
        scale: broadcasts against x, unit of x.
        noise: (C,) in units of the scale: u * amplitude, u drawn once per channel from U(-1, 1).
    """
    y, scale, noise = prepare(x, scale, noise)
    return direct_quantize(y + along_channels(noise, x, channel_axis) * scale, scale, bits, signed=signed)


def noisyquant_dequantize(codes: Tensor, scale: Tensor, noise: Tensor, *, channel_axis: int = 1) -> Tensor:
    """scale * codes - N, with N = noise * scale."""
    bias = along_channels(noise.to(scale.dtype), codes, channel_axis) * scale
    return codes.to(scale.dtype) * scale - bias


def noisyquant_fake_quantize(
    x: Tensor, scale: Tensor, noise: Tensor, bits: int, *, signed: bool = True, channel_axis: int = 1
) -> Tensor:
    """Q(x + N) - N with N = noise * scale, rounded to the dtype of x once. Differentiable."""
    dtype = compute_dtype(x.dtype)
    scale, noise = (torch.as_tensor(v, dtype=dtype, device=x.device) for v in (scale, noise))
    bias = along_channels(noise, x, channel_axis) * scale
    return _uniform(x, scale, *code_range(bits, signed), bias)


def noisyquant_fold_bias(weight: Tensor, bias: Tensor | None, noise: Tensor) -> Tensor:
    """B' = B - W N: the bias of the next Linear that makes removing the noise unnecessary (NoisyQuant, eq. 6).

    Args:
        weight: (O, C).
        bias: (O,) or None.
        noise: N itself (C,), in units of x.
    """
    removed = weight @ noise.to(weight.dtype)
    return -removed if bias is None else bias - removed


# ---------------------------------------------------------------- Dense+Sparse


def dense_sparse_quantize(x: Tensor, lower: Tensor, upper: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of the dense part and the mask of the sparse part (QPP paper, eq. 11).

    Args:
        x: (B, ...) floating point.
        lower, upper: thresholds a <= b, broadcast against x, unit of x.
        bits: n.

    Returns:
        codes: int16, the shape of x; 0 under the mask.
        outliers: bool, the shape of x: strictly below a or strictly above b. The sparse values are x[outliers].
    """
    y, lower, upper = prepare(x, lower, upper)
    scale, zero_point = affine_qparams(lower, upper, bits)
    outliers = (y < lower) | (y > upper)
    codes = (torch.round(y / nonzero(scale)) + zero_point).clamp(0, 2**bits - 1)
    return torch.where(outliers | (scale <= 0), torch.zeros_like(codes), codes).to(torch.int16), outliers


def dense_sparse_dequantize(
    codes: Tensor, outliers: Tensor, values: Tensor, lower: Tensor, upper: Tensor, bits: int
) -> Tensor:
    """(codes - z) * s on the dense part, the values themselves on the sparse part.

    Args:
        codes, outliers: as `dense_sparse_quantize` returned them.
        values: (k,) x[outliers], in row-major order.
        lower, upper: thresholds, broadcast against codes.

    Returns:
        the dtype of values, the shape of codes.
    """
    scale, zero_point = affine_qparams(lower, upper, bits)
    dense = torch.where(scale > 0, (codes.to(scale.dtype) - zero_point) * scale, lower).to(values.dtype)
    return dense.masked_scatter(outliers, values)


def dense_sparse_fake_quantize(x: Tensor, lower: Tensor, upper: Tensor, bits: int) -> Tensor:
    """Eq. 11 with a clamp: quantized inside [a, b]; x itself, bit for bit, strictly outside. Gradient one everywhere.

    Where b <= a, values equal to a give a and all else is an outlier: x itself.

    Args:
        x, lower, upper, bits: as `affine_fake_quantize`.
    """
    detached = x.detach() if wants_gradient(x) else x
    y, lower, upper = prepare(detached, lower, upper)
    dense = narrow(_affine(y, lower, upper, bits)[2], x.dtype)
    outside = (y < lower) | (y > upper)
    return straight_through(x, torch.where(outside, detached, dense), None)
