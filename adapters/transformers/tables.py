"""Entropy tables that all layers share: each channel uses the one that fits its codes best.

A table of its own for each group of channels of each layer would cost more memory than it saves: a decoder's takes
32 KiB. With steps that follow sensitivity, the codes of channels differ in little but their spread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dqa_plugins.storage.coder.histograms import best_table, entropy_bits
from dqa_plugins.storage.format.layout import Group, joint_group
from dqa_plugins.storage.format.tables import Table
from dqa_plugins.storage.tables import build_codebook

from .settings import CacheSettings, TensorSettings

TABLES = 8  # at most, for each code width
_ROUNDS = 8  # of Lloyd's algorithm
_TOKENS = 1024  # that words are counted on
_SYMBOLS = 1024  # of a block for each table: a chunk has lengths to keep, whatever its size


def codes_of(t: TensorSettings, rows: Tensor) -> Tensor:
    """(C, T) codes of (C, T) values."""
    y = t.rounded((rows - t.center[:, None]).unsqueeze(0))
    return t.quantizer.grid(y).codes(y)[0].long()


def sample(rows: Tensor, tokens: int, block: int) -> Tensor:
    """(C, about `tokens`) of (C, T): whole blocks, from all over the text."""
    blocks = [b for b in rows.split(block, 1) if b.shape[1] == block] or [rows]
    return torch.cat(blocks[:: max(1, len(blocks) * block // tokens)], 1)


def shared_codebooks(tensors: Sequence[TensorSettings], rows: Sequence[Tensor], block: int) -> list[TensorSettings]:
    """The tensors with codebooks of joint coding, whose tables are common to all of them.

    Args:
        tensors: static, with the grid of a scale.
        rows: (C, T) calibration values of each.
        block: tokens of a block.
    """
    most = min(TABLES, max(1, min(map(len, rows)) * block // _SYMBOLS))
    books = [build_codebook(t.quantizer, "none", None) for t in tensors]
    codes = [codes_of(t, sample(r, _TOKENS, block)).numpy() for t, r in zip(tensors, rows, strict=True)]
    members: dict[tuple[bool, int], list[tuple[int, int]]] = {}
    for i, book in enumerate(books):
        for g in book.groups:
            members.setdefault((g.signed, g.width), []).extend((i, c) for c in g.channels)
    groups: list[list[Group]] = [[] for _ in tensors]
    for (signed, width), places in sorted(members.items()):
        low = max(0, width - 8)
        coded = (np.stack([codes[i][c] for i, c in places]) & ((1 << width) - 1)) >> low
        for chosen, table in _tables(coded, width - low, signed, most):
            own: dict[int, list[int]] = {}
            for k in chosen:
                own.setdefault(places[k][0], []).append(places[k][1])
            for i, channels in own.items():
                groups[i].append(joint_group(tuple(sorted(channels)), width, signed, table))
    return [
        replace(t, book=replace(b, coding="joint", groups=tuple(g), plans={}))
        for t, b, g in zip(tensors, books, groups, strict=True)
    ]


def _tables(values: NDArray[np.int64], bits: int, signed: bool, most: int) -> list[tuple[NDArray[np.int64], Table]]:
    """(rows, their table) for values (R, T) of so many bits, at most so many tables."""
    counts = np.stack([np.bincount(row, minlength=1 << bits) for row in values]).astype(np.float64)
    labels = clusters(counts, most)
    found = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        found.append((rows, best_table(values[rows], bits, signed, True)[0]))
    return found


def clusters(counts: NDArray[np.float64], most: int) -> NDArray[np.int64]:
    """(R,) cluster of each histogram (R, A): Lloyd's algorithm, with code length as the distance."""
    order = np.argsort(entropy_bits(counts), kind="stable")
    labels = np.empty(len(counts), np.int64)
    labels[order] = np.arange(len(counts)) * min(most, len(counts)) // len(counts)
    for _ in range(_ROUNDS):
        sums = np.stack([counts[labels == k].sum(0) for k in np.unique(labels)])
        smooth = sums + np.maximum(0.02, 1e-5 * sums.sum(1, keepdims=True))
        cost = -counts @ np.log2(smooth / smooth.sum(1, keepdims=True)).T
        labels = cost.argmin(1)
    return labels


def coded_bits(tensors: Sequence[TensorSettings], rows: Sequence[Tensor], block: int) -> float:
    """Bits per value that blocks of these values take, all that is held with them included."""
    pairs = tuple(zip(tensors[::2], tensors[1::2], strict=True))
    coders = CacheSettings({}, pairs, (None,) * len(pairs), block=block).coders
    held = values = 0
    for t, r in zip(tensors, rows, strict=True):
        count = r.shape[1] // block
        y = (r - t.center[:, None])[:, : count * block].unflatten(1, (count, block)).transpose(0, 1).contiguous()
        held += coders[t.quantizer.name].encode(t.rounded(y)).nbytes
        values += y.numel()
    return 8 * held / max(values, 1)
