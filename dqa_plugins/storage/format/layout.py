"""How the values of a tensor become symbols of chunks: channel groups, the parts of a code, sizes and bounds.

A tensor is seen as (B, C, I): batch, channels, and the I values of a channel, side by side. Channels with the same
code width and the same entropy table form a group. The symbols of a group are its channels' rows, sample after
sample; they are cut into chunks of 4096, and each chunk is coded by itself.

The whole code q of a value has w = n + m bits. A group stores it as up to two packed parts (fixed width) and at most
one coded part (entropy coded):

    none         packed: q                        (two parts where w > 8: the low byte, the rest)
    shift_error  packed: q >> m (n bits)          coded: q & (2^m - 1), the shift error
    joint        packed: low w - 8 bits if w > 8  coded: the rest of q
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from ...options import Coding
from .limits import CHUNK
from .tables import Table

CODINGS: tuple[Coding, ...] = get_args(Coding)


@dataclass(frozen=True)
class Group:
    """Channels that are coded alike.

    Args:
        channels: their numbers, ascending.
        width: w, bits of the whole code q.
        signed: q is two's complement.
        packed: (shift, bits) of each packed part, at most two.
        coded: (shift, bits) of the coded part, bits 0 if there is none.
        table: of the coded part.
    """

    channels: tuple[int, ...]
    width: int
    signed: bool
    packed: tuple[tuple[int, int], ...]
    coded: tuple[int, int] = (0, 0)
    table: Table | None = None


def packed_group(channels: tuple[int, ...], width: int, signed: bool) -> Group:
    """Coding "none"."""
    parts = ((0, width),) if width <= 8 else ((0, 8), (8, width - 8))
    return Group(channels, width, signed, parts)


def shift_error_group(channels: tuple[int, ...], width: int, signed: bool, bits: int, table: Table) -> Group:
    """Coding "shift_error", the DQA paper's: for channels with m = width - bits > 0."""
    extra = width - bits
    return Group(channels, width, signed, ((extra, bits),), (0, extra), table)


def joint_group(channels: tuple[int, ...], width: int, signed: bool, table: Table) -> Group:
    """Coding "joint": the upper 8 bits of q, all of it where w <= 8, are entropy coded."""
    low = max(0, width - 8)
    return Group(channels, width, signed, ((0, low),) if low else (), (low, width - low), table)


@dataclass(frozen=True)
class Layout:
    """The groups of one tensor shape, and how it is cut into chunks.

    Args:
        batch, channels, inner: B, C, I.
        groups: of all its channels.
    """

    batch: int
    channels: int
    inner: int
    groups: tuple[Group, ...]

    def symbols(self, group: Group) -> int:
        """Values of a group in this tensor."""
        return self.batch * len(group.channels) * self.inner

    def chunks(self, group: Group) -> int:
        """Chunks of a group in this tensor."""
        return -(-self.symbols(group) // CHUNK)

    @property
    def total_chunks(self) -> int:
        """Chunks of the tensor."""
        return sum(self.chunks(g) for g in self.groups)

    @property
    def coded_chunks(self) -> int:
        """Chunks that have lengths stored with them."""
        return sum(self.chunks(g) for g in self.groups if g.coded[1])

    def chunk_symbols(self, group: Group) -> NDArray[np.int64]:
        """(chunks,) symbols of each chunk: 4096, and what is left for the last one."""
        sizes = np.full(self.chunks(group), CHUNK, np.int64)
        if sizes.size:
            sizes[-1] = self.symbols(group) - (sizes.size - 1) * CHUNK
        return sizes

    def fixed_sizes(self) -> NDArray[np.int64]:
        """(total_chunks,) bytes of each chunk with fixed-width codes: the most that a chunk ever takes."""
        parts = [(self.chunk_symbols(g) + 7) // 8 * g.width for g in self.groups]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def packed_sizes(self) -> NDArray[np.int64]:
        """(total_chunks,) bytes of each chunk's packed parts where its coded part is coded."""
        parts = [(self.chunk_symbols(g) + 7) // 8 * sum(bits for _, bits in g.packed) for g in self.groups]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def is_coded(self) -> NDArray[np.bool_]:
        """(total_chunks,) whether a chunk belongs to a group with a coded part."""
        parts = [np.full(self.chunks(g), g.coded[1] > 0) for g in self.groups]
        return np.concatenate([np.zeros(0, bool), *parts])

    def least_sizes(self) -> NDArray[np.int64]:
        """(total_chunks,) fewest bytes that a chunk can take: a unit of 4 symbols needs at least one bit."""
        parts = []
        for g in self.groups:
            quarter = (self.chunk_symbols(g) + 63) // 64 * 16
            streams = 4 * (-(-quarter // (8 * g.table.word))) if g.table is not None else 0
            parts.append((self.chunk_symbols(g) + 7) // 8 * sum(bits for _, bits in g.packed) + streams)
        return np.minimum(np.concatenate([np.zeros(0, np.int64), *parts]), self.fixed_sizes())
