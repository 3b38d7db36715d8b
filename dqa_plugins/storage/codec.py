"""Between tensors and chunks: rows, parameters, the data section, and which implementation runs.

CPU tensors go through the numba kernels, others through the torch reference; both give the same bytes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import functional as F
from ..kernels import fields as f
from ..qparams import QParams
from . import engine, reference
from .codebook import Codebook
from .errors import CorruptFrame
from .layout import Layout
from .tables import NO_ESCAPE

if TYPE_CHECKING:
    from .packed import PackedActivation


@dataclass(frozen=True)
class Streams:
    """The chunks of a tensor.

    Args:
        lengths: (chunks, 5) uint16: bytes of the four streams and of the escapes.
        sizes: (chunks,) int64, bytes of each chunk.
        pieces: uint8 arrays that follow each other.
    """

    lengths: NDArray[np.uint16]
    sizes: NDArray[np.int64]
    pieces: list[NDArray[np.uint8]]

    @property
    def source(self) -> NDArray[np.uint8]:
        """All chunks as one array."""
        return self.pieces[0] if len(self.pieces) == 1 else np.concatenate([np.empty(0, np.uint8), *self.pieces])

    @property
    def offsets(self) -> NDArray[np.int64]:
        """(chunks + 1,) where each chunk starts in `source`."""
        return np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)


def runs_kernels(x: Tensor) -> bool:
    """Whether x is coded by the kernels, rather than by the reference."""
    return x.device.type == "cpu" and sys.byteorder == "little"


# ---------------------------------------------------------------- tensors as rows


def row_shape(shape: tuple[int, ...], axis: int, channels: int) -> tuple[int, int]:
    """(B, I) of a tensor of this shape with C channels along `axis` (0: channels are not told apart, C = 1).

    Raises:
        CorruptFrame: the axis or the number of channels does not fit the shape.
    """
    if axis and (not (axis % len(shape) > 0) or axis >= len(shape) or axis < -len(shape)):
        raise CorruptFrame(f"channel axis {axis} does not exist in shape {shape}.")
    if axis and shape[axis] != channels and 0 not in shape:
        raise CorruptFrame(f"shape {shape} has {shape[axis]} channels along axis {axis}, the codebook {channels}.")
    inner = 1
    for i, size in enumerate(shape):
        if i and i != (axis % len(shape) if axis else 0):
            inner *= size
    return shape[0], inner


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


# ---------------------------------------------------------------- parameters


def row_parameters(book: Codebook, dynamic: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The parameters in the order of `book.parameters`, (B or 1, C or 1, 1) each, in the compute dtype."""
    static = (book.scale,) if book.kind in ("grid", "noise") else (book.lower, book.upper)
    found = dynamic if book.dynamic else tuple(p for p in static if p is not None)
    compute = F.compute_dtype(dtype)
    if book.dynamic:
        return tuple(p.to(compute).unsqueeze(-1) for p in found)
    return tuple(p.to(compute).reshape(1, -1, 1) for p in found)


def as_qparams(parameters: tuple[Tensor, ...]) -> QParams:
    """One parameter is a scale, two are thresholds."""
    return QParams(parameters[0]) if len(parameters) == 1 else QParams(None, *parameters)


def _steps(book: Codebook, scale: Tensor) -> Tensor:
    """(B or 1, C) float32: delta_c = delta / 2^m_c."""
    step = scale.squeeze(-1).cpu() * F.power_of_two(-book.extra_bits).unsqueeze(0)
    return step.expand(-1, book.channels).contiguous()


def dequantize(book: Codebook, codes: Tensor, qparams: QParams, compute: torch.dtype) -> Tensor:
    """Codes (B, C, I) back to numbers, in the compute dtype, exactly as `functional` does."""
    scale, lower, upper = (None if p is None else p.to(codes.device) for p in qparams)
    if book.kind in ("grid", "noise") and scale is not None:
        if book.kind == "noise":
            return F.noisyquant_dequantize(codes, scale, book.noise.to(codes.device, compute), channel_axis=1)
        extra = book.extra_bits.to(codes.device).view(1, -1, 1)
        return codes.to(compute) * (scale * F.power_of_two(-extra, compute))
    if lower is None or upper is None:
        raise CorruptFrame(f"'{book.name}': no thresholds to dequantize with.")
    step, zero_point = F.affine_qparams(lower, upper, book.bits)
    return torch.where(step > 0, (codes.to(compute) - zero_point) * step, lower)


# ---------------------------------------------------------------- the coder


def _plan(book: Codebook, layout: Layout) -> engine.KernelPlan:
    """The layout made ready for the kernels; kept, a few per codebook."""
    key = (layout.batch, layout.inner, layout.groups is book.groups)
    plans = book.plans
    if key not in plans:
        if len(plans) >= 16:
            plans.clear()
        plans[key] = engine.KernelPlan(book.merged(layout))
    return plans[key]


def encode_values(book: Codebook, layout: Layout, values: Tensor, parameters: tuple[Tensor, ...]) -> Streams:
    """Quantize and encode float32 rows in one pass (kind "grid").

    Raises:
        FloatingPointError: NaN or Inf.
    """
    return Streams(*engine.encode(_plan(book, layout), values, None, _steps(book, parameters[0])))


