"""Decode and dequantize in one pass, a chunk of 4096 values at a time: the inverse of `encode`.

Requirements this file meets:

- Nothing that the bytes say can make it read or write outside its arrays, or loop for long: every look-up gives at
  least one symbol and consumes at most WINDOW bits, so that a quarter of 1024 symbols ends after at most 1024
  look-ups per stream; chunks near the end of the source are decoded from a padded copy. Positions and lengths are
  validated by the caller (`storage.format.data`) before.
- One look-up of 12 bits gives up to six symbols; four streams side by side hide its latency.
"""

from __future__ import annotations

import numpy as np

from . import fields as f
from .compiling import kernel
from .memory import load64, store64
from .planes import merge_part, unpack_planes

_u = np.uint64
_REACH = f.SLOT + 64  # bytes behind its start that a stream of any content can make the decoder read


@kernel
def decode_streams(source, position, lengths, table, quarter, out):  # type: ignore[no-untyped-def]
    """Decode four streams of `quarter` symbols each into out, stream s at s * (quarter + PAD).

    Args:
        source: uint8, readable up to _REACH bytes behind the start of each stream.
        lengths: (4,) uint16, bytes of each stream.
        table: (2^WINDOW,) uint64: up to six symbols as bytes, their number << 48, bits consumed << 56.
        out: uint8, 4 * (quarter + PAD) bytes.
    """
    b0 = position * 8
    b1 = b0 + 8 * np.int64(lengths[0])
    b2 = b1 + 8 * np.int64(lengths[1])
    b3 = b2 + 8 * np.int64(lengths[2])
    stride = quarter + f.PAD
    o0, o1, o2, o3 = 0, stride, 2 * stride, 3 * stride
    end0, end1, end2, end3 = quarter, stride + quarter, 2 * stride + quarter, 3 * stride + quarter
    mask, c48, c56, c63, count = _u((1 << f.WINDOW) - 1), _u(48), _u(56), _u(63), _u(255)
    while (o0 < end0) | (o1 < end1) | (o2 < end2) | (o3 < end3):
        w0 = load64(source, b0 >> 3) >> _u(b0 & 7)
        w1 = load64(source, b1 >> 3) >> _u(b1 & 7)
        w2 = load64(source, b2 >> 3) >> _u(b2 & 7)
        w3 = load64(source, b3 >> 3) >> _u(b3 & 7)
        for _ in range(4):
            e0, e1, e2, e3 = table[w0 & mask], table[w1 & mask], table[w2 & mask], table[w3 & mask]
            store64(out, o0, e0)
            store64(out, o1, e1)
            store64(out, o2, e2)
            store64(out, o3, e3)
            o0 += np.int64((e0 >> c48) & count)
            o1 += np.int64((e1 >> c48) & count)
            o2 += np.int64((e2 >> c48) & count)
            o3 += np.int64((e3 >> c48) & count)
            l0, l1, l2, l3 = e0 >> c56, e1 >> c56, e2 >> c56, e3 >> c56
            w0 >>= l0 & c63
            w1 >>= l1 & c63
            w2 >>= l2 & c63
            w3 >>= l3 & c63
            b0 += np.int64(l0)
            b1 += np.int64(l1)
            b2 += np.int64(l2)
            b3 += np.int64(l3)
        # a stream that is done keeps writing into its padding until the others are
        o0, o1, o2, o3 = min(o0, end0), min(o1, end1), min(o2, end2), min(o3, end3)


