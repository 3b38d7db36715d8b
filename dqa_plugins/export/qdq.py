"""The compact form: QuantizeLinear / DequantizeLinear with int4 or int8 codes instead of float arithmetic.

A backend sees integers it can keep, and the file says how many bits an activation has. DQA is a per-channel scale and
a per-channel clip range, so it fits: a float Max and Min (ONNX Clip takes scalar bounds only) and then one
QuantizeLinear along the channel axis. Only static parameters: a scale per sample leaves no axis for the channels (and
OpenVINO 2026.4 fails on QuantizeLinear along axis 0).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dqa_plugins.errors import UnsupportedCombination
from dqa_plugins.quantizer import ActivationQuantizer
from dqa_plugins.ranges import lay_out
from dqa_plugins.rounding import code_range

from .frozen import FrozenQuantizer

_ONNX_TYPE = {(4, True): 22, (4, False): 21, (8, True): 3, (8, False): 2}  # onnx.TensorProto: INT4, UINT4, INT8, UINT8
_TORCH_TYPE = {True: torch.int8, False: torch.uint8}
INT4_OPSET = 21


def unsupported(quantizer: ActivationQuantizer) -> str | None:
    """Why a frozen quantizer has no QuantizeLinear form; None if it has one."""
    if quantizer.method.qparams != "static":
        return f"its qparams are {quantizer.method.qparams!r}, one scale per sample"
    grid = quantizer.static_grid
    if grid.keep is not None:
        return "outliers stay in float"
    if grid.zero_point is not None:
        return "its zero point is not that of QuantizeLinear where the range excludes zero"
    if grid.width() > 8:
        return f"its important channels have {grid.width()}-bit codes, and QuantizeLinear along an axis runs up to int8"
    return None


class QDQQuantizer(nn.Module):
    """A frozen quantizer as QuantizeLinear and DequantizeLinear, for the ONNX exporter only.

    Args:
        quantizer: static Direct (symmetric), DQA or NoisyQuant.
        opset: of the file; int4 needs 21, below it codes are int8.

    Raises:
        UnsupportedCombination: the quantizer has no such form; the message says why.
    """

    scale: Tensor
    divisor: Tensor
    low: Tensor
    high: Tensor
    noise: Tensor | None

    def __init__(self, quantizer: ActivationQuantizer, opset: int) -> None:
        super().__init__()
        reason = unsupported(quantizer)
        if reason:
            raise UnsupportedCombination(f"{quantizer.label} has no QuantizeLinear form: {reason}. Use form='float'.")
        grid = quantizer.static_grid.map(lambda v: v.reshape(-1))
        scale = grid.step
        low, high = (
            torch.as_tensor(v, dtype=scale.dtype, device=scale.device).reshape(-1) for v in (grid.low, grid.high)
        )
        self.axis, self.signed, self.opset = quantizer.channel_axis, quantizer.signed, opset
        self.width = 4 if opset >= INT4_OPSET and grid.width() <= 4 else 8
        self.register_buffer("scale", scale)
        self.register_buffer("divisor", torch.where(scale > 0, scale, 1.0))
        self.register_buffer("low", low * scale)
        self.register_buffer("high", high * scale)
        self.register_buffer("noise", grid.bias)
        full = code_range(self.width, self.signed)
        self.saturates = bool((low == full[0]).all() and (high == full[1]).all())  # the integer type clips by itself

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize x, (B, ...): traced by the exporter, not computed."""

        def laid(vector: Tensor) -> Tensor:
            return lay_out(vector, x, self.axis, per_sample=False)

        axis = self.axis % x.ndim
        bias = None if self.noise is None else laid(self.noise)
        y = x if bias is None else x + bias
        if not self.saturates:
            y = torch.minimum(torch.maximum(y, laid(self.low)), laid(self.high))
        version = 21 if self.opset >= 21 else 19 if self.opset >= 19 else 13
        per_axis = len(self.scale) > 1
        divisor, scale = (self.divisor, self.scale) if per_axis else (self.divisor[0], self.scale[0])
        attributes: dict[str, Any] = {"axis": axis} if per_axis else {}
        inputs: tuple[Tensor, ...] = (y, divisor)
        quantize: dict[str, Any] = dict(attributes)
        if self.opset >= INT4_OPSET:
            quantize["output_dtype"] = _ONNX_TYPE[self.width, self.signed]
        else:
            inputs = (*inputs, torch.zeros_like(divisor, dtype=_TORCH_TYPE[self.signed]))
        codes = torch.onnx.ops.symbolic(
            "QuantizeLinear",
            inputs,
            attrs=quantize,
            dtype=_ONNX_TYPE[self.width, self.signed],
            shape=x.shape,
            version=version,
        )
        value = torch.onnx.ops.symbolic(
            "DequantizeLinear", (codes, scale), attrs=attributes, dtype=x.dtype, shape=x.shape, version=version
        )
        return value if bias is None else value - bias


def to_qdq(model: nn.Module, opset: int) -> nn.Module:
    """Replace the frozen quantizers of a model by their QuantizeLinear form, in place.

    Raises:
        UnsupportedCombination: one has no such form; nothing was replaced.
    """
    if isinstance(model, FrozenQuantizer):
        return QDQQuantizer(model.original, opset)
    places = [(p, m) for p, m in model.named_modules(remove_duplicate=False) if isinstance(m, FrozenQuantizer)]
    ready = {module: QDQQuantizer(module.original, opset) for _, module in places}
    for path, module in places:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, ready[module])
    return model
