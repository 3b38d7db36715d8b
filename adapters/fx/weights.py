"""Quantized weights of FX: the reference modules that convert_fx leaves (a float weight, quantized in each forward).

torch.export and torch.compile refuse reference modules (torch 2.13); plain ones with the quantized weight compute the
same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dqa_plugins.host.weights import QuantizedWeight, WeightSite, hold

_PLAIN: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
    nn.Embedding,
    nn.EmbeddingBag,
)


def read_weights(model: nn.Module) -> Iterator[WeightSite]:
    """The weight of every reference module."""
    for path, module in list(model.named_modules()):
        if ".quantized.reference" in type(module).__module__ and hasattr(module, "get_quantized_weight"):
            weight = _weight(module)
            if weight is not None:
                yield WeightSite(f"{_layer(model, path)}.weight", weight, _replacement(model, path, module, weight))


def _layer(model: nn.Module, path: str) -> str:
    """The layer's path before FX fused it with what follows (`conv.0` of a ConvReLU2d is `conv`)."""
    parent, _, name = path.rpartition(".")
    fused = name == "0" and ".intrinsic." in type(model.get_submodule(parent)).__module__
    return parent if fused else path


@torch.no_grad()
def _weight(module: Any) -> QuantizedWeight | None:
    if module.weight_dtype not in (torch.qint8, torch.quint8):
        return None
    codes: Any = module.get_quantized_weight()
    codes = codes.int_repr() if codes.is_quantized else codes
    dtype = module.weight.dtype
    # torch's own dequantize rounds a scale to float32 first
    scale, zero_point = module.weight_scale.detach().float(), module.weight_zero_point.detach()
    if module.weight_qscheme == torch.per_tensor_affine:
        return QuantizedWeight(codes, scale.reshape(()), zero_point.reshape(()), None, dtype)
    return QuantizedWeight(codes, scale, zero_point, module.weight_axis_int, dtype)


def _replacement(model: nn.Module, path: str, module: Any, weight: QuantizedWeight) -> Any:
    def replace() -> None:
        kind: Any = next(base for base in type(module).__mro__ if base in _PLAIN)
        plain: Any = kind.__new__(kind)
        nn.Module.__init__(plain)
        for name, value in module.__dict__.items():
            if name not in plain.__dict__ and not name.startswith("weight_"):
                plain.__dict__[name] = value
        plain.training = module.training
        plain.weight = module.weight
        if hasattr(module, "bias"):
            plain.bias = module.bias
        hold(plain, "weight", weight)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, plain)

    return replace
