"""What a calibrated quantizer becomes for Brevitas: an integer grid, or a typed error that says why it has none.

An IntQuantTensor has one scale and one bit width: per-channel ones break its `is_valid` and `int()`, and a
convolution with as many inputs as outputs takes them for those of its outputs, in silence (0.13.4). So DQA reports the
grid that all its channels share, step delta / 2^m and n + m bits: every value of every channel lies on it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dqa_plugins.errors import UnsupportedCombination
from dqa_plugins.grid import QParams
from dqa_plugins.method import Method
from dqa_plugins.quantizer import ActivationQuantizer

_SMALLEST_SCALE = 1e-10  # Brevitas' own scaling_min_val: an all-zero site still gets a scale one can divide by


class CommonGrid(NamedTuple):
    """The metadata of an IntQuantTensor, value = (code - zero_point) * scale.

    scale: () unit of x. zero_point: () in codes. bit_width: () float, as Brevitas wants it. signed: of the codes.
    """

    scale: Tensor
    zero_point: Tensor
    bit_width: Tensor
    signed: bool


def why_no_common_grid(method: Method) -> str | None:
    """The reason why outputs of a method are no IntQuantTensors; None if they are."""
    one = torch.ones(1)
    found = QParams(None, -one, one) if method.uses_range else QParams(one)
    grid = method.grid(found, True, {name: one.long() for name in method.vectors}).constants()
    if grid.keep is not None:
        return "Dense+Sparse keeps outliers in float, which lie on no integer grid"
    if grid.bias is not None:
        return "NoisyQuant subtracts noise of each channel after dequantizing, which leaves no integer grid"
    if method.qparams != "static":
        return "dynamic and predicted scales are one per sample, and Brevitas takes an axis of a scale for the channels"
    if method.granularity != "tensor":
        return "scales of each channel break IntQuantTensor.is_valid and the convolution behind it"
    return None


def require_common_grid(method: Method, label: str) -> None:
    """Raise unless outputs of the method are IntQuantTensors.

    Raises:
        UnsupportedCombination: with the reason and the way out.
    """
    reason = why_no_common_grid(method)
    if reason is not None:
        raise UnsupportedCombination(
            f"{label} cannot give the QuantTensor that its layer asks for: {reason}. Give return_quant_tensor=False "
            "(and no bias_quant that needs an input scale), or use Direct or DQA with qparams='static' and "
            "granularity='tensor' here."
        )


def common_grid(quantizer: ActivationQuantizer) -> CommonGrid:
    """The grid on which every output of a calibrated quantizer lies.

    Raises:
        UnsupportedCombination: there is none.
    """
    require_common_grid(quantizer.method, quantizer.label)
    grid = quantizer.static_grid
    scale = grid.step.min()
    zero_point = torch.zeros_like(scale) if grid.zero_point is None else grid.zero_point.reshape(())
    signed = quantizer.signed and not quantizer.method.uses_range
    return CommonGrid(_positive(scale), zero_point, torch.full_like(scale, grid.width()), signed)


def _positive(scale: Tensor) -> Tensor:
    return scale.clamp(min=_SMALLEST_SCALE)
