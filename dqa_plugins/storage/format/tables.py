"""Entropy tables: which units get a code, and the look-up tables that the kernels run on.

A unit is one symbol (kind "symbols") or a word of 2 or 4 neighbouring symbols (kind "words"). Words go below one bit
per symbol, and learn how neighbours depend on each other, at no cost in speed: the encoder looks up several symbols
at once either way. Symbols outside a contiguous range, and words too rare for a code, are escapes: their values
follow, with fixed width, behind the streams.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .errors import CorruptFrame
from .limits import LONGEST_CODE

NO_ESCAPE = 256
SYMBOLS_PER_LOOKUP = 6


@dataclass(frozen=True)
class Table:
    """A code for one group of channels.

    Args:
        word: symbols of a unit: 1 (kind "symbols"), 2 or 4.
        symbol_bits: b; symbols are below 2^b.
        lowest: the value of the coded part that symbol 0 stands for (modulo 2^coded_bits).
        escape: the symbol 2^b - 1 if it is an escape, else NO_ESCAPE.
        lengths: (2^(b * word),) uint8, code lengths in bits; 0: no code.
    """

    word: int
    symbol_bits: int
    lowest: int
    escape: int
    lengths: NDArray[np.uint8]

    @property
    def lookup(self) -> int:
        """g, the symbols of one encoder index."""
        if self.word > 1:
            return self.word
        return 4 if self.symbol_bits <= 3 else 2 if self.symbol_bits <= 6 else 1

    @property
    def flush(self) -> int:
        """Look-ups between two writes of the encoder: as many as fit 64 bits with 7 pending."""
        return 2 if self.lookup > self.word else 4

    @cached_property
    def encoder(self) -> NDArray[np.uint64]:
        """(2^(b * g),) uint64: code << 9 | escape << 6 | length, see `kernels.encode.encode_streams`."""
        codes, lengths = canonical_codes(self.lengths), self.lengths.astype(np.uint64)
        bits, lookup = self.symbol_bits, self.lookup
        index = np.arange(1 << (bits * lookup))
        parts = [(index >> (bits * k)) & ((1 << bits) - 1) for k in range(lookup)]
        escapes = np.zeros(index.size, bool)
        if self.escape != NO_ESCAPE:
            for part in parts:
                escapes |= part == self.escape
        if self.word > 1:
            unit = np.where(lengths > 0, index, index.size - 1)  # the last word is that of escapes only
            escapes |= lengths == 0
            code, length = codes[unit], lengths[unit]
        else:
            code, length = np.zeros(index.size, np.uint64), np.zeros(index.size, np.uint64)
            for part in parts:
                code |= codes[part] << length
                length = length + lengths[part]
        return (code << np.uint64(9)) | (escapes.astype(np.uint64) << np.uint64(6)) | length

    @cached_property
    def decoder(self) -> NDArray[np.uint64]:
        """(2^LONGEST_CODE,) uint64: up to six symbols as bytes, their number << 48, the bits they took << 56."""
        unit, length = self.units
        window = np.arange(1 << LONGEST_CODE)
        symbols = np.zeros(window.size, np.uint64)
        count, used = np.zeros(window.size, np.int64), np.zeros(window.size, np.int64)
        active = np.ones(window.size, bool)
        mask = (1 << self.symbol_bits) - 1
        while active.any():
            rest = window >> used
            active &= (used + length[rest] <= LONGEST_CODE) & (count + self.word <= SYMBOLS_PER_LOOKUP)
            for k in range(self.word):
                value = ((unit[rest] >> (self.symbol_bits * k)) & mask).astype(np.uint64)
                shift = np.where(active, 8 * (count + k), 0).astype(np.uint64)
                symbols |= np.where(active, value << shift, 0).astype(np.uint64)
            count += np.where(active, self.word, 0)
            used += np.where(active, length[rest], 0)
        return symbols | (count.astype(np.uint64) << np.uint64(48)) | (used.astype(np.uint64) << np.uint64(56))

    @cached_property
    def units(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For each window of LONGEST_CODE bits: the unit that it starts with, and that unit's code length."""
        codes = canonical_codes(self.lengths)
        unit, length = np.zeros(1 << LONGEST_CODE, np.int64), np.zeros(1 << LONGEST_CODE, np.int64)
        for i in np.flatnonzero(self.lengths):
            windows = slice(int(codes[i]), None, 1 << int(self.lengths[i]))
            unit[windows], length[windows] = i, self.lengths[i]
        return unit, length

    def check(self) -> None:
        """Refuse lengths that a decoder cannot use.

        Raises:
            CorruptFrame: not a complete prefix code; a symbol without a code; words without the word of escapes.
        """
        check_lengths(self.lengths)
        # a word without a code is written as the last word; a rare symbol has no such way out
        if self.lengths[-1] == 0 if self.word > 1 else (self.lengths == 0).any():
            raise CorruptFrame("a symbol, or the word of escapes, has no code.")

    def cost(self, words: NDArray[np.float64], coded_bits: int) -> float:
        """Expected bits per symbol.

        Args:
            words: (2^(b * word),) probability of each unit before rare ones become escapes.
            coded_bits: width of an escaped value.
        """
        length = self.lengths.astype(np.float64)
        index = np.arange(words.size)
        escapes = np.zeros(words.size)
        if self.escape != NO_ESCAPE:
            for k in range(self.word):
                escapes += ((index >> (self.symbol_bits * k)) & ((1 << self.symbol_bits) - 1)) == self.escape
        bits = np.where(length > 0, length + coded_bits * escapes, length[-1] + coded_bits * self.word)
        return float((words * bits).sum() / self.word)


def check_lengths(lengths: NDArray[np.uint8], limit: int = LONGEST_CODE) -> None:
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