@kernel
def read_escapes(streams, quarter, group, source, position, length):  # type: ignore[no-untyped-def]
    """Put the escaped values in place of the escapes. Returns False where their number does not fit the bytes."""
    escape, bits, lowest = group[f.ESCAPE], group[f.CODED_BITS], group[f.LOWEST]
    mask = (1 << bits) - 1
    end = position + length
    pending, filled = 0, 0
    ones, tops = _u(0x0101010101010101), _u(0x8080808080808080)
    pattern = ones * _u(escape)
    for s in range(4):
        begin = s * (quarter + f.PAD)
        for eight in range(quarter // 8):
            block = begin + 8 * eight
            differs = load64(streams, block) ^ pattern
            if (differs - ones) & ~differs & tops == 0:  # no byte of these eight is the escape
                continue
            for i in range(block, block + 8):
                if streams[i] == escape:
                    while filled < bits:
                        if position >= end:
                            return False
                        pending |= np.int64(source[position]) << filled
                        position += 1
                        filled += 8
                    streams[i] = np.uint8(((pending & mask) - lowest) & 255)
                    pending >>= bits
                    filled -= bits
    return position == end


@kernel
def collect(streams, quarter, out):  # type: ignore[no-untyped-def]
    """Blocks of 16 symbols from four quarters in turn: the inverse of `encode.deal`."""
    stride = quarter + f.PAD
    for j in range(quarter // 16):
        for s in range(4):
            store64(out, 64 * j + 16 * s, load64(streams, s * stride + 16 * j))
            store64(out, 64 * j + 16 * s + 8, load64(streams, s * stride + 16 * j + 8))


@kernel
def decode_chunk(source, position, count, group, lengths, table, part, streams, low, high):  # type: ignore[no-untyped-def]
    """Fill low and high with the bytes of one chunk's codes, `width` bits each. Returns False for bad escapes."""
    columns = (count + 7) // 8
    width, wide = group[f.WIDTH], group[f.WIDTH] > 8
    if group[f.CODED_BITS] == 0 or lengths[0] == f.RAW:
        position = unpack_planes(source, position, min(width, 8), columns, low)
        if wide:
            unpack_planes(source, position, width - 8, columns, high)
        return True
    if group[f.PACKED_BITS] > 0:
        shift, bits = group[f.PACKED_SHIFT], group[f.PACKED_BITS]
        position = unpack_planes(source, position, bits, columns, part)
        low[: 8 * columns] = 0
        high[: 8 * columns] = 0
        merge_part(part, shift, count, low, high, wide)
    quarter = (count + 63) // 64 * 16
    decode_streams(source, position, lengths, table, quarter, streams)
    alone = group[f.PACKED_BITS] == 0  # then shift is 0 and width at most 8: the part is the code
    target = low if alone else part
    escapes = group[f.ESCAPE] < 256
    if escapes and lengths[4] > 0:
        for s in range(4):
            position += np.int64(lengths[s])
        if not read_escapes(streams, quarter, group, source, position, np.int64(lengths[4])):
            return False
    collect(streams, quarter, target)
    if escapes:
        lowest, mask = np.uint8(group[f.LOWEST] & 255), np.uint8((1 << group[f.CODED_BITS]) - 1)
        for i in range(count):
            target[i] = np.uint8(target[i] + lowest) & mask
    if not alone:
        merge_part(part, group[f.CODED_SHIFT], count, low, high, wide)
    return True


@kernel
def dequantize(q, at, size, sign, step, out, base):  # type: ignore[no-untyped-def]
    """out[base : base + size] = q[at : at + size] as numbers times step.

    Codes are two's complement where sign is 2^(w-1), unsigned where it is 0.
    """
    source, target = _u(at), _u(base)
    for i in range(_u(size)):
        out[target + i] = np.float32((np.int32(q[source + i]) ^ sign) - sign) * step


@kernel
def unite(low, high, size, out):  # type: ignore[no-untyped-def]
    """out[:size] = the 16-bit codes of these bytes."""
    for i in range(_u(size)):
        out[i] = np.uint16(low[i]) | (np.uint16(high[i]) << np.uint16(8))


@kernel
def widen(q, at, size, sign, codes, base):  # type: ignore[no-untyped-def]
    """codes[base : base + size] = q[at : at + size] as int16; sign as in `dequantize`."""
    source, target = _u(at), _u(base)
    for i in range(_u(size)):
        codes[target + i] = np.int16((np.int32(q[source + i]) ^ sign) - sign)


@kernel
def scratch():  # type: ignore[no-untyped-def]
    """What `decode_chunks` works in: low and high bytes of codes, whole codes, a part, streams, the end of a source."""
    size = f.CHUNK + 64
    part, streams = np.zeros(size, np.uint8), np.zeros(f.CHUNK + 4 * f.PAD + 64, np.uint8)
    tail = np.zeros(2 * f.CHUNK + 2 * _REACH, np.uint8)
    return np.zeros(size, np.uint8), np.zeros(size, np.uint8), np.zeros(size, np.uint16), part, streams, tail


@kernel
def decode_range(source, offsets, lengths, steps, inner, channels, groups, tables, first, last, out, codes):  # type: ignore[no-untyped-def]
    """`decode_chunks` with memory of its own."""
    return decode_chunks(
        source, offsets, lengths, steps, inner, channels, groups, tables, first, last, out, codes, scratch()
    )


@kernel
def decode_chunks(source, offsets, lengths, steps, inner, channels, groups, tables, first, last, out, codes, room):  # type: ignore[no-untyped-def]
    """Decode and dequantize chunks `first` to `last` - 1.

    Args:
        source: uint8, the payload.
        offsets: (chunks + 1,) int64, where each chunk starts; validated: within source, and consistent with
            `lengths` and the fixed parts.
        lengths: (chunks, 5) uint16.
        steps, inner, channels, groups: as in `encode.encode_range`.
        tables: (G, 2^WINDOW) uint64, decoder tables.
        out: (B * C * inner,) float32, written; or empty.
        codes: (B * C * inner,) int16, written instead; or empty.
        room: from `scratch`, overwritten.

    Returns:
        -1, or the number of the chunk whose escapes do not fit.
    """
    low, high, whole, part, streams, tail = room
    total = steps.shape[1]
    g = 0
    for chunk in range(first, last):
        while g + 1 < groups.shape[0] and chunk >= groups[g + 1, f.FIRST_CHUNK]:
            g += 1
        group = groups[g]
        begin = (chunk - group[f.FIRST_CHUNK]) * f.CHUNK
        count = min(f.CHUNK, group[f.SYMBOLS] - begin)
        wide = group[f.WIDTH] > 8
        position, size = offsets[chunk], offsets[chunk + 1] - offsets[chunk]
        near_end = position + size + _REACH > source.size
        if near_end:
            tail[:size] = source[position : position + size]
            tail[size : size + _REACH] = 0
            position = 0
        data = tail if near_end else source
        if not decode_chunk(data, position, count, group, lengths[chunk], tables[g], part, streams, low, high):
            return chunk
        sign = np.int32(group[f.SIGN])
        if wide:
            unite(low, high, count, whole)
        row, offset = begin // inner, begin % inner
        filled = 0
        while filled < count:
            sample = row // group[f.CHANNELS]
            channel = channels[group[f.CHANNEL_OFFSET] + row % group[f.CHANNELS]]
            length = min(inner - offset, count - filled)
            base = (sample * total + channel) * inner + offset
            if codes.size > 0:
                if wide:
                    widen(whole, filled, length, sign, codes, base)
                else:
                    widen(low, filled, length, sign, codes, base)
            else:
                step = steps[sample if steps.shape[0] > 1 else 0, channel]
                if wide:
                    dequantize(whole, filled, length, sign, step, out, base)
                else:
                    dequantize(low, filled, length, sign, step, out, base)
            filled += length
            row += 1
            offset = 0
    return -1
