"""The data section of a frame: parameters, lengths of the coded chunks, the chunks, and values kept in float.

Cutting it apart checks everything that the bytes say about sizes: after this, no position in them leaves the section.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...rounding import compute_dtype
from .codebook import Codebook
from .errors import CorruptFrame
from .frame import Frame
from .layout import Layout
from .limits import LENGTHS_PER_CHUNK, RAW
from .outliers import decode_positions
from .tables import NO_ESCAPE


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


@dataclass(frozen=True)
class Sections:
    """A data section, cut apart.

    Args:
        layout: of the chunks.
        parameters: (B or 1, C or 1, 1) each, in the compute dtype, stored with the tensor or not.
        streams: the chunks.
        positions, values: of the values kept in float, in the order of the rows; None where none are.
    """

    layout: Layout
    parameters: tuple[Tensor, ...]
    streams: Streams
    positions: NDArray[np.int64] | None
    values: Tensor | None


def row_shape(shape: tuple[int, ...], axis: int, channels: int) -> tuple[int, int]:
    """(B, I) of a tensor of this shape with C channels along `axis` (0: channels are not told apart, C = 1).

    Raises:
        CorruptFrame: the axis or the number of channels does not fit the shape.
    """
    if axis and (axis % len(shape) == 0 or not -len(shape) <= axis < len(shape)):
        raise CorruptFrame(f"channel axis {axis} does not exist in shape {shape}.")
    if axis and shape[axis] != channels and 0 not in shape:
        raise CorruptFrame(f"shape {shape} has {shape[axis]} channels along axis {axis}, the codebook {channels}.")
    inner = 1
    for i, size in enumerate(shape):
        if i and i != (axis % len(shape) if axis else 0):
            inner *= size
    return shape[0], inner


def two_dimensional(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a tensor is packed in: (B,) is (B, 1)."""
    return (*shape, 1) if len(shape) == 1 else shape


def stored_lengths(layout: Layout) -> NDArray[np.bool_]:
    """(chunks, 5) which lengths are stored: four of a coded chunk, five where its table has escapes."""
    stored = np.zeros((layout.total_chunks, LENGTHS_PER_CHUNK), bool)
    chunk = 0
    for g in layout.groups:
        after = chunk + layout.chunks(g)
        if g.table is not None:
            stored[chunk:after, :4] = True
            stored[chunk:after, 4] = g.table.escape != NO_ESCAPE
        chunk = after
    return stored


def row_parameters(book: Codebook, stored: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The parameters of a tensor of this dtype: (B or 1, C or 1, 1) each, in its compute dtype.

    Args:
        stored: those that are stored with it, (B or 1, C or 1) each.
    """
    compute = compute_dtype(dtype)
    if book.dynamic:
        return tuple(p.to(compute).unsqueeze(-1) for p in stored)
    return tuple(p.to(compute).reshape(1, -1, 1) for p in book.static)


def cut(frame: Frame) -> Sections:
    """Cut a data section into its parts, and check that they fit each other.

    Raises:
        CorruptFrame: they do not.
    """
    book = frame.codebook
    batch, inner = row_shape(two_dimensional(frame.shape), book.channel_axis, book.channels)
    layout = book.layout(batch, inner, fixed=frame.fixed)
    if frame.numel == 0:
        if len(frame.data):
            raise CorruptFrame(f"an empty tensor has no data, got {len(frame.data)} bytes.")
        return Sections(book.layout(0, 0), (), _streams(book.layout(0, 0), frame.data), None, None)
    stored, at = _stored_parameters(frame, batch)
    parameters = row_parameters(book, stored, frame.dtype)
    end = len(frame.data) - frame.position_bytes - frame.outliers * frame.dtype.itemsize
    if end < at:
        raise CorruptFrame(f"{len(frame.data)} bytes of data cannot hold {frame.outliers} outliers.")
    streams = _streams(layout, frame.data[at:end])
    if not book.keeps_outliers:
        return Sections(layout, parameters, streams, None, None)
    middle = end + frame.position_bytes
    positions = decode_positions(frame.data[end:middle].cpu().numpy(), frame.outliers, frame.numel, frame.bitmap)
    size = frame.outliers * frame.dtype.itemsize
    values = torch.empty(frame.outliers, dtype=frame.dtype, device=frame.data.device)
    if size:
        values.view(torch.uint8).copy_(frame.data[middle : middle + size])
    return Sections(layout, parameters, streams, positions, values)


def _stored_parameters(frame: Frame, batch: int) -> tuple[tuple[Tensor, ...], int]:
    """The parameters at the start of a data section, (B or 1, C or 1) each, and where they end.

    Raises:
        CorruptFrame: too few bytes.
    """
    book, dtype = frame.codebook, compute_dtype(frame.dtype)
    if not book.dynamic:
        return (), 0
    groups = book.channels if book.per_channel else 1
    size = (1 if book.per_batch else batch) * groups * dtype.itemsize
    total = size * len(book.parameters)
    if len(frame.data) < total:
        raise CorruptFrame(f"{len(frame.data)} bytes of data cannot hold the parameters of {batch} samples.")
    starts = range(0, total, size)
    return tuple(frame.data[at : at + size].clone().view(dtype).reshape(-1, groups) for at in starts), total


def _streams(layout: Layout, section: Tensor) -> Streams:
    """Lengths and chunks of their part of a data section, validated.

    Raises:
        CorruptFrame: they contradict each other.
    """
    data = section.cpu().numpy()
    stored = stored_lengths(layout)
    head = 2 * int(stored.sum())
    if data.size < head:
        raise CorruptFrame(f"{data.size} bytes of data cannot hold the lengths of {layout.total_chunks} chunks.")
    lengths = np.zeros(stored.shape, np.uint16)
    lengths[stored] = data[:head].copy().view(np.uint16)
    coded = layout.is_coded()
    raw = coded & (lengths[:, 0] == RAW)
    fixed = layout.fixed_sizes()
    sizes = np.where(coded & ~raw, layout.packed_sizes() + lengths.sum(1, dtype=np.int64), fixed)
    if (lengths[raw, 1:] != 0).any() or (sizes > fixed).any() or (sizes < layout.least_sizes()).any():
        raise CorruptFrame("the length of a chunk is out of range.")
    if int(sizes.sum()) != data.size - head:
        raise CorruptFrame(f"the chunks take {int(sizes.sum())} bytes, the data section has {data.size - head}.")
    return Streams(lengths, sizes, [data[head:]])
