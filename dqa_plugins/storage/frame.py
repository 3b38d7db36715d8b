"""The frame: packed bytes that stand for themselves (docs/storage_format.md, byte by byte).

    header | shape | [outlier counts] | codebook section | data section

The checksum covers everything but itself. It guards against damage, not against intent: so every length is also
checked against every other before it is used, and nothing is allocated that the bytes at hand cannot fill.
"""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from .codebook import Codebook
from .errors import CorruptFrame, UnsupportedFrame
from .layer import read_codebook, write_codebook

if TYPE_CHECKING:
    from .packed import PackedActivation

MAGIC = b"DQAP"
VERSION = 1
HEADER = struct.Struct("<4sBBBBIQI")  # magic, version, dtype, dimensions, flags, codebook bytes, data bytes, CRC-32
_CRC_AT = HEADER.size - 4
_SPARSE = struct.Struct("<QQ")  # outliers, bytes of their positions
_FIXED, _BITMAP, _HAS_OUTLIERS = 1, 2, 4
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_DIMENSIONS = 16
_LARGEST = 2**59  # torch counts bytes in 63 bits
MOST_SYMBOLS_PER_BYTE = 32  # a word of four symbols takes at least one bit


def _checksum(parts: list[bytes | memoryview]) -> int:
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return value


def write_frame(packed: PackedActivation) -> bytes:
    """The frame of a packed activation."""
    sparse = packed.codebook.kind == "dense_sparse"
    flags = _FIXED * packed.fixed | _BITMAP * packed.bitmap | _HAS_OUTLIERS * sparse
    codebook, data = write_codebook(packed.codebook), packed.data.cpu().numpy().tobytes()
    head = HEADER.pack(
        MAGIC, VERSION, _DTYPES.index(packed.dtype), len(packed.shape), flags, len(codebook), len(data), 0
    )
    shape = struct.pack(f"<{len(packed.shape)}I", *packed.shape)
    counts = _SPARSE.pack(packed.outliers, packed.position_bytes) if sparse else b""
    crc = _checksum([head[:_CRC_AT], shape, counts, codebook, data])
    return b"".join([head[:_CRC_AT], struct.pack("<I", crc), shape, counts, codebook, data])


def read_frame(data: bytes | bytearray | memoryview) -> tuple[dict[str, Any], Codebook, NDArray[np.uint8]]:
    """Fields of a PackedActivation, its codebook and its data section.

    Raises:
        CorruptFrame, UnsupportedFrame.
    """
    view = memoryview(data).cast("B")
    if len(view) < HEADER.size:
        raise CorruptFrame(f"{len(view)} bytes are less than a header of {HEADER.size}.")
    magic, version, dtype, dimensions, flags, codebook_bytes, data_bytes, crc = HEADER.unpack(view[: HEADER.size])
    if magic != MAGIC:
        raise CorruptFrame(f"this is no packed activation: it starts with {bytes(magic)!r}, not {MAGIC!r}.")
    if version != VERSION:
        raise UnsupportedFrame(f"format version {version}; this release reads version {VERSION}.")
    if dtype >= len(_DTYPES) or not 1 <= dimensions <= MAX_DIMENSIONS or flags >= 8:
        raise CorruptFrame(f"header fields out of range: dtype {dtype}, {dimensions} dimensions, flags {flags}.")
    counts_size = _SPARSE.size if flags & _HAS_OUTLIERS else 0
    start = HEADER.size + 4 * dimensions + counts_size
    if len(view) != start + codebook_bytes + data_bytes:
        raise CorruptFrame(
            f"the header announces {start + codebook_bytes + data_bytes} bytes, there are {len(view)}: truncated, or "
            "followed by something else."
        )
    if _checksum([view[:_CRC_AT], view[HEADER.size :]]) != crc:
        raise CorruptFrame("the checksum does not match: the bytes are damaged.")
    shape = struct.unpack(f"<{dimensions}I", view[HEADER.size : HEADER.size + 4 * dimensions])
    outliers, position_bytes = _SPARSE.unpack(view[start - counts_size : start]) if counts_size else (0, 0)
    numel = strides = 1
    for size in shape:
        numel *= size
        strides *= max(size, 1)
    if numel > MOST_SYMBOLS_PER_BYTE * data_bytes or strides > _LARGEST:  # an empty tensor has strides too
        raise CorruptFrame(f"shape {shape} cannot be packed in {data_bytes} bytes.")
    book = read_codebook(view[start : start + codebook_bytes])
    sparse = book.kind == "dense_sparse"
    if sparse != bool(flags & _HAS_OUTLIERS) or (flags & _BITMAP and not sparse):
        raise CorruptFrame("outliers are announced for a method without them, or missing.")
    itemsize = _DTYPES[dtype].itemsize
    if outliers > numel or position_bytes > data_bytes or outliers * itemsize > data_bytes - position_bytes:
        raise CorruptFrame(f"{outliers} outliers of {numel} values do not fit {data_bytes} bytes.")
    fields: dict[str, Any] = {
        "shape": tuple(shape),
        "dtype": _DTYPES[dtype],
        "fixed": bool(flags & _FIXED),
        "outliers": outliers,
        "position_bytes": position_bytes,
        "bitmap": bool(flags & _BITMAP),
    }
    return fields, book, np.frombuffer(view, np.uint8, data_bytes, start + codebook_bytes)
