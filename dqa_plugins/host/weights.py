"""Quantized weights in one form, whichever host quantized them.

Each room installs a reader, which finds the weights that its host's converted models quantize. `quantized_weights`
asks all of them, and so knows no host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dqa_plugins.errors import FrameworkMismatch
from dqa_plugins.operators import dequantize


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight as integers: weight = (codes - zero_point) * scale.

    Args:
        codes: int8 or uint8, the shape of the weight.
        scale: () or (C,), unit of the weight. float32, or float64 where the host divides by 1 / scale: a product in
            float64, rounded once, equals that quotient bit for bit.
        zero_point: the shape of scale, in codes.
        axis: of the C channels in codes; None where scale is ().
        dtype: of the weight.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int | None
    dtype: torch.dtype = torch.float32

    @classmethod
    def laid_out(cls, codes: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> QuantizedWeight | None:
        """From a scale and a zero point that broadcast against codes; None where they vary along several axes."""
        scale, zero_point = torch.broadcast_tensors(scale, zero_point)
        if scale.numel() == 1:
            return cls(codes, scale.reshape(()), zero_point.reshape(()), None, dtype)
        axes = [i for i in range(-scale.ndim, 0) if scale.shape[i] > 1]
        if len(axes) > 1 or scale.shape[axes[0]] != codes.shape[axes[0]]:
            return None
        axis = axes[0] + codes.ndim
        return cls(codes, scale.reshape(-1).clone(), zero_point.reshape(-1).clone(), axis, dtype)

    def dequantize(self) -> Tensor:
        """The weight that the converted model computes with, bit for bit."""
        return dequantize(self.codes, self.scale, self.zero_point, self.axis, self.dtype)


class WeightSite(NamedTuple):
    """A quantized weight where a reader found it.

    name: of the parameter, qualified. replace: let the model that was read compute this weight by our dequantize
    operator, in place of the host's quantizer.
    """

    name: str
    weight: QuantizedWeight
    replace: Callable[[], None]


Reader = Callable[[nn.Module], Iterable[WeightSite]]
_READERS: dict[str, Reader] = {}


def install_reader(room: str, reader: Reader) -> None:
    """Let `quantized_weights` find the weights of one host.

    Raises:
        FrameworkMismatch: the room has another reader already.
    """
    if _READERS.setdefault(room, reader) is not reader:
        raise FrameworkMismatch(f"the room {room!r} has installed a reader of weights already.")


def weight_sites(model: nn.Module) -> Iterator[WeightSite]:
    """Every quantized weight of a converted model, host by host."""
    for reader in _READERS.values():
        yield from reader(model)


def quantized_weights(model: nn.Module) -> dict[str, QuantizedWeight]:
    """The quantized weights of a converted model.

    Args:
        model: converted by any of the rooms.

    Returns:
        {qualified name of the parameter: its QuantizedWeight}. Weights that no integers of 8 bits and one scale or one
        per channel describe (float formats, groups, more bits) are not listed.
    """
    with torch.no_grad():
        return {site.name: site.weight for site in weight_sites(model)}


class _Dequantize(nn.Module):
    """Computes a parameter from the three tensors that stand for it (a parametrization of torch)."""

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self._weight = weight

    def forward(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return dequantize(codes, scale, zero_point, self._weight.axis, self._weight.dtype)

    def right_inverse(self, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._weight.codes, self._weight.scale, self._weight.zero_point


def hold(owner: nn.Module, name: str, weight: QuantizedWeight) -> None:
    """Let a module compute one of its parameters by our dequantize operator.

    Args:
        owner: its attribute `name` becomes a property, and the float parameter is dropped.
        name: of the parameter, not qualified.
    """
    parameter: Any = getattr(owner, name)
    delattr(owner, name)
    owner.register_buffer(name, parameter.detach())  # integers are no parameters
    # unsafe: codes have another dtype and a scale another shape than the weight
    parametrize.register_parametrization(owner, name, _Dequantize(weight), unsafe=True)
