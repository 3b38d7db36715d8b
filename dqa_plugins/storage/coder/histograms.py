"""From calibration codes to entropy tables: which channels share one, and which kind of table is cheapest.

Everything here is deterministic in the calibration codes, and runs once per layer.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from ..format.limits import LONGEST_CODE
from ..format.tables import NO_ESCAPE, Table
from .huffman import code_lengths

MAX_CLUSTERS = 8
MAX_WORDS = 1024  # words with a code: below 2^LONGEST_CODE, so that the limit costs next to nothing
_TABLE_BITS = 8 * 250  # what one more table costs, about
FEWER_TABLES = 0.02  # share of the bits that one table for all channels may cost more: it is faster
_SPEED = 0.005  # share of the bits that a table may cost more if it looks up two symbols at once


def entropy_bits(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bits that `counts` symbols need at order 0: sum of -count * log2(count / total), over the last axis."""
    total = counts.sum(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = np.where(counts > 0, -counts * np.log2(counts / total), 0.0)
    return np.asarray(bits.sum(-1))


def cluster(counts: NDArray[np.float64]) -> NDArray[np.int64]:
    """Group channels with like distributions, so that each group shares one table.

    Channels are ordered by entropy and cut into at most 32 runs; then the pair whose union costs least is joined,
    until at most MAX_CLUSTERS are left and the next union would cost more than a table does (minimum description
    length: the calibration codes stand for the data to come).

    Args:
        counts: (C, A) histogram of each channel.

    Returns:
        (C,) number of each channel's cluster, 0 to clusters - 1.
    """
    size = counts.sum(1)
    order = np.argsort(entropy_bits(counts) / np.maximum(size, 1), kind="stable")
    members = [list(run) for run in np.array_split(order, min(32, len(order))) if len(run)]
    merged = [counts[run].sum(0) for run in members]
    while len(members) > 1:
        own = np.array([float(entropy_bits(m)) for m in merged])
        stacked = np.stack(merged)
        both = entropy_bits(stacked[:, None] + stacked[None])
        loss = both - own[:, None] - own[None]
        np.fill_diagonal(loss, np.inf)
        i, j = sorted(int(k) for k in np.unravel_index(int(loss.argmin()), loss.shape))
        if loss[i, j] > _TABLE_BITS and len(members) <= MAX_CLUSTERS:
            break
        members[i] += members.pop(j)
        merged[i] = merged[i] + merged.pop(j)
    labels = np.zeros(len(counts), np.int64)
    for label, run in enumerate(sorted(members, key=min)):
        labels[run] = label
    return labels


def _smoothed(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities, none zero: a symbol that calibration missed keeps a (long) code."""
    counts = counts + max(0.02, 1e-5 * counts.sum())
    return counts / counts.sum()


def _window(counts: NDArray[np.float64], size: int, signed: bool) -> int:
    """Lowest value of the contiguous range of `size` values that holds the most counts (two's complement order)."""
    half = counts.size // 2
    line = np.roll(counts, half) if signed else counts
    sums = np.convolve(line, np.ones(size), "valid")
    start = int(sums.argmax())
    return (start - half) % counts.size if signed else start


def _mapped(values: NDArray[np.int64], alphabet: int, lowest: int, escape: int) -> NDArray[np.int64]:
    return np.minimum((values - lowest) % alphabet, escape)


def _word_probability(symbols: NDArray[np.int64], bits: int, word: int, neighbours: bool) -> NDArray[np.float64]:
    """Probability of each word: counted where neighbours are known, blended with independent symbols.

    The blend is Witten and Bell's: (count + T * independent) / (N + T), with T the number of distinct words seen.

    Args:
        symbols: (R, K) symbols; along K, runs of `word` are neighbours if `neighbours`.
    """
    single = np.bincount(symbols.ravel(), minlength=1 << bits).astype(np.float64)
    single += 1e-3 * max(1.0, single.sum() / 1024)
    single /= single.sum()
    independent = single
    for _ in range(word - 1):
        independent = (independent[:, None] * single[None, :]).ravel()  # the later symbol lies lower: symmetric
    usable = symbols.shape[1] // word * word
    if not neighbours or usable == 0:
        return independent
    runs = symbols[:, :usable].reshape(-1, word)
    index = (runs << (bits * np.arange(word))).sum(1)
    counts = np.bincount(index, minlength=independent.size).astype(np.float64)
    distinct = float((counts > 0).sum())
    return (counts + distinct * independent) / (counts.sum() + distinct)


def best_table(values: NDArray[np.int64], coded_bits: int, signed: bool, neighbours: bool) -> tuple[Table, float]:
    """The cheapest table for the coded part of a group.

    Args:
        values: (R, K) coded parts of calibration codes, below 2^coded_bits, K >= 1; along K, runs of four are
            neighbours if `neighbours`.
        coded_bits: 1 to 8.
        signed: the part is two's complement (its most likely values then wrap around 0).
        neighbours: whether words may be counted, or are taken to be independent symbols.

    Returns:
        (table, expected bits per symbol on these values).
    """
    alphabet = 1 << coded_bits
    counts = np.bincount(values.ravel(), minlength=alphabet).astype(np.float64)
    single = symbol_table(_smoothed(counts))
    options = [(single, single.cost(counts / counts.sum(), coded_bits), 0.0)]
    if coded_bits > 6:  # 6-bit symbols are looked up in pairs, and hold all but the rarest values
        lowest = _window(counts, 63, signed)
        mapped = np.bincount(_mapped(values.ravel(), alphabet, lowest, 63), minlength=64).astype(np.float64)
        table = symbol_table(_smoothed(mapped), lowest, 63)
        options.append((table, table.cost(mapped / mapped.sum(), coded_bits), -_SPEED))
    for word, bits in ((2, min(6, coded_bits + 1)), (4, 3), (2, 4), (4, 2)):
        if bits > coded_bits + 1:  # one symbol more than there are values is enough
            continue
        escape = (1 << bits) - 1
        lowest = _window(counts, min(escape, alphabet), signed)
        symbols = _mapped(values, alphabet, lowest, escape)
        words = _word_probability(symbols, bits, word, neighbours)
        table = word_table(words, word, lowest, escape)
        options.append((table, table.cost(words, coded_bits), 0.0))

    def description(option: tuple[Table, float, float]) -> float:
        table, cost, bias = option
        return cost * (1 + bias) * values.size + 8 * len(zlib.compress(table.lengths.tobytes()))

    best = min(options, key=description)
    return best[0], best[1]


def symbol_table(probability: NDArray[np.float64], lowest: int = 0, escape: int = NO_ESCAPE) -> Table:
    """A table of single symbols.

    Args:
        probability: (2^b,), b >= 1, all positive; the last one is the escape's if there is one.
    """
    bits = probability.size.bit_length() - 1
    return Table(1, bits, lowest, escape, code_lengths(probability, LONGEST_CODE))


def word_table(words: NDArray[np.float64], word: int, lowest: int, escape: int) -> Table:
    """A table of words: the likely ones get a code, the others share that of the last one, all escapes.

    Args:
        words: (2^(b * word),) probability of each word.
    """
    bits = (words.size.bit_length() - 1) // word
    candidates = np.argsort(-words[:-1], kind="stable")[: MAX_WORDS - 1]
    candidates = candidates[words[candidates] > 2.0 ** -(LONGEST_CODE + 2)]
    if candidates.size == 0:
        candidates = np.zeros(1, np.int64)
    weights = np.zeros(words.size)
    weights[candidates] = np.maximum(words[candidates], 1e-9)
    weights[-1] = max(1.0 - weights.sum(), 2.0**-LONGEST_CODE)
    return Table(word, bits, lowest, escape, code_lengths(weights, LONGEST_CODE))
