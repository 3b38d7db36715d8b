"""Convolutions and linears on bytes: torch's oneDNN kernels for the dense part, a scatter for the outliers."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dqa_plugins.errors import UnsupportedCombination
from dqa_plugins.kernels import threads

from .codes import Codes
from .quantizer import Int8Quantizer, laid_out
from .taps import rows_of, taps_of

_engine: str | None = None


def set_engine(name: str | None) -> None:
    """What computes the dense part of lowered layers from now on, in all of them.

    Args:
        name: "onednn": int8 kernels; "float": the same numbers by float kernels, for processors on which int8 products
            saturate; None: whichever is right on this processor.

    Raises:
        UnsupportedCombination: there is no such engine.
    """
    global _engine
    if name not in (None, "onednn", "float"):
        raise UnsupportedCombination(f"set_engine({name!r}): the engines are 'onednn' and 'float', or None.")
    _engine = name


def engine() -> str:
    """The engine in use: oneDNN where the processor has VNNI; without it pairs of int8 products saturate at 16 bits."""
    if _engine is not None:
        return _engine
    return "onednn" if _has_vnni() else "float"


@lru_cache(1)
def _has_vnni() -> bool:
    return torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()


def _shared(empty: Tensor, x: Tensor) -> Tensor:
    """`empty`, of one byte a value, on the memory of x."""
    return empty.set_(x.untyped_storage(), x.storage_offset(), x.size(), x.stride())


class Int8Layer(nn.Module):
    """A layer whose input is Codes.

    Args:
        weight: int8, (O, C / groups, kh, kw) or (O, C).
        scale: (O,) float32, of the weight.
        bias: (O,) float32.
        name: of the layer, for reports.

    Buffers: these.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor, name: str) -> None:
        super().__init__()
        self.name = name
        for key, value in (("weight", weight), ("scale", scale), ("bias", bias)):
            self.register_buffer(key, value.detach().clone().contiguous())
        self._packed: dict[Any, Any] = {}
        self._lock = threading.Lock()
        self.register_load_state_dict_post_hook(Int8Layer._forget)

    def __getstate__(self) -> dict[str, Any]:
        """What oneDNN packed is neither copied nor saved."""
        return {**self.__dict__, "_packed": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = threading.Lock()

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        """A form of the weight, made when it is first needed, and again after load_state_dict."""
        if key not in self._packed:
            threads.started = True
            found = make()  # may ask for others
            with self._lock:
                self._packed.setdefault(key, found)
        return self._packed[key]

    def _forget(self, _: Any) -> None:
        self._packed = {}

    def _float_weight(self) -> Tensor:
        shape = [-1] + [1] * (self.weight.ndim - 1)
        found: Tensor = self._once("float", lambda: self.weight.float() * self.scale.reshape(shape))
        return found

    def _vectors(self) -> tuple[Tensor, Any, Any]:
        """Zero points as oneDNN wants them, and the weight and its scale as the scatter does."""

        def make() -> tuple[Tensor, Any, Any]:
            weight = self.weight.reshape(*self.weight.shape, *[1] * (4 - self.weight.ndim))
            group, own = weight.shape[1], weight.shape[0] // self.groups
            # (groups, O / groups, C / groups, kh, kw) to (groups, C / groups, kh, kw, O / groups)
            laid = weight.reshape(self.groups, own, group, *weight.shape[2:]).permute(0, 2, 3, 4, 1)
            zeros = torch.zeros(len(self.scale), dtype=torch.int32)
            return zeros, laid.contiguous().view(-1).numpy(), self.scale.numpy()

        found: tuple[Tensor, Any, Any] = self._once("vectors", make)
        return found

    groups = 1

    def dense(self, codes: Tensor, scale: float, zero: int, bias: Tensor | None) -> Tensor:
        """The layer on (codes - zero) * scale."""
        raise NotImplementedError

    def in_float(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The layer on a float tensor."""
        raise NotImplementedError

    def add_outliers(self, out: Tensor, q: Codes) -> None:
        """Add what outliers contribute to the output, in place."""
        raise NotImplementedError

    def forward(self, q: Codes) -> Tensor:
        """Codes to float32."""
        if q.codes is None:
            if q.values is None:
                raise UnsupportedCombination(f"'{self.name}' got neither codes nor values.")
            return self.in_float(q.values, self.bias)
        right = engine() == "onednn" and self.computed_right(q.codes.shape, int(q.zeros[0]))
        compute = self.dense if right else self._dense_in_float
        if len(q.scales) == 1:
            out = compute(q.codes, q.scales[0], int(q.zeros[0]), self.bias)
        elif len(set(q.zeros)) == 1:
            from dqa_plugins.kernels.int8 import scale_samples

            out = laid_out(compute(q.codes, 1.0, int(q.zeros[0]), None), self.channels_last)
            scale_samples(out.data_ptr(), out.numel(), np.array(q.scales, np.float32), self.bias.numpy())
        else:  # zero points differ: oneDNN takes one
            samples = zip(q.codes.split(1), q.scales, q.zeros, strict=True)
            out = torch.cat([compute(codes, s, int(z), self.bias) for codes, s, z in samples])
        if q.outliers is not None and q.outliers.positions.size:
            out = laid_out(out, self.channels_last)
            self.add_outliers(out, q)
        return out

    channels_last = False

    def computed_right(self, shape: torch.Size, zero: int) -> bool:
        """Whether oneDNN's result is that of a float kernel, tried once for each shape on two samples.

        torch 2.13 computes some rare geometries wrongly, in silence: 3x3, stride (1, 2), padding (2, 0), dilation
        (1, 2) on 3x5 values, for one.
        """

        def tried() -> bool:
            generator = torch.Generator().manual_seed(0)
            codes = torch.randint(0, 256, (min(2, shape[0]), *shape[1:]), dtype=torch.uint8, generator=generator)
            codes = laid_out(codes, self.channels_last)
            expected = self.in_float(codes.float() - zero, None)
            difference = (self.dense(codes, 1.0, zero, None) - expected).abs().max()
            return bool(difference <= 1e-5 * expected.abs().max() + 1e-30)

        found: bool = self._once(("right", shape[1:], min(2, shape[0]), bool(zero)), tried)
        return found

    def _dense_in_float(self, codes: Tensor, scale: float, zero: int, bias: Tensor | None) -> Tensor:
        return self.in_float((codes.float() - zero) * scale, bias)


class Int8Linear(Int8Layer):
    """A linear layer on bytes, (..., C) to (..., O)."""

    def dense(self, codes: Tensor, scale: float, zero: int, bias: Tensor | None) -> Tensor:
        packed = self._once("packed", lambda: torch.ops.onednn.qlinear_prepack(self.weight, None))
        found: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes, scale, zero, packed, self.scale, self._vectors()[0], bias, 1.0, 0, torch.float32, "none", [], ""
        )
        return found

    def in_float(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self._float_weight(), bias)

    def add_outliers(self, out: Tensor, q: Codes) -> None:
        from dqa_plugins.kernels.int8 import scatter

        outputs, channels = self.weight.shape
        _, weight, scale = self._vectors()
        # each vector is a row of one pixel
        rows = np.empty((out.numel() // outputs, 3), np.int64)
        rows[:, 0], rows[:, 1], rows[:, 2] = 0, 1, np.arange(len(rows)) * outputs
        column, steps = np.array([[0, 1, 0]]), (0, 0, 0, 0, channels, outputs)
        scatter(out.data_ptr(), out.numel(), weight, scale, *q.outliers, channels, 1, rows, column, steps)  # type: ignore[misc]


class Int8Conv2d(Int8Layer):
    """A convolution on bytes, (B, C, H, W) to (B, O, OH, OW), both channels_last.

    Args:
        stride, padding, dilation: (height, width).
        groups: of the channels.
    """

    channels_last = True

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor,
        name: str,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
    ) -> None:
        super().__init__(weight, scale, bias, name)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.then: Int8Quantizer | None = None  # alone reads the output: bytes go out where that is the same

    def forward(self, q: Codes) -> Any:
        """Codes to float32; to Codes where a quantizer was put behind."""
        if self.then is None:
            return super().forward(q)
        found = self._to_bytes(q, self.then)
        return self.then(super().forward(q)) if found is None else found

    def _output(self, then: Int8Quantizer) -> Any:
        """How oneDNN makes the bytes of a quantizer: None if it cannot, else scale of the weight, bias, step, zero,
        and what `kernels.int8.regrid` takes (None: nothing is left to do)."""
        plan = then.plan()
        if isinstance(plan, str) or plan.ends is not None:
            return None
        inverse, shift, low, high, step, factor = (
            plan.channels
            if plan.channels is not None
            else np.array([[v] for v in (*plan.tensor[:4], plan.tensor[5], 1)], np.float32)
        )
        before = np.int32(-low.min())
        if shift.any() or not inverse.all() or high.max() + before > 255:
            return None
        smallest = step.min()
        own = torch.from_numpy(np.broadcast_to(smallest / step, len(self.scale)).astype(np.float32))
        grid = np.stack([np.broadcast_to(v, len(self.scale)) for v in (low, high, factor)]).astype(np.int32)
        saturates = (low + before <= 0).all() and (high + before >= 255).all() and (factor == 1).all()
        left = None if saturates else (grid, before, plan.zero)
        return self.scale * own, self.bias * own, float(smallest), int(before), left, plan

    def _to_bytes(self, q: Codes, then: Int8Quantizer) -> Codes | None:
        """The bytes of the quantizer behind, straight from oneDNN; None where its output has to be float first."""
        if q.codes is None or len(q.scales) != 1 or engine() != "onednn" or not len(q.codes):
            return None
        if q.outliers is not None and q.outliers.positions.size:
            return None
        shape, before = q.codes.shape, int(q.zeros[0])
        made = self._once(("bytes", shape, before), lambda: self._makes_bytes(then, shape, before))
        if made is None:
            return None
        compute, weight, step, zero, left, plan = made
        x = torch._empty_affine_quantized([0], scale=q.scales[0], zero_point=before, dtype=torch.quint8)
        out = compute(_shared(x, q.codes), weight, step, zero)
        codes = laid_out(_shared(torch.empty(0, dtype=torch.uint8), out), True)
        if left is not None:
            from dqa_plugins.kernels.int8 import regrid

            regrid(codes.data_ptr(), codes.numel(), *left)
        values = None
        if then.values:  # on the grid common to all channels
            x = torch._empty_affine_quantized([0], scale=plan.scale, zero_point=int(plan.zero), dtype=torch.quint8)
            values = _shared(x, codes).dequantize()
        return Codes(codes, [plan.scale], [plan.zero], None, values)

    def _makes_bytes(self, then: Int8Quantizer, shape: torch.Size, before: int) -> Any:
        """What `_to_bytes` needs for inputs of a shape, whose byte of value 0 is `before`; None: it cannot."""
        output = self._output(then)
        if output is None or not self.computed_right(shape, before):
            return None
        scale, bias, *rest = output
        compute = torch.ops.quantized.conv2d_relu.new if then.relu else torch.ops.quantized.conv2d.new
        return compute, self._once("static", lambda: self._pack_static(scale, bias)), *rest

    def _pack_static(self, scale: Tensor, bias: Tensor) -> Any:
        """The weight for the operator that torch's own static path calls: with scales that never change it keeps what
        oneDNN made between calls, and takes half the time of `qconv2d_pointwise`; the kernel is the same."""
        before = torch.backends.quantized.engine
        with warnings.catch_warnings(action="ignore"):  # torch 2.13 announces the end of quantized tensors
            zeros = torch.zeros(len(scale), dtype=torch.int64)
            weight = torch._make_per_channel_quantized_tensor(self.weight, scale.double(), zeros, 0)
        torch.backends.quantized.engine = "onednn"
        try:
            return torch.ops.quantized.conv2d_prepack(
                weight, bias, self.stride, self.padding, self.dilation, self.groups
            )
        finally:
            torch.backends.quantized.engine = before

    def _pack(self, shifted: bool) -> Any:
        """The weight as oneDNN wants it, for inputs with or without a zero point."""
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return self._once(
            ("packed", shifted),
            lambda: torch.ops.onednn.qconv_prepack(self.weight, self.scale, 1.0, int(shifted), *geometry, None),
        )

    def dense(self, codes: Tensor, scale: float, zero: int, bias: Tensor | None) -> Tensor:
        packed, geometry = self._pack(bool(zero)), (self.stride, self.padding, self.dilation, self.groups)
        found: Tensor = torch.ops.onednn.qconv2d_pointwise(
            codes, scale, zero, packed, self.scale, self._vectors()[0], bias, *geometry, 1.0, 0, torch.float32,
            "none", [], "",
        )  # fmt: skip
        return found

    def in_float(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, self._float_weight(), bias, self.stride, self.padding, self.dilation, self.groups)

    def add_outliers(self, out: Tensor, q: Codes) -> None:
        from dqa_plugins.kernels.int8 import scatter

        batch, channels, height, width = q.codes.shape  # type: ignore[union-attr]
        _, outputs, tall, wide = out.shape
        kh, kw = self.weight.shape[2:]
        _, weight, scale = self._vectors()
        own = outputs // self.groups
        geometry = [*zip(self.stride, self.padding, self.dilation, strict=True)]
        rows, down, row = rows_of(batch, height, tall, kh, geometry[0], (kw * own, wide * outputs))
        columns, right, column = taps_of(width, wide, kw, geometry[1], (own, outputs))
        steps = (down, right, row, column, channels // self.groups, own)
        scatter(out.data_ptr(), out.numel(), weight, scale, *q.outliers, channels, width, rows, columns, steps)  # type: ignore[misc]
