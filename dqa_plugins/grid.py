"""The normal form: once its quantization parameters are known, every method is this one arithmetic.

    q     = clamp(round((x + bias) / step) + zero_point, low, high)
    x_hat = (q - zero_point) * step - bias,     and x itself strictly outside of keep = (a, b)

Direct: a step. DQA: a step and a code range for each channel. NoisyQuant: a bias. Asymmetric Direct: a zero point.
Dense+Sparse: a zero point and keep. Whatever computes, exports, packs, searches or checks takes a Grid and asks no
method for its class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels import eager
from .rounding import bound, cast, like, narrow, nonzero, straight_through, wants_gradient


class QParams(NamedTuple):
    """Quantization parameters of one tensor: a scale, or two thresholds a <= b. The unused fields are None."""

    scale: Tensor | None
    lower: Tensor | None = None
    upper: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> QParams:
        """Apply a function to each parameter that is there."""
        return QParams(*(None if p is None else function(p) for p in self))

    @property
    def thresholds(self) -> tuple[Tensor, Tensor]:
        """(a, b) of qparams that have them."""
        if self.lower is None or self.upper is None:
            raise TypeError("these qparams are a scale")
        return self.lower, self.upper


@dataclass(frozen=True, eq=False)
class Grid:
    """The numbers that fake-quantize a tensor.

    Every tensor is in the compute dtype of x (float32; float64 for float64) and broadcasts against x: () for a whole
    tensor, (B, 1, ...) per sample, (1, C, 1, ...) per channel, (B, C, 1, ...) for both.

    Args:
        step: width of a step, unit of x, >= 0. Where it is 0 every value becomes -bias.
        low, high: smallest and largest code, integers or float tensors with integer values.
        zero_point: the code of zero, float with integer values; None: 0.
        bias: added before and removed after, unit of x; None: 0.
        keep: (a, b), unit of x: values strictly outside stay as they are, bit for bit. None: none do.
        exact_zero: the zero point before it was rounded (another backend may round it the other way at a tie).
        divisor: the step, infinite where it is 0, if it is known already.
    """

    step: Tensor
    low: Tensor | int
    high: Tensor | int
    zero_point: Tensor | None = None
    bias: Tensor | None = None
    keep: tuple[Tensor, Tensor] | None = None
    exact_zero: Tensor | None = None
    divisor: Tensor | None = None

    @classmethod
    def affine(cls, lower: Tensor, upper: Tensor, bits: int, *, keep: bool = False) -> Grid:
        """The grid of a range [a, b] (QPP paper, eq. 12): s = (b - a) / (2^n - 1), z = round(-a / s).

        Args:
            lower, upper: a and b, unit of x, equal shapes. An empty range, b <= a, gives a for every value.
            bits: n; codes are unsigned.
            keep: values strictly outside [a, b] stay in float (eq. 11).
        """
        # of the halves, which is the same number: b - a itself overflows where both are near the largest float.
        # Times 0.5, not by 2: OpenVINO 2026.4 computes `upper / 2 - lower / 2` of two reductions wrongly, in silence
        step = torch.clamp(upper * 0.5 - lower * 0.5, min=0) / ((2**bits - 1) / 2)
        exact = -lower / nonzero(step)
        bias = torch.where(step > 0, torch.zeros_like(lower), -lower)
        return cls(step, 0, 2**bits - 1, torch.round(exact), bias, (lower, upper) if keep else None, exact)

    # ------------------------------------------------------------ the arithmetic

    def _codes(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of y, in the compute dtype, before and after the clamp."""
        if self.bias is not None:
            y = y + self.bias
        rounded = torch.round(y / (nonzero(self.step) if self.divisor is None else self.divisor))
        if self.zero_point is not None:
            rounded = rounded + self.zero_point
        return rounded, bound(rounded, self.low, self.high)

    def values(self, codes: Tensor) -> Tensor:
        """(codes - zero_point) * step - bias, in the compute dtype.

        Args:
            codes: integers or integer values, the shape of x.
        """
        codes = cast(codes, self.step.dtype)
        values = (codes if self.zero_point is None else codes - self.zero_point) * self.step
        return values if self.bias is None else values - self.bias

    def outside(self, x: Tensor) -> Tensor | None:
        """bool, the shape of x: strictly outside of keep. None where nothing is kept."""
        if self.keep is None:
            return None
        y = cast(x, self.step.dtype)
        return (y < self.keep[0]) | (y > self.keep[1])

    def codes(self, x: Tensor) -> Tensor:
        """int32, the shape of x: the whole code q of every value; 0 where x is kept in float."""
        codes = self._codes(cast(x, self.step.dtype))[1].to(torch.int32)
        outside = self.outside(x)
        return codes if outside is None else codes.masked_fill(outside, 0)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Quantize and dequantize, in the dtype of x. NaN stays NaN.

        Straight-through gradient inside the code range and zero outside of it; one everywhere where values are kept.
        """
        if self.step.dtype is torch.float32 and eager.usable(x) and (table := self.table(x)) is not None:
            return eager.fake_quantize(x, table)
        detached = x.detach() if wants_gradient(x) else x
        rounded, codes = self._codes(cast(detached, self.step.dtype))
        x_hat = narrow(self.values(codes), x.dtype)
        outside = self.outside(detached)
        if outside is not None:
            return straight_through(x, torch.where(outside, detached, x_hat), None)
        return straight_through(x, x_hat, (rounded, codes))

    def table(self, x: Tensor) -> eager.Table | None:
        """What the kernel reads for x; None where it does not serve this grid."""
        lower, upper = self.keep or (None, None)
        parameters = (self.step, self.divisor, self.low, self.high, self.zero_point, self.bias, lower, upper)
        return eager.table_of(x, parameters)

    def tie_distance(self, x: Tensor) -> Tensor:
        """Distance of each value of x to where its result jumps, in steps: a rounding tie, or an end of keep."""
        step = nonzero(self.step)
        y = (x if self.bias is None else x + self.bias) / step
        distance = _to_tie(y)
        if self.exact_zero is not None:  # on a tie of its own the zero point moves every value
            distance = torch.minimum(distance, _to_tie(self.exact_zero))
        if self.keep is not None:
            ends = torch.minimum((x - self.keep[0]).abs(), (x - self.keep[1]).abs())
            distance = torch.minimum(distance, ends / step)
        return distance

    # ------------------------------------------------------------ other forms of the same numbers

    def map(self, function: Callable[[Tensor], Tensor]) -> Grid:
        """The grid with a function applied to each of its tensors (to lay them out, to move them)."""

        def mapped(value: object) -> object:
            if isinstance(value, tuple):
                return tuple(function(v) for v in value)
            return function(value) if isinstance(value, Tensor) else value

        return Grid(**{f.name: mapped(getattr(self, f.name)) for f in fields(self)})  # type: ignore[arg-type]

    def width(self) -> int:
        """Bits of the widest code."""
        codes = torch.as_tensor(self.high).max() - torch.as_tensor(self.low).min()
        return int(codes).bit_length()

    def bits(self) -> float:
        """Bits of a fixed-length code, mean over the channels."""
        return float(torch.log2(torch.as_tensor(self.high - self.low, dtype=torch.float64) + 1).mean())

    def scaled(self, scale: Tensor) -> Grid:
        """The grid of another scale, where this one is that of scale 1 and has no range."""
        bias = None if self.bias is None else self.bias * scale
        return Grid(self.step * scale, self.low, self.high, self.zero_point, bias)

    def to(self, x: Tensor) -> Grid:
        """In the compute dtype of x, on its device, without gradient."""
        return self.map(lambda p: like(p, x))

    def constants(self) -> Grid:
        """Ready to be written down: the divisor is known, and a bias that is zero everywhere is left out."""
        bias = self.bias if self.bias is not None and bool((self.bias != 0).any()) else None
        return replace(self, bias=bias, divisor=nonzero(self.step))


def _to_tie(y: Tensor) -> Tensor:
    return (y - y.floor() - 0.5).abs()
