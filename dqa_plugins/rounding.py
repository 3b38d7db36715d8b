"""Rounding, clamping, casts and gradients: the pieces that `functional` and `Grid` are made of.

Arithmetic is float32 whatever the input (float64 input: float64). round is half to even; a value is divided by its
step, never multiplied by the inverse (they differ at ties).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

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


def like(parameter: Tensor, x: Tensor) -> Tensor:
    """A parameter in the compute dtype of x, on its device, without gradient; itself where it is that already."""
    dtype = compute_dtype(x.dtype)
    if parameter.dtype != dtype or parameter.device != x.device:
        parameter = parameter.to(x.device, dtype)
    return parameter.detach() if parameter.requires_grad else parameter


def narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in the dtype of a result: a value that float16 or bfloat16 cannot hold becomes the largest that it can."""
    if x.dtype == dtype or dtype not in (torch.float16, torch.bfloat16):
        return cast(x, dtype)
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype)


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
    """True if a backward pass, or forward-mode differentiation, may reach x."""
    # while exporting there is no backward pass, and the graph must stay plain aten
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return False
    return (x.requires_grad and torch.is_grad_enabled()) or forward_ad._current_level >= 0


def straight_through(x: Tensor, x_hat: Tensor, codes: tuple[Tensor, Tensor] | None) -> Tensor:
    """x_hat, with the gradient of x where clamping left the code alone (codes None: everywhere)."""
    if not wants_gradient(x):
        return x_hat
    inside = torch.ones_like(x_hat, dtype=torch.bool) if codes is None else codes[0] == codes[1]
    result: Tensor = StraightThrough.apply(x, x_hat, inside)
    return result


class StraightThrough(torch.autograd.Function):
    """Returns a copy of `value`; its gradient goes to x where `inside`, and is zero elsewhere."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, value: Tensor, inside: Tensor) -> Tensor:
        # a copy: an input returned as it is would be a view, which no in-place operation behind may touch
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])
        ctx.save_for_forward(inputs[2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] * ctx.saved_tensors[0], None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        tangent: Tensor = tangents[0]
        return tangent * ctx.saved_tensors[0]
