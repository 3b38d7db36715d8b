"""The frame: packed bytes that stand for themselves (docs/storage_format.md, byte by byte).

    header | shape | [outlier counts] | codebook section | data section

The checksum covers everything but itself. It guards against damage, not against intent: so every length is also
checked against every other before it is used, and nothing is allocated that the bytes at hand cannot fill.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .codebook import Codebook
from .errors import CorruptFrame, UnsupportedFrame
from .limits import DTYPES, MAX_DIMENSIONS, MAX_PRODUCT, MAX_SYMBOLS_PER_BYTE, VERSION
from .section import read_codebook, write_codebook

MAGIC = b"DQAP"
HEADER = struct.Struct("<4sBBBBIQI")  # magic, version, dtype, dimensions, flags, codebook bytes, data bytes, CRC-32
_CRC_AT = HEADER.size - 4
COUNTS = struct.Struct("<QQ")  # outliers, bytes of their positions
_FIXED, _BITMAP, _HAS_OUTLIERS = 1, 2, 4


@dataclass(frozen=True, eq=False)
class Frame:
    """What a frame holds: plain data.

    Args:
        shape, dtype: of the tensor.
        codebook: of its layer, shared.
        data: (bytes,) uint8, the data section, on the device of the tensor.
        fixed: stored with fixed-width codes, because the entropy coder would have made it larger.
        outliers: number of values that are kept in float.
        position_bytes, bitmap: how their positions are stored.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    codebook: Codebook
    data: Tensor
    fixed: bool = False
    outliers: int = 0
    position_bytes: int = 0
    bitmap: bool = False

    @property
    def numel(self) -> int:
        """Values of the tensor."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Bytes held for this tensor, all side information included: its frame without the codebook."""
        return overhead(len(self.shape), self.codebook.keeps_outliers) + len(self.data)


def overhead(dimensions: int, outliers: bool) -> int:
    """Bytes of a frame in front of its codebook."""
    return HEADER.size + 4 * dimensions + (COUNTS.size if outliers else 0)


def _checksum(parts: list[bytes | memoryview]) -> int:
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return value


def write_frame(frame: Frame) -> bytes:
    """The bytes of a frame."""
    sparse = frame.codebook.keeps_outliers
    flags = _FIXED * frame.fixed | _BITMAP * frame.bitmap | _HAS_OUTLIERS * sparse
    codebook, data = write_codebook(frame.codebook), frame.data.cpu().numpy().tobytes()
    head = HEADER.pack(MAGIC, VERSION, DTYPES.index(frame.dtype), len(frame.shape), flags, len(codebook), len(data), 0)
    shape = struct.pack(f"<{len(frame.shape)}I", *frame.shape)
    counts = COUNTS.pack(frame.outliers, frame.position_bytes) if sparse else b""
    crc = _checksum([head[:_CRC_AT], shape, counts, codebook, data])
    return b"".join([head[:_CRC_AT], struct.pack("<I", crc), shape, counts, codebook, data])


def read_frame(data: bytes | bytearray | memoryview) -> Frame:
    """Inverse of `write_frame`.

    Raises:
        CorruptFrame: these are no bytes, or not those of a frame. UnsupportedFrame: of another version.
    """
    try:
        view = memoryview(data).cast("B")
    except TypeError as error:
        raise CorruptFrame(f"a frame is read from bytes, got {type(data).__name__}: {error}.") from None
    if len(view) < HEADER.size:
        raise CorruptFrame(f"{len(view)} bytes are less than a header of {HEADER.size}.")
    magic, version, dtype, dimensions, flags, codebook_bytes, data_bytes, crc = HEADER.unpack(view[: HEADER.size])
    if magic != MAGIC:
        raise CorruptFrame(f"this is no packed activation: it starts with {bytes(magic)!r}, not {MAGIC!r}.")
    if version != VERSION:
        raise UnsupportedFrame(f"format version {version}; this release reads version {VERSION}.")
    if dtype >= len(DTYPES) or not 1 <= dimensions <= MAX_DIMENSIONS or flags >= 8:
        raise CorruptFrame(f"header fields out of range: dtype {dtype}, {dimensions} dimensions, flags {flags}.")
    counts_size = COUNTS.size if flags & _HAS_OUTLIERS else 0
    start = HEADER.size + 4 * dimensions + counts_size
    if len(view) != start + codebook_bytes + data_bytes:
        raise CorruptFrame(
            f"the header announces {start + codebook_bytes + data_bytes} bytes, there are {len(view)}: truncated, or "
            "followed by something else."
        )
    if _checksum([view[:_CRC_AT], view[HEADER.size :]]) != crc:
        raise CorruptFrame("the checksum does not match: the bytes are damaged.")
    shape = struct.unpack(f"<{dimensions}I", view[HEADER.size : HEADER.size + 4 * dimensions])
    outliers, position_bytes = COUNTS.unpack(view[start - counts_size : start]) if counts_size else (0, 0)
    numel = strides = 1
    for size in shape:
        numel *= size
        strides *= max(size, 1)
    if numel > MAX_SYMBOLS_PER_BYTE * data_bytes or strides > MAX_PRODUCT:  # an empty tensor has strides too
        raise CorruptFrame(f"shape {shape} cannot be packed in {data_bytes} bytes.")
    book = read_codebook(view[start : start + codebook_bytes])
    sparse = book.keeps_outliers
    if sparse != bool(flags & _HAS_OUTLIERS) or (flags & _BITMAP and not sparse):
        raise CorruptFrame("outliers are announced for a method without them, or missing.")
    itemsize = DTYPES[dtype].itemsize
    if outliers > numel or position_bytes > data_bytes or outliers * itemsize > data_bytes - position_bytes:
        raise CorruptFrame(f"{outliers} outliers of {numel} values do not fit {data_bytes} bytes.")
    return Frame(
        shape=tuple(shape),
        dtype=DTYPES[dtype],
        codebook=book,
        data=torch.from_numpy(np.frombuffer(view, np.uint8, data_bytes, start + codebook_bytes).copy()),
        fixed=bool(flags & _FIXED),
        outliers=outliers,
        position_bytes=position_bytes,
        bitmap=bool(flags & _BITMAP),
    )