def encode_codes(book: Codebook, layout: Layout, codes: Tensor) -> Streams:
    """Encode whole codes, (B, C, I) int32."""
    if not runs_kernels(codes):
        return Streams(*reference.encode(layout, codes))
    narrow = ((codes + 32768) % 65536 - 32768).to(torch.int16).contiguous()
    return Streams(*engine.encode(_plan(book, layout), None, narrow, torch.ones(1, book.channels)))


def _check(bad: int, book: Codebook) -> None:
    if bad >= 0:
        raise CorruptFrame(f"'{book.name}': the escapes of chunk {bad} do not fit its streams.")


def decode_values(
    book: Codebook, layout: Layout, streams: Streams, parameters: tuple[Tensor, ...], out: Tensor
) -> None:
    """Decode and dequantize into float32 `out` in one pass (kind "grid")."""
    steps = _steps(book, parameters[0])
    plan = _plan(book, layout)
    _check(engine.decode(plan, streams.source, streams.offsets, streams.lengths, steps, out, None), book)


def decode_codes(book: Codebook, layout: Layout, streams: Streams, device: torch.device | None = None) -> Tensor:
    """Decode whole codes, (B, C, I) int32, on `device`."""
    if device is not None and not runs_kernels(torch.empty(0, device=device)):
        source = torch.from_numpy(streams.source.copy()).to(device)
        return reference.decode(layout, source, streams.offsets, streams.lengths).to(torch.int32)
    shape = (layout.batch, layout.channels, layout.inner)
    codes = torch.empty(shape, dtype=torch.int16)
    plan = _plan(book, layout)
    steps = torch.ones(1, book.channels)
    _check(engine.decode(plan, streams.source, streams.offsets, streams.lengths, steps, None, codes), book)
    whole = codes.to(torch.int32)
    return whole if book.signed else whole & 0xFFFF


# ---------------------------------------------------------------- the data section


def _stored(layout: Layout) -> NDArray[np.bool_]:
    """(chunks, 5) which lengths are stored: four of a coded chunk, five where its table has escapes."""
    stored = np.zeros((layout.total_chunks, 5), bool)
    chunk = 0
    for g in layout.groups:
        after = chunk + layout.chunks(g)
        if g.table is not None:
            stored[chunk:after, :4] = True
            stored[chunk:after, 4] = g.table.escape != NO_ESCAPE
        chunk = after
    return stored


def join(layout: Layout, parameters: tuple[Tensor, ...], streams: Streams, device: torch.device) -> Tensor:
    """The data section, without the sparse part: parameters, lengths, chunks."""
    lengths = streams.lengths[_stored(layout)].view(np.uint8)
    head = [p.cpu().contiguous().numpy().reshape(-1).view(np.uint8) for p in parameters]
    parts = [*head, lengths, *streams.pieces]
    section = torch.empty(sum(p.size for p in parts), dtype=torch.uint8)
    engine.join(parts, section.numpy())
    return section.to(device)


def read_parameters(book: Codebook, packed: PackedActivation, batch: int) -> tuple[tuple[Tensor, ...], int]:
    """The dynamic parameters at the start of a data section, and where they end.

    Raises:
        CorruptFrame: too few bytes.
    """
    if not book.dynamic or packed.numel == 0:
        return (), 0
    dtype = F.compute_dtype(packed.dtype)
    groups = book.channels if book.per_channel else 1
    count = (1 if book.per_batch else batch) * groups
    size = count * dtype.itemsize
    if len(packed.data) < size * len(book.parameters):
        raise CorruptFrame(f"{len(packed.data)} bytes of data cannot hold the parameters of {batch} samples.")
    found = tuple(
        packed.data[k * size : (k + 1) * size].clone().view(dtype).reshape(-1, groups)
        for k in range(len(book.parameters))
    )
    return found, size * len(book.parameters)


def split(layout: Layout, section: Tensor) -> Streams:
    """Lengths and chunks of a data section, validated: after this, no position in them leaves the section.

    Raises:
        CorruptFrame: they contradict each other.
    """
    data = section.cpu().numpy()
    stored = _stored(layout)
    head = 2 * int(stored.sum())
    if data.size < head:
        raise CorruptFrame(f"{data.size} bytes of data cannot hold the lengths of {layout.total_chunks} chunks.")
    lengths = np.zeros(stored.shape, np.uint16)
    lengths[stored] = data[:head].copy().view(np.uint16)
    coded = layout.is_coded()
    raw = coded & (lengths[:, 0] == f.RAW)
    fixed = layout.fixed_sizes()
    sizes = np.where(coded & ~raw, layout.packed_sizes() + lengths.sum(1, dtype=np.int64), fixed)
    if (lengths[raw, 1:] != 0).any() or (sizes > fixed).any() or (sizes < layout.least_sizes()).any():
        raise CorruptFrame("the length of a chunk is out of range.")
    if int(sizes.sum()) != data.size - head:
        raise CorruptFrame(f"the chunks take {int(sizes.sum())} bytes, the data section has {data.size - head}.")
    return Streams(lengths, sizes, [data[head:]])
