"""Huffman codes: optimal lengths under a limit. The codes follow from the lengths (`format.tables`)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


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
