"""Quantized weights of Brevitas: what the weight_quant proxy of a layer makes of its parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from brevitas.nn.mixin.parameter import QuantWeightMixin
from brevitas.quant_tensor import IntQuantTensor
from torch import nn

from dqa_plugins.host.weights import QuantizedWeight, WeightSite, hold


def read_weights(model: nn.Module) -> Iterator[WeightSite]:
    """The weight of every layer that quantizes it to integers of at most 8 bits."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, QuantWeightMixin) and layer.weight_quant.is_quant_enabled:
            weight = _weight(layer)
            if weight is not None:
                name = f"{path}.weight" if path else "weight"
                yield WeightSite(name, weight, _replacement(layer, weight))


@torch.no_grad()
def _weight(layer: Any) -> QuantizedWeight | None:
    if layer.weight_quant.requires_quant_input:
        return None
    found = layer.quant_weight()
    if not isinstance(found, IntQuantTensor) or float(found.bit_width.max()) > 8:
        return None
    value, scale, zero_point = (t.detach() for t in (found.value, found.scale, found.zero_point))
    codes = torch.round(value / scale + zero_point).to(torch.int8 if found.signed else torch.uint8)
    weight = QuantizedWeight.laid_out(codes, scale, zero_point, value.dtype)
    # a quantizer of the user's own may compute its values in another way: those stay with Brevitas
    return weight if weight is not None and torch.equal(weight.dequantize(), value) else None


def _replacement(layer: Any, weight: QuantizedWeight) -> Callable[[], None]:
    def replace() -> None:
        if layer.bias is not None and layer.bias_quant.is_quant_enabled and layer.bias_quant.requires_input_scale:
            return  # it computes the scale of its bias from that of the weight
        hold(layer, "weight", weight)
        layer.weight_quant.disable_quant = True

    return replace
