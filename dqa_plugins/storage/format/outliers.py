"""The sparse part of Dense+Sparse: where the outliers are, and their values.

Positions are stored as gaps, one to five bytes each (7 bits a byte, the low ones first, the top bit says that more
follow), or as a bit for every value of the tensor where that is shorter. Values keep their dtype, bit for bit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .errors import CorruptFrame
from .limits import MAX_GAP_BYTES


def encode_positions(mask: NDArray[np.bool_]) -> tuple[NDArray[np.uint8], bool]:
    """Positions of the true entries of mask, (numel,), as bytes; True where they are a bitmap."""
    where = np.flatnonzero(mask)
    gaps = np.diff(where, prepend=-1) - 1
    sizes = np.ones(gaps.size, np.int64)
    for k in range(1, MAX_GAP_BYTES):
        sizes += gaps >> (7 * k) > 0
    total = int(np.sum(sizes))
    if total > (mask.size + 7) // 8:
        return np.packbits(mask, bitorder="little"), True
    out = np.zeros(total, np.uint8)
    start = np.cumsum(sizes) - sizes
    for k in range(MAX_GAP_BYTES):
        more = sizes > k
        out[start[more] + k] = ((gaps[more] >> (7 * k)) & 127) | ((sizes[more] > k + 1) << 7)
    return out, False


def decode_positions(data: NDArray[np.uint8], count: int, numel: int, bitmap: bool) -> NDArray[np.int64]:
    """Inverse of `encode_positions`: (count,) ascending positions below numel.

    Raises:
        CorruptFrame: the bytes do not say that.
    """
    if bitmap:
        if data.size != (numel + 7) // 8:
            raise CorruptFrame(f"an outlier bitmap of {numel} values needs {(numel + 7) // 8} bytes, got {data.size}.")
        where = np.flatnonzero(np.unpackbits(data, bitorder="little"))
        if where.size != count or (count and where[-1] >= numel):
            raise CorruptFrame(f"the outlier bitmap marks {where.size} values, the header says {count}.")
        return where
    last = data < 128
    ends = np.flatnonzero(last)
    if ends.size != count or (data.size and not last[-1]):
        raise CorruptFrame(f"the outlier positions hold {ends.size} gaps, the header says {count}.")
    starts = np.concatenate([np.zeros(min(count, 1), np.int64), ends[:-1] + 1])
    sizes = ends - starts + 1
    if count and int(sizes.max()) > MAX_GAP_BYTES:
        raise CorruptFrame(f"a gap between outliers takes {int(sizes.max())} bytes; {MAX_GAP_BYTES} is the most.")
    gaps = np.zeros(count, np.int64)
    for k in range(MAX_GAP_BYTES):
        more = sizes > k
        gaps[more] |= (data[starts[more] + k].astype(np.int64) & 127) << (7 * k)
    where = np.cumsum(gaps + 1) - 1
    if count and int(where[-1]) >= numel:
        raise CorruptFrame(f"an outlier lies at {int(where[-1])} of {numel} values.")
    return where
