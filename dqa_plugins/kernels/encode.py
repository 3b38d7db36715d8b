"""Quantize and encode in one pass over the tensor, a chunk of 4096 values at a time.

Requirements this file meets:

- A chunk stays in the first-level cache: values are read once, only the packed bytes are written.
- Codes are bit-exact with `functional`: it divides by the step, this multiplies by the inverse, which is several
  times faster, and repeats a block with true division where any value lies near enough to a tie to differ.
- NaN and Inf are found in the same pass.
- nogil and no thread pool of its own: callers run ranges of chunks in as many threads as they like.
- Entropy coding by table: an index of several symbols gives a code and its length.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from . import fields as f
from .compiling import kernel
from .memory import float_bits, load64, prefetch, store64
from .planes import pack_planes, part_of

_BLOCK = 1024
_MAGIC = np.float32(12582912.0)  # 1.5 * 2^23: adding it rounds half to even and leaves the integer in the low bits
_u = np.uint64


@njit(inline="always")
def _quantize_exact(x, step, low, high, q):  # type: ignore[no-untyped-def]
    """The definition: clamp(round(x / step)), with the division. Returns 1 for NaN or Inf."""
    divisor = step if step > np.float32(0) else np.float32(1)
    for i in range(x.size):
        if not np.isfinite(x[i]):
            return 1
        v = np.float32(x[i] / divisor)
        v = high if high < v else v
        v = low if low > v else v
        q[i] = np.int32(np.rint(v)) if step > np.float32(0) else 0
    return 0


@kernel
def quantize(x, base, size, step, low, high, q, at):  # type: ignore[no-untyped-def]
    """clamp(round(x / step)) of x[base : base + size], a piece of one channel, into the low bits of q[at : at + size].

    q is uint8 or uint16. Positions instead of slices: making slices costs more than short pieces do.

    Returns 1 where x holds NaN or Inf, else 0.
    """
    inverse = np.float32(1) / step if step > np.float32(0) else np.float32(0)
    usable = np.isfinite(inverse) and (step == np.float32(0) or step > np.float32(1e-37))
    # |x * (1 / step) - x / step| < 2^-22 * |x / step|: only values this close to a tie may round differently
    near = np.float32(0.5) - (max(abs(low), abs(high)) + np.float32(1)) * np.float32(2.0**-22)
    sign = np.int32(-2147483648)
    for block in range((size + _BLOCK - 1) // _BLOCK):
        start = block * _BLOCK
        count = min(_BLOCK, size - start)
        source, target = _u(base + start), _u(at + start)
        flags = np.int32(0)
        for i in range(_u(count)):
            value = x[source + i]
            v = value * inverse
            v = high if high < v else v  # a NaN fails both comparisons and stays
            v = low if low > v else v
            r = np.float32(v + _MAGIC)
            q[target + i] = float_bits(r)
            distance = np.float32(abs(np.float32(v - np.float32(r - _MAGIC))))
            # x - x is +0 unless x is NaN or Inf; near - distance is negative next to a tie
            flag = np.int32(float_bits(np.float32(near - distance)) & sign)
            flags = np.int32(flags | np.int32(float_bits(np.float32(value - value)) | flag))  # int32: vectorises
        if flags != 0 or not usable:
            first, to = base + start, at + start
            if _quantize_exact(x[first : first + count], step, low, high, q[to : to + count]):
                return 1
    return 0


@kernel
def encode_streams(index, table, flush, out, position, lengths, flags, x, ahead):  # type: ignore[no-untyped-def]
    """Write the four quarters of `index` as four byte-aligned streams, one behind the other.

    One stream after the other: the processor overlaps them by itself, and all its state stays in registers.

    Args:
        index: (4 L,) uint16, L a multiple of `flush`: rows of `table`.
        table: uint64: code << 9 | escape << 6 | length in bits.
        flush: look-ups between two writes, 2 or 4; flush * longest code + 7 < 64, so that lengths add up in six bits
            and escapes in the three above.
        out: uint8, written from `position`, and up to 8 bytes more.
        lengths: (4,) uint16, bytes of each stream, written.
        flags: uint8, one for every `flush` look-ups: in the low three bits the number of escapes among them.
        x, ahead: the input, and the byte of it where the next chunk starts; an empty array and 0: there is none.

    Returns:
        (position behind the streams, whether there was an escape).
    """
    quarter = index.size // 4
    turns = quarter // flush
    seen = _u(0)
    c3, c6, c7, c9, c56, c63 = _u(3), _u(6), _u(7), _u(9), _u(56), _u(63)
    stride = 4 * f.CHUNK // max(4 * turns, 1) if x.size > 0 else 0
    for s in range(4):
        first = _u(s * quarter)
        start = position
        a = n = _u(0)  # pending bits and, in the low 6 bits of n, their number: what lies above is of no account
        first_flag = _u(s * turns)
        for j in range(_u(turns)):
            prefetch(x, ahead)
            ahead += stride
            at = first + j * _u(flush)
            e0, e1 = table[index[at]], table[index[at + _u(1)]]
            a |= (e0 >> c9) << (n & c63)
            n += e0
            a |= (e1 >> c9) << (n & c63)
            n += e1
            if flush == 4:
                e0, e1 = table[index[at + _u(2)]], table[index[at + _u(3)]]
                a |= (e0 >> c9) << (n & c63)
                n += e0
                a |= (e1 >> c9) << (n & c63)
                n += e1
            flags[first_flag + j] = np.uint8(n >> c6)
            seen |= n
            store64(out, position, a)
            position += np.int64((n & c63) >> c3)
            a >>= n & c56
            n &= c7
        store64(out, position, a)
        position += np.int64(n > 0)
        lengths[s] = position - start
    return position, (seen & _u(0x1C0)) != 0


@kernel
def _fixed(low, high, width, count, part, out, position):  # type: ignore[no-untyped-def]
    """The whole codes with fixed width: the low byte's planes, then the rest's."""
    columns = (count + 7) // 8
    part_of(low, high, False, 0, min(width, 8), 8 * columns, part)
    position = pack_planes(part, min(width, 8), columns, out, position)
    if width > 8:
        part_of(low, high, True, 8, width - 8, 8 * columns, part)
        position = pack_planes(part, width - 8, columns, out, position)
    return position


@kernel
def deal(values, quarter, out):  # type: ignore[no-untyped-def]
    """Deal blocks of 16 symbols to four quarters in turn: the streams then have like statistics and like lengths."""
    for j in range(quarter // 16):
        for s in range(4):
            store64(out, s * quarter + 16 * j, load64(values, 64 * j + 16 * s))
            store64(out, s * quarter + 16 * j + 8, load64(values, 64 * j + 16 * s + 8))


@kernel
def word_index(symbols, bits, word, index):  # type: ignore[no-untyped-def]
    """index = the `word` consecutive symbols (uint8, below 2^bits), first one lowest. Returns the number of words."""
    words = symbols.size // word
    if word == 4:
        four = symbols.view(np.uint32)
        mask = np.uint32((1 << bits) - 1)
        s1, s2, s3 = np.uint32(8 - bits), np.uint32(16 - 2 * bits), np.uint32(24 - 3 * bits)
        m1, m2, m3 = mask << np.uint32(bits), mask << np.uint32(2 * bits), mask << np.uint32(3 * bits)
        for i in range(words):
            w = four[i]
            index[i] = np.uint16((w & mask) | ((w >> s1) & m1) | ((w >> s2) & m2) | ((w >> s3) & m3))
    elif word == 2:
        two = symbols.view(np.uint16)
        low, shift = np.uint16(255), np.uint16(8 - bits)
        high = np.uint16(((1 << bits) - 1) << bits)
        for i in range(words):
            index[i] = (two[i] & low) | ((two[i] >> shift) & high)
    else:
        for i in range(words):
            index[i] = symbols[i]
    return words


@kernel
def write_escapes(part, symbols, index, table, group, flags, out, position):  # type: ignore[no-untyped-def]
    """Append the values that the streams name only as escapes, CODED_BITS bits each, lowest bit first.

    A word without a code of its own was written as the word of escapes only: all its values follow.
    """
    word, bits, escape, flush = group[f.WORD], group[f.CODED_BITS], group[f.ESCAPE], group[f.FLUSH]
    everything = 0
    for _ in range(word):
        everything = (everything << group[f.SYMBOL_BITS]) | escape
    replaced = table[everything]
    pending, filled = _u(0), 0
    turns = symbols.size // (word * flush)
    flags[turns : turns + 8] = 0
    for eight in range((turns + 7) // 8):
        block = 8 * eight
        if load64(flags, block) & _u(0x0707070707070707) == 0:
            continue
        for turn in range(block, min(block + 8, turns)):
            if flags[turn] & 7 == 0:
                continue
            for i in range(turn * flush, (turn + 1) * flush):
                entry = table[index[i]]
                if entry & _u(0x40):
                    for k in range(i * word, (i + 1) * word):
                        if entry == replaced or symbols[k] == escape:
                            pending |= _u(part[k]) << _u(filled)
                            filled += bits
                            while filled >= 8:
                                out[position] = np.uint8(pending & _u(255))
                                position += 1
                                pending >>= _u(8)
                                filled -= 8
    if filled > 0:
        out[position] = np.uint8(pending & _u(255))
        position += 1
    return position


@kernel
def encode_chunk(low, high, count, group, table, out, position, lengths, part, symbols, index, flags, x, ahead):  # type: ignore[no-untyped-def]
    """Write the `count` codes of a chunk, given by their bytes; returns the next position. Rest as `encode_range`."""
    start = position
    width, wide = group[f.WIDTH], group[f.WIDTH] > 8
    if group[f.CODED_BITS] == 0:
        return _fixed(low, high, width, count, part, out, position)
    columns = (count + 7) // 8
    if group[f.PACKED_BITS] > 0:
        part_of(low, high, wide, group[f.PACKED_SHIFT], group[f.PACKED_BITS], 8 * columns, part)
        position = pack_planes(part, group[f.PACKED_BITS], columns, out, position)
    padded = (count + 63) // 64 * 64
    part_of(low, high, wide, group[f.CODED_SHIFT], group[f.CODED_BITS], padded, symbols)
    deal(symbols, padded // 4, part)
    if group[f.ESCAPE] < 256:
        lowest, mask = np.uint8(group[f.LOWEST] & 255), np.uint8((1 << group[f.CODED_BITS]) - 1)
        escape = np.uint8(group[f.ESCAPE])
        for i in range(padded):
            s = np.uint8(np.uint8(part[i] - lowest) & mask)
            symbols[i] = s if s < escape else escape
    dealt = symbols[:padded] if group[f.ESCAPE] < 256 else part[:padded]
    words = word_index(dealt, group[f.SYMBOL_BITS], group[f.WORD], index)
    position, escapes = encode_streams(index[:words], table, group[f.FLUSH], out, position, lengths, flags, x, ahead)
    if escapes:
        end = write_escapes(part, dealt, index, table, group, flags, out, position)
        lengths[4] = end - position
        position = end
    if position - start > width * columns:
        lengths[:] = 0
        lengths[0] = f.RAW
        position = _fixed(low, high, width, count, part, out, start)
    return position


@kernel
def split(codes, base, size, low, high, at):  # type: ignore[no-untyped-def]
    """The bytes of the 16-bit codes[base : base + size], into low and high from `at`."""
    source, target = _u(base), _u(at)
    for i in range(_u(size)):
        code = np.uint16(codes[source + i])
        low[target + i] = np.uint8(code & np.uint16(255))
        high[target + i] = np.uint8(code >> np.uint16(8))


@kernel
def encode_range(x, codes, steps, inner, channels, groups, tables, first, last, out, lengths, sizes):  # type: ignore[no-untyped-def]
    """Quantize and encode chunks `first` to `last` - 1.

    Args:
        x: (B * C * inner,) float32, contiguous; or empty, with the codes given instead.
        codes: (B * C * inner,) int16, codes computed elsewhere; or empty.
        steps: (B or 1, C) float32, the step of each channel; unused where codes are given.
        inner: values of one channel of one sample, which lie side by side.
        channels: int64, channel numbers, group after group.
        groups: (G, FIELDS) int64, see `fields`.
        tables: (G, T) uint64, encoder tables (any row for a group without one).
        out: uint8, at least the fixed-width size of these chunks and SLACK.
        lengths: (chunks, 5) uint16, written: bytes of the four streams and of the escapes.
        sizes: (chunks,) int64, written: bytes of each chunk.

    Returns:
        bytes written, or -1 - chunk where NaN or Inf was found.
    """
    low, high = np.zeros(f.CHUNK + 64, np.uint8), np.zeros(f.CHUNK + 64, np.uint8)
    whole = np.zeros(f.CHUNK + 64, np.uint16)
    part, symbols = np.zeros(f.CHUNK + 64, np.uint8), np.zeros(f.CHUNK + 64, np.uint8)
    index, flags = np.zeros(f.CHUNK + 64, np.uint16), np.zeros(f.CHUNK + 64, np.uint8)
    total = steps.shape[1]
    position, g = 0, 0
    for chunk in range(first, last):
        while g + 1 < groups.shape[0] and chunk >= groups[g + 1, f.FIRST_CHUNK]:
            g += 1
        group = groups[g]
        begin = (chunk - group[f.FIRST_CHUNK]) * f.CHUNK
        count = min(f.CHUNK, group[f.SYMBOLS] - begin)
        wide = group[f.WIDTH] > 8
        least = -np.float32(group[f.SIGN])
        most = np.float32((1 << group[f.WIDTH]) - 1) + least
        row, offset = begin // inner, begin % inner
        filled = 0
        while filled < count:
            sample = row // group[f.CHANNELS]
            channel = channels[group[f.CHANNEL_OFFSET] + row % group[f.CHANNELS]]
            size = min(inner - offset, count - filled)
            base = (sample * total + channel) * inner + offset
            if x.size == 0:
                split(codes, base, size, low, high, filled)
            else:
                step = steps[sample if steps.shape[0] > 1 else 0, channel]
                if wide:
                    bad = quantize(x, base, size, step, least, most, whole, filled)
                else:
                    bad = quantize(x, base, size, step, least, most, low, filled)
                if bad:
                    return -1 - chunk
            filled += size
            row += 1
            offset = 0
        if wide and x.size > 0:
            split(whole, 0, count, low, high, 0)
        low[count : (count + 63) // 64 * 64] = 0
        high[count : (count + 63) // 64 * 64] = 0
        lengths[chunk, :] = 0
        start = position
        ahead = 4 * (((row // group[f.CHANNELS]) * total + channels[group[f.CHANNEL_OFFSET]]) * inner + offset)
        if x.size == 0:
            ahead = 0  # an address that belongs to no page is slow to ask for
        position = encode_chunk(
            low, high, count, group, tables[g], out, position, lengths[chunk], part, symbols, index, flags, x, ahead
        )
        sizes[chunk] = position - start
    return position
