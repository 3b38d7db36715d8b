"""Gradients through packed values: straight-through, like those of the quantizer that packing stands for.

Packed bytes have no gradient of their own. Beside them goes a tensor of the value's shape that takes no memory and
stands for it in the autograd graph: what is unpacked hands its gradient to it, and it hands that on to the value.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ...quantizer import ActivationQuantizer
from ..format.data import two_dimensional
from ..packed import PackedActivation


@dataclass(frozen=True, eq=False, repr=False)
class DifferentiablePacked(PackedActivation):
    """A packed activation whose unpacked values pass gradients on to `anchor`, of the shape of the tensor."""

    anchor: Tensor | None = None


def with_gradient(
    packed: PackedActivation,
    x: Tensor,
    quantizer: ActivationQuantizer,
    source: Tensor | None,
    prediction: Tensor | None = None,
) -> PackedActivation:
    """`packed`, made from x, so that a gradient reaches x."""
    anchor = _Anchor.apply(x, _inside(x, quantizer, x if source is None else source, prediction))
    return DifferentiablePacked(**{f.name: getattr(packed, f.name) for f in fields(packed)}, anchor=anchor)


def unpack(packed: PackedActivation) -> Tensor:
    """The unpacked tensor, with a gradient where one was wanted."""
    if isinstance(packed, DifferentiablePacked):
        result: Tensor = _Unpacked.apply(packed.anchor, packed)
        return result
    return packed.unpack()


def _inside(x: Tensor, quantizer: ActivationQuantizer, source: Tensor, prediction: Tensor | None) -> Tensor | None:
    """bool, the shape of x: where the quantizer passes a gradient on; None: everywhere."""
    shape = two_dimensional(tuple(source.shape))
    with torch.enable_grad():
        probe = x.detach().reshape(two_dimensional(tuple(x.shape))).requires_grad_()
        quantized = quantizer.grid(source.detach().reshape(shape), prediction).fake_quantize(probe)
        (gradient,) = torch.autograd.grad(quantized.sum(), probe)
    inside = gradient.reshape(x.shape) != 0
    return None if bool(inside.all()) else inside


class _Anchor(torch.autograd.Function):
    """Nothing but a shape; passes gradients on to x where `inside`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inside: Tensor | None) -> Tensor:
        ctx.save_for_backward(inside)
        return x.new_zeros(()).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return (grads[0] if inside is None else grads[0] * inside), None


class _Unpacked(torch.autograd.Function):
    """Unpacks; the gradient goes to the anchor."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, packed: PackedActivation) -> Tensor:
        return packed.unpack()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
