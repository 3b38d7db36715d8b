"""What our quantizers become in Brevitas' exports.

    QCDQ ONNX       static qparams up to 8 bits: QuantizeLinear, Clip, DequantizeLinear; else float arithmetic
    QONNX           static qparams: Quant; Dense+Sparse and zero points: float arithmetic
    torch QCDQ      static qparams: integer codes in plain torch; else float arithmetic
    inference mode  the quantizer itself

DQA is one (de)quantization per channel. Its clip range differs from channel to channel, and ONNX Clip and QONNX Quant
take scalar ones (opset 21, qonnx 1.0.0): a Max and a Min on the float side come first. NoisyQuant adds before and
subtracts after. Every form computes what the quantizer computes, ties included.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from brevitas.export.common.handler.base import BaseHandler
from brevitas.export.inference.handler import InferenceHandler
from brevitas.export.onnx.handler import ONNXBaseHandler
from brevitas.export.onnx.qonnx.function import BrevitasQuantOp
from brevitas.export.onnx.standard.function import DequantizeLinearOp, IntClipOp, QuantizeLinearOp
from torch import Tensor

from dqa_plugins.quantizer import ActivationQuantizer
from dqa_plugins.ranges import lay_out

from .grid import common_grid, why_no_common_grid
from .proxy import PluginActProxy


class Codes(NamedTuple):
    """A static grid as integer arithmetic on each channel; G = 1 or C.

    scale, zero_point, low, high: (G,) float. bits: of the widest channel. signed: of the codes.
    noise: (C,), added before and subtracted after, unit of x, or None. keep: (G,) thresholds beyond which x stays.
    """

    scale: Tensor
    zero_point: Tensor
    low: Tensor
    high: Tensor
    bits: int
    signed: bool
    noise: Tensor | None
    keep: tuple[Tensor, ...] | None


def codes_of(quantizer: ActivationQuantizer) -> Codes | None:
    """The integer form of a calibrated quantizer; None if it has none (dynamic qparams, a scale of zero)."""
    if quantizer.method.qparams != "static":
        return None
    grid = quantizer.static_grid.constants()
    if not bool((grid.step > 0).all()):
        return None
    zero_point = torch.zeros_like(grid.step) if grid.zero_point is None else grid.zero_point
    low, high = (torch.as_tensor(v, dtype=grid.step.dtype, device=grid.step.device) for v in (grid.low, grid.high))
    step, zero_point, low, high = (t.detach().clone().reshape(-1) for t in (grid.step, zero_point, low, high))
    signed = quantizer.signed and not quantizer.method.uses_range
    noise = None if grid.bias is None else grid.bias.detach().clone().reshape(-1)
    keep = None if grid.keep is None else tuple(t.detach().clone().reshape(-1) for t in grid.keep)
    return Codes(step, zero_point, low, high, grid.width(), signed, noise, keep)


class _Handler:
    """Shared by all formats. Not a Module: the exported model must not own the quantizer's buffers twice."""

    handled_layer = PluginActProxy
    quantizer: ActivationQuantizer
    codes: Codes | None  # None: float arithmetic
    metadata: tuple[Tensor | None, ...]

    def _prepare(self, module: PluginActProxy) -> None:
        # object.__setattr__: nn.Module would register the quantizer as a part of the handler
        object.__setattr__(self, "quantizer", module.quantizer)
        self.codes, self.metadata = None, (None, None, None)
        if not module.is_quant_enabled:
            return
        # decided here, on values: inside torch.export it would be a data-dependent branch
        codes = codes_of(module.quantizer)
        self.codes = codes if codes is not None and self._representable(codes) else None
        if why_no_common_grid(module.quantizer.method) is None:
            self.metadata = tuple(t.detach().clone() for t in common_grid(module.quantizer)[:3])

    def _laid(self, vector: Tensor, x: Tensor) -> Tensor:
        return lay_out(vector, x, self.quantizer.channel_axis, per_sample=False)

    def _convert(self, x: Tensor) -> tuple[Tensor | None, ...]:
        codes = self.codes
        if codes is None or x.dtype != torch.float32:
            return self.quantizer.fake_quantize(x), *self.metadata
        y = x if codes.noise is None else x + self._laid(codes.noise, x)
        y = self._arithmetic(y, codes)
        if codes.noise is not None:
            y = y - self._laid(codes.noise, x)
        if codes.keep is not None:
            lower, upper = (self._laid(t, x) for t in codes.keep)
            y = torch.where((x < lower) | (x > upper), x, y)
        return y, *self.metadata

    def _clipped(self, x: Tensor, codes: Codes) -> Tensor:
        """x clipped to the range of each channel's codes, where the ranges differ."""
        if codes.low.numel() == codes.high.numel() == 1:
            return x
        low, high = (self._laid(end * codes.scale, x) for end in (codes.low, codes.high))
        return torch.minimum(torch.maximum(x, low), high)

    def _representable(self, codes: Codes) -> bool:
        return True

    def _arithmetic(self, x: Tensor, codes: Codes) -> Tensor:
        raise NotImplementedError


