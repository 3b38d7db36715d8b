"""Between rows of a tensor and the data section: quantize and encode, decode and dequantize.

CPU tensors go through the numba kernels, others through the torch reference; both give the same bytes.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor

from ...grid import Grid
from ...rounding import compute_dtype, narrow, power_of_two
from ..format.codebook import Codebook
from ..format.data import Streams, cut, row_shape, stored_lengths, two_dimensional
from ..format.errors import CorruptFrame
from ..format.frame import Frame
from ..format.layout import Layout
from . import engine, reference


def runs_kernels(x: Tensor) -> bool:
    """Whether x is coded by the kernels, rather than by the reference."""
    return x.device.type == "cpu" and sys.byteorder == "little"


# ---------------------------------------------------------------- tensors as rows


def rows(x: Tensor, axis: int) -> Tensor:
    """x, (B, ...), as contiguous (B, C, I)."""
    if not axis:
        return x.contiguous().view(x.shape[0], 1, -1)
    front = x.movedim(axis, 1)
    return front.reshape(*front.shape[:2], -1).contiguous()


def keeps_order(shape: tuple[int, ...], axis: int) -> bool:
    """Whether `rows` of a contiguous tensor are a view of it."""
    return not axis or axis % len(shape) == 1


def tensor_of(x: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
    """Inverse of `rows`: contiguous, of this shape."""
    if keeps_order(shape, axis):
        return x.reshape(shape)
    axis %= len(shape)
    front = (shape[0], shape[axis], *(size for i, size in enumerate(shape) if i not in (0, axis)))
    return x.reshape(front).movedim(1, axis).contiguous()


# ---------------------------------------------------------------- encoding


def encode(book: Codebook, layout: Layout, x: Tensor, grid: Grid | None, parameters: tuple[Tensor, ...]) -> Streams:
    """Quantize and encode rows.

    Args:
        x: (B, C, I) floating point, contiguous.
        grid: of these rows; None: that of the codebook and the parameters.
        parameters: that it was made of, see `Codebook.grid`.

    Raises:
        FloatingPointError: NaN or Inf.
    """
    if book.kind == "grid" and runs_kernels(x) and x.dtype != torch.float64:
        return Streams(*engine.encode(_plan(book, layout), x.float(), None, grid_steps(book, parameters)))
    if not torch.isfinite(x).all():
        raise FloatingPointError
    return encode_stored(book, layout, book.stored((grid or book.grid(parameters)).codes(x)))


def encode_stored(book: Codebook, layout: Layout, codes: Tensor) -> Streams:
    """Encode codes as they are stored, (B, C, I) int32."""
    if not runs_kernels(codes):
        return Streams(*reference.encode(layout, codes))
    low_bits = ((codes + 32768) % 65536 - 32768).to(torch.int16).contiguous()
    return Streams(*engine.encode(_plan(book, layout), None, low_bits, torch.ones(1, book.channels)))


def join(layout: Layout, parameters: tuple[Tensor, ...], streams: Streams, device: torch.device) -> Tensor:
    """The data section up to values kept in float: stored parameters, (B or 1, C or 1) each, lengths, chunks."""
    lengths = streams.lengths[stored_lengths(layout)].view(np.uint8)
    head = [p.cpu().contiguous().numpy().reshape(-1).view(np.uint8) for p in parameters]
    parts = [*head, lengths, *streams.pieces]
    section = torch.empty(sum(p.size for p in parts), dtype=torch.uint8)
    engine.join(parts, section.numpy())
    return section.to(device)


# ---------------------------------------------------------------- decoding


@torch.no_grad()
def decode(frame: Frame, out: Tensor | None = None) -> Tensor:
    """The tensor of a frame.

    Args:
        out: contiguous, of its shape and dtype: written where that saves a copy, and then returned.

    Raises:
        CorruptFrame: the data contradict themselves.
    """
    book, device, shape = frame.codebook, frame.data.device, two_dimensional(frame.shape)
    if frame.numel == 0:
        return torch.empty(frame.shape, dtype=frame.dtype, device=device)
    parts = cut(frame)
    batch, inner = row_shape(shape, book.channel_axis, book.channels)
    if book.kind == "grid" and compute_dtype(frame.dtype) == torch.float32 and runs_kernels(frame.data):
        in_place = out is not None and frame.dtype == torch.float32 and keeps_order(shape, book.channel_axis)
        values = out if in_place and out is not None else torch.empty((batch, book.channels, inner))
        plan, steps = _plan(book, parts.layout), grid_steps(book, parts.parameters)
        streams = parts.streams
        _check(engine.decode(plan, streams.source, streams.offsets, streams.lengths, steps, values, None), book)
        if in_place:
            return values
    else:
        codes = book.codes(decode_stored(book, parts.layout, parts.streams, device))
        values = book.grid(tuple(p.to(device) for p in parts.parameters)).values(codes)
    values = narrow(values, frame.dtype)
    if parts.positions is not None and parts.values is not None:
        values.view(-1)[torch.from_numpy(parts.positions).to(device)] = parts.values
    return tensor_of(values, shape, book.channel_axis).reshape(frame.shape)


def decode_stored(book: Codebook, layout: Layout, streams: Streams, device: torch.device | None = None) -> Tensor:
    """Decode codes as they are stored, (B, C, I) int32, on `device`."""
    if device is not None and not runs_kernels(torch.empty(0, device=device)):
        source = torch.from_numpy(streams.source.copy()).to(device)
        return reference.decode(layout, source, streams.offsets, streams.lengths).to(torch.int32)
    codes = torch.empty((layout.batch, layout.channels, layout.inner), dtype=torch.int16)
    plan, ones = _plan(book, layout), torch.ones(1, book.channels)
    _check(engine.decode(plan, streams.source, streams.offsets, streams.lengths, ones, None, codes), book)
    whole = codes.to(torch.int32)
    return whole if book.signed else whole & 0xFFFF


def _plan(book: Codebook, layout: Layout) -> engine.KernelPlan:
    """The layout made ready for the kernels; kept, a few per codebook."""
    key = (layout.batch, layout.inner, layout.groups is book.groups)
    plans = book.plans
    if key not in plans:
        if len(plans) >= 16:
            plans.clear()
        plans[key] = engine.KernelPlan(book.merged(layout))
    return plans[key]


def grid_steps(book: Codebook, parameters: tuple[Tensor, ...]) -> Tensor:
    """(B or 1, C) float32: the step of each channel, kind "grid"."""
    step = parameters[0].squeeze(-1).cpu() * power_of_two(-book.extra_bits).unsqueeze(0)
    return step.expand(-1, book.channels).contiguous()


def _check(bad: int, book: Codebook) -> None:
    if bad >= 0:
        raise CorruptFrame(f"'{book.name}': the escapes of chunk {bad} do not fit its streams.")
