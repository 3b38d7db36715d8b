"""The uniform grid that all methods share: rounding, clamping, zero scales, gradients.

The pieces under `functional`; its conventions hold here too.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .errors import ChannelAxisError, ChannelMismatch

# 2^k for k in -16..16 as exact constants: exp2 and pow may be one unit in the last place off on some devices.
_POWERS = [2.0**k for k in range(-16, 17)]


def power_of_two(exponent: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """2^exponent, exactly. exponent: integers in [-16, 16], any shape."""
    return torch.tensor(_POWERS, dtype=dtype, device=exponent.device)[exponent.long() + 16]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a tensor of this dtype is quantized: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    """Smallest and largest n-bit code: [-2^(n-1), 2^(n-1) - 1] signed, [0, 2^n - 1] unsigned."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def along_channels(vector: Tensor, x: Tensor, channel_axis: int) -> Tensor:
    """Lay a (C,) vector along the channel axis of x, so that it broadcasts.

    Raises:
        ChannelAxisError: x has no such axis, or it is the batch.
        ChannelMismatch: the vector does not have one entry per channel of x.
    """
    axis = channel_axis + x.ndim if channel_axis < 0 else channel_axis
    if not 0 < axis < x.ndim:
        raise ChannelAxisError(
            f"channel axis {channel_axis} does not exist, or is the batch, in a tensor of shape {tuple(x.shape)}."
        )
    if vector.shape != (x.shape[axis],):
        raise ChannelMismatch(
            f"a per-channel vector of shape {tuple(vector.shape)} does not fit axis {channel_axis} of a tensor of "
            f"shape {tuple(x.shape)}, which has {x.shape[axis]} channels."
        )
    return vector.reshape([-1 if i == axis else 1 for i in range(x.ndim)])


def nonzero(scale: Tensor) -> Tensor:
    """The scale as a safe divisor: infinite where it is 0, so that every finite value gets code 0 and value 0."""
    return torch.where(scale > 0, scale, math.inf)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a dtype; x itself where it has it: `.to` would leave a node in exported graphs."""
    return x if x.dtype == dtype else x.to(dtype)


def prepare(x: Tensor, *parameters: Any) -> tuple[Tensor, ...]:
    """x and its parameters in the compute dtype, on the device of x, without gradient."""
    dtype = compute_dtype(x.dtype)
    moved = []
    for p in parameters:
        if not isinstance(p, Tensor) or p.dtype != dtype or p.device != x.device:
            p = torch.as_tensor(p, dtype=dtype, device=x.device)
        moved.append(p.detach() if p.requires_grad else p)
    return (cast(x, dtype), *moved)


def bound(values: Tensor, low: Tensor | int, high: Tensor | int) -> Tensor:
    """values clamped to [low, high], integers or tensors that broadcast."""
    if isinstance(low, int) and isinstance(high, int):
        return torch.clamp(values, low, high)
    # ONNX Clip takes scalar bounds only: Max, then Min
    low, high = (v if isinstance(v, Tensor) else torch.tensor(v) for v in (low, high))
    return torch.minimum(torch.maximum(values, low), high)


def wants_gradient(x: Tensor) -> bool:
    """True if a backward pass may reach x."""
    # while exporting there is no backward pass, and the graph must stay plain aten
    exporting = torch.compiler.is_exporting() or torch.jit.is_tracing()
    return x.requires_grad and torch.is_grad_enabled() and not exporting


def straight_through(x: Tensor, x_hat: Tensor, codes: tuple[Tensor, Tensor] | None) -> Tensor:
    """x_hat, with the gradient of x where clamping left the code alone (codes None: everywhere)."""
    if not wants_gradient(x):
        return x_hat
    inside = None if codes is None else codes[0] == codes[1]
    return StraightThrough.apply(x, x_hat, inside)


class StraightThrough(torch.autograd.Function):
    """Returns `value` in the forward pass; its gradient goes to x where `inside`, and is zero elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, inside: Tensor | None) -> Tensor:
        if inside is not None:
            ctx.save_for_backward(inside)
        if value is x:
            return value.clone()
        # fresh and ours: an input returned as it is would be a view, which no in-place operation behind may touch
        ctx.mark_dirty(value)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (grad,) = grads
        return (grad * ctx.saved_tensors[0] if ctx.saved_tensors else grad), None, None


def grid_fake_quantize(
    x: Tensor,
    scale: Tensor,
    low: Tensor | int,
    high: Tensor | int,
    *,
    bias: Tensor | None = None,
    divisor: Tensor | None = None,
) -> Tensor:
    """scale * clamp(round((x + bias) / scale), low, high) - bias: the step that Direct, DQA and NoisyQuant share.

    Args:
        x: any shape, floating point.
        scale: broadcasts against x, unit of x.
        low, high: smallest and largest code, integers or float tensors which broadcast against x.
        bias: added before and removed after, unit of x (NoisyQuant).
        divisor: `nonzero(scale)`, if the caller has it already.
    """
    detached = x.detach() if wants_gradient(x) else x
    y, scale = prepare(detached, scale)
    if bias is not None:
        y = y + bias
    rounded = torch.round(y / (nonzero(scale) if divisor is None else divisor))
    codes = bound(rounded, low, high)
    x_hat = codes * scale if bias is None else codes * scale - bias
    return straight_through(x, cast(x_hat, x.dtype), (rounded, codes))
