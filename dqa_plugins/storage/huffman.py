"""Huffman codes: optimal lengths under a limit, and the canonical codes that follow from them.

Only the lengths are ever stored; encoder and decoder derive the same codes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .errors import CorruptFrame


def code_lengths(weights: NDArray[np.float64], limit: int) -> NDArray[np.uint8]:
    """Code lengths of least expected length, none above the limit (package-merge: Larmore and Hirschberg, 1990).

    Args:
        weights: (n,) of any unit, n >= 2; units with weight 0 get no code.
        limit: longest code in bits.

    Returns:
        (n,) lengths in bits, 0 for no code. The code is complete: the sum of 2^-length is 1.

    Raises:
        ValueError: fewer than two positive weights, or more than 2^limit.
    """
    used = np.flatnonzero(weights > 0)
    if not 2 <= used.size <= 1 << limit:
        raise ValueError(f"a Huffman code needs 2 to {1 << limit} positive weights, got {used.size}")
    order = used[np.argsort(weights[used], kind="stable")]
    leaves = weights[order].astype(np.float64)
    level, masks = leaves, [np.ones(leaves.size, bool)]
    for _ in range(limit - 1):
        pairs = level[: level.size // 2 * 2].reshape(-1, 2).sum(1)
        merged = np.concatenate([leaves, pairs])
        rank = np.argsort(merged, kind="stable")
        masks.append(rank < leaves.size)
        level = merged[rank]
    sorted_lengths = np.zeros(leaves.size, np.uint8)
    take = 2 * leaves.size - 2
    for is_leaf in reversed(masks):  # each package taken on one level takes two items on the level below
        chosen = int(is_leaf[:take].sum())
        sorted_lengths[:chosen] += 1
        take = 2 * (take - chosen)
    lengths = np.zeros(weights.size, np.uint8)
    lengths[order] = sorted_lengths
    return lengths


def check_lengths(lengths: NDArray[np.uint8], limit: int) -> None:
    """Refuse lengths that are not a complete prefix code with at least two words.

    Raises:
        CorruptFrame: they are not.
    """
    used = lengths[lengths > 0].astype(np.int64)
    if used.size < 2 or used.max() > limit or (1 << (limit - used)).sum() != 1 << limit:
        raise CorruptFrame(
            f"code lengths {np.unique(used).tolist()} are not those of a complete code of at most {limit} bits."
        )


def canonical_codes(lengths: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Canonical codes, first bit lowest: shorter codes first, then lower units (as in RFC 1951, bit-reversed).

    Returns:
        (n,) codes; 0 where the length is 0.
    """
    codes = np.zeros(lengths.size, np.uint64)
    value, previous = 0, 0
    order = np.lexsort((np.arange(lengths.size), lengths))
    for unit in order[lengths[order] > 0]:
        length = int(lengths[unit])
        value <<= length - previous
        previous = length
        codes[unit] = int(format(value, f"0{length}b")[::-1], 2)
        value += 1
    return codes