class QCDQHandler(_Handler, ONNXBaseHandler):
    """QuantizeLinear, Clip, DequantizeLinear of the ONNX standard."""

    def prepare_for_export(self, module: PluginActProxy) -> None:
        """Called by Brevitas before tracing."""
        self._prepare(module)

    def symbolic_execution(self, x: Tensor) -> tuple[Tensor | None, ...]:
        """Called by Brevitas while tracing: (value, scale, zero_point, bit_width)."""
        return self._convert(x)

    def _representable(self, codes: Codes) -> bool:
        # 16-bit QuantizeLinear came with opset 21, which the TorchScript exporter does not write
        within = bool(((codes.zero_point >= 0) & (codes.zero_point <= 255)).all())
        return codes.bits <= 8 and within

    def _arithmetic(self, x: Tensor, codes: Codes) -> Tensor:
        dtype = torch.int8 if codes.signed else torch.uint8
        axis = self.quantizer.channel_axis % x.ndim if codes.scale.numel() > 1 else None
        shape = [-1] if codes.scale.numel() > 1 else []
        scale, zero_point = codes.scale.reshape(shape), codes.zero_point.to(dtype).reshape(shape)
        q = self.export_op(QuantizeLinearOp, self._clipped(x, codes), scale, zero_point, dtype, axis)
        if codes.bits < 8 and codes.low.numel() == 1:
            low, high = (end.to(dtype).reshape([]) for end in (codes.low, codes.high))
            q = self.export_op(IntClipOp, q, low, high)
        return self.export_op(DequantizeLinearOp, q, scale, zero_point, axis)


class QONNXHandler(_Handler, ONNXBaseHandler):
    """The Quant operator of QONNX."""

    def prepare_for_export(self, module: PluginActProxy) -> None:
        """Called by Brevitas before tracing."""
        self._prepare(module)

    def symbolic_execution(self, x: Tensor) -> tuple[Tensor | None, ...]:
        """Called by Brevitas while tracing: (value, scale, zero_point, bit_width)."""
        return self._convert(x)

    def _representable(self, codes: Codes) -> bool:
        # Quant rounds x / scale + zero_point as a whole: at a tie an odd zero point turns half-to-even around
        return bool((codes.zero_point == 0).all())

    def _arithmetic(self, x: Tensor, codes: Codes) -> Tensor:
        clipped = self._clipped(x, codes)
        scale = self._laid(codes.scale, x) if codes.scale.numel() > 1 else codes.scale.reshape([])
        arguments: tuple[Any, ...] = (torch.zeros(()), torch.tensor(float(codes.bits)), False, codes.signed, "ROUND")
        return self.export_op(BrevitasQuantOp, clipped, scale, *arguments)


class TorchQCDQHandler(_Handler, BaseHandler):
    """Integer codes in plain torch. torch.quantize_per_tensor multiplies by 1 / scale: ties go another way there."""

    def prepare_for_export(self, module: PluginActProxy) -> None:
        """Called by Brevitas before tracing."""
        self._prepare(module)

    def forward(self, x: Tensor) -> tuple[Tensor | None, ...]:
        """(value, scale, zero_point, bit_width)."""
        return self._convert(x)

    def _arithmetic(self, x: Tensor, codes: Codes) -> Tensor:
        scale, zero_point, low, high = (self._laid(t, x) for t in codes[:4])
        narrow = torch.int8 if codes.signed else torch.uint8
        q = torch.round(x / scale) + zero_point
        q = torch.minimum(torch.maximum(q, low), high).to(narrow if codes.bits <= 8 else torch.int32)
        return (q.to(x.dtype) - zero_point) * scale


class PluginInferenceHandler(_Handler, InferenceHandler):
    """quant_inference_mode: the quantizer's own arithmetic, without QuantTensors."""

    def prepare_for_export(self, module: PluginActProxy) -> None:
        """Called by Brevitas when the mode begins."""
        self._prepare(module)

    def quantize(self, x: Tensor) -> Tensor:
        """Unused: quantize and dequantize are one step here."""
        raise NotImplementedError

    dequantize = quantize

    def forward(self, x: Tensor, unused_scale: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """(value, scale, zero_point, bit_width)."""
        return self.quantizer.fake_quantize(x), *self.metadata
