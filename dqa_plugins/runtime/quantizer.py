"""A quantizer in front of int8 layers: one pass from float to bytes, and the outliers beside them."""

from __future__ import annotations

import threading
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dqa_plugins.grid import Grid
from dqa_plugins.quantizer import ActivationQuantizer

from .codes import ByteGrid, Codes, Outliers, byte_grid
from .qparams import SampleGrids

MOST_OUTLIERS = 1 / 8  # share of the values beyond which a convolution in float is faster than the scatter
_NONE = np.int32(-1)
_local = threading.local()


def laid_out(x: Tensor, channels_last: bool) -> Tensor:
    """x in the memory format of its readers."""
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _scratch(size: int) -> Outliers:
    """Buffers of the calling thread, valid until its next call."""
    found: Outliers | None = getattr(_local, "outliers", None)
    if found is None or found.positions.size < size:
        found = _local.outliers = Outliers(np.empty(size, np.int32), np.empty(size, np.float32))
    return found


class Density:
    """What a quantizer saw: added to by any thread, copied with its model."""

    def __init__(self) -> None:
        self.values = self.outliers = self.calls = self.fallbacks = 0
        self.highest = 0.0
        self.lock = threading.Lock()

    def add(self, values: int, outliers: int, highest: float) -> None:
        with self.lock:
            self.values, self.outliers, self.calls = self.values + values, self.outliers + outliers, self.calls + 1
            self.highest = max(self.highest, highest)

    def fall_back(self) -> None:
        with self.lock:
            self.fallbacks += 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Density:
        return Density()

    def __reduce__(self) -> tuple[type[Density], tuple[()]]:
        return Density, ()


class Int8Quantizer(nn.Module):
    """Replaces a quantizer, and a sum and a ReLU in front of it, where int8 layers read the result.

    Args:
        site: name of the quantizer.
        source: its grid, of constants; or the quantizer itself, where qparams depend on the sample.
        channels_last: the layers are convolutions.
        folded: the steps of channels are in the weights of the layers.
        added, relu: forward computes relu(x + other) first.
        values: readers in float want the fake-quantized tensor, too.

    Buffers: the tensors of a constant grid.
    """

    def __init__(
        self,
        site: str,
        source: Grid | ActivationQuantizer,
        *,
        channels_last: bool,
        folded: bool = False,
        added: bool = False,
        relu: bool = False,
        values: bool = False,
    ) -> None:
        super().__init__()
        self.site, self.channels_last, self.folded = site, channels_last, folded
        self.added, self.relu, self.values = added, relu, values
        self.floor = np.float32(0 if relu else -np.inf)
        self.density = Density()
        self.quantizer = None if isinstance(source, Grid) else source
        self._integers: dict[str, int] = {}
        for field in fields(Grid) if isinstance(source, Grid) else ():
            value = getattr(source, field.name)
            if isinstance(value, int):
                self._integers[field.name] = value
            for part, tensor in enumerate(value if isinstance(value, tuple) else (value,)):
                if isinstance(tensor, Tensor) and field.name not in ("exact_zero", "divisor"):
                    self.register_buffer(f"{field.name}_{part}", tensor.detach().clone())
        self._plan: ByteGrid | str | None = None
        self._grids: SampleGrids | None = None
        self.register_load_state_dict_post_hook(Int8Quantizer._forget)

    def _forget(self, _: Any) -> None:
        self._plan = self._grids = None

    def _constant_grid(self) -> Grid:
        found: dict[str, Any] = dict(self._integers)
        for field in fields(Grid):
            parts = [self._buffers.get(f"{field.name}_{part}") for part in (0, 1)]
            if parts[0] is not None:
                found[field.name] = tuple(parts) if field.name == "keep" else parts[0]
        return Grid(**found)

    def plan(self) -> ByteGrid | str:
        """Its constant grid in bytes, or why there is none."""
        if self._plan is None:
            self._plan = byte_grid(self._constant_grid(), folded=self.folded)
        return self._plan

    @torch.no_grad()
    def forward(self, x: Tensor, *arguments: Tensor) -> Codes:
        """Quantize x, (B, ...) float32.

        Args:
            arguments: the other summand if there is one; then the prediction, if qparams are predicted.
        """
        other, predicted = (arguments[0], arguments[1:]) if self.added else (None, arguments)
        x = laid_out(x, self.channels_last)
        if other is not None:
            other = laid_out(other.expand(x.shape), self.channels_last)
        found = None
        if x.numel() and x.dtype == torch.float32:  # else the fallback says what is wrong
            if self.quantizer is None:
                found = self._quantize(x, other, [self.plan()])
            else:
                if self._grids is None:
                    self._grids = SampleGrids(self.quantizer)
                found = self._quantize(x, other, self._grids(x, other, self.floor, *predicted))
        return self._in_float(x, other, *predicted) if found is None else found

    def _in_float(self, x: Tensor, other: Tensor | None, *predicted: Tensor) -> Codes:
        """The exact fallback: layers compute on the fake-quantized tensor."""
        self.density.fall_back()
        x = x if other is None else x + other
        x = x.relu() if self.relu else x
        if self.quantizer is not None:
            return Codes(None, [], [], None, self.quantizer.grid(x, *predicted).fake_quantize(x))
        # grids of one value may be laid out for another rank: quantizing moved behind a reshape
        grid = self._constant_grid().map(lambda p: p.reshape(()) if p.numel() == 1 else p)
        return Codes(None, [], [], None, grid.fake_quantize(x))

    def _quantize(self, x: Tensor, other: Tensor | None, plans: list[ByteGrid | str]) -> Codes | None:
        """None: a value or a grid that no byte holds."""
        from dqa_plugins.kernels import int8, vectors

        codes = torch.empty_like(x, dtype=torch.uint8)
        values = torch.empty_like(x) if self.values else None
        source, to, kept, second = x.data_ptr(), codes.data_ptr(), values.data_ptr() if values is not None else 0, 0
        if other is not None:
            second = other.data_ptr()
        size = x.numel() // len(plans)
        found, most = 0, 0
        scratch: Outliers | None = None
        scales, zeros = [], []
        for b, plan in enumerate(plans):
            if isinstance(plan, str):
                return None
            scales.append(plan.scale)
            zeros.append(plan.zero)
            at = b * size
            a, q = source + 4 * at, to + at
            c, y = second and second + 4 * at, kept and kept + 4 * at
            if plan.channels is None:
                flag = int8.quantize(a, c, self.floor, plan.keep[0], *plan.tensor, q, y, size)
            else:
                flag = int8.quantize_channels(a, c, self.floor, plan.channels, plan.zero, q, y, size)
            if flag == 1:
                return None
            if plan.ends is not None:
                if scratch is None:
                    scratch = _scratch(int(x.numel() * MOST_OUTLIERS) + int8.CHUNK + vectors.BLOCK)
                bottom, top = plan.ends
                if flag != 2:
                    bottom = (_NONE, bottom[1])
                last = found
                found = int8.outliers(a, c, self.floor, *plan.keep, bottom, top, q, y, size, at, *scratch, found)
                if not 0 <= found <= max(vectors.BLOCK, x.numel() * MOST_OUTLIERS):
                    return None
                most = max(most, found - last)
        outliers = None
        if scratch is not None:
            outliers = Outliers(scratch.positions[:found].copy(), scratch.residuals[:found].copy())
            self.density.add(x.numel(), found, most / size)
        return Codes(codes, scales, zeros, outliers, values)
