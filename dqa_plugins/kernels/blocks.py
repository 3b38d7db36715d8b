"""Decode many tensors of one shape, packed behind each other, into the layout that attention reads.

Requirements this file meets:

- A block holds one channel's values side by side, because they share a step and a table; attention wants one token's.
  Codes are turned, 16 bits each and a head at a time, so that what is turned lies in the first-level cache; steps,
  centres and rotation are then applied to the components of a token, side by side.
- One call for many blocks: calling the decoder costs more than a small block does.
"""

from __future__ import annotations

import numpy as np

from .compiling import kernel
from .decode import decode_chunks, scratch
from .memory import load64, store64

_u = np.uint64


@kernel
def turn_tiles(codes, first, width, inner, out):  # type: ignore[no-untyped-def]
    """out (inner, width) = the transpose of codes (width, inner), 4 x 4 of them in four 64-bit words at a time.

    Args:
        codes: uint8 view of int16, in which the matrix starts at byte `first`.
        width, inner: multiples of 4.
        out: uint8 view of (inner, width) int16.
    """
    low, odd = _u(0x0000FFFF0000FFFF), _u(0xFFFF0000FFFF0000)
    bottom, top = _u(0x00000000FFFFFFFF), _u(0xFFFFFFFF00000000)
    for d in range(0, width, 4):
        for t in range(0, inner, 4):
            at = first + 2 * (d * inner + t)
            a, b = load64(codes, at), load64(codes, at + 2 * inner)
            c, e = load64(codes, at + 4 * inner), load64(codes, at + 6 * inner)
            ab, ba = (a & low) | ((b & low) << _u(16)), ((a & odd) >> _u(16)) | (b & odd)
            ce, ec = (c & low) | ((e & low) << _u(16)), ((c & odd) >> _u(16)) | (e & odd)
            to = 2 * (t * width + d)
            store64(out, to, (ab & bottom) | (ce << _u(32)))
            store64(out, to + 2 * width, (ba & bottom) | (ec << _u(32)))
            store64(out, to + 4 * width, (ab >> _u(32)) | (ce & top))
            store64(out, to + 6 * width, (ba >> _u(32)) | (ec & top))


@kernel
def dequantize_head(codes, steps, centers, base, cosines, sines, begin, out, head, at, inner):  # type: ignore[no-untyped-def]
    """out[head, at + t] = codes (inner, D) * step + centre, components d and d + n turned by angle `begin` + t.

    Args:
        base: the head's first channel.
    """
    first, pairs, width = _u(base), _u(cosines.shape[1]), _u(out.shape[2])
    for t in range(inner):
        row, cosine, sine, k = out[head, at + t], cosines[begin + t], sines[begin + t], _u(t) * width
        for d in range(pairs):
            e = d + pairs
            x = np.float32(codes[k + d]) * steps[first + d] + centers[first + d]
            y = np.float32(codes[k + e]) * steps[first + e] + centers[first + e]
            row[d] = x * cosine[d] - y * sine[d]
            row[e] = x * sine[d] + y * cosine[d]
        for d in range(pairs + pairs, width):
            row[d] = np.float32(codes[k + d]) * steps[first + d] + centers[first + d]


@kernel
def decode_blocks(  # type: ignore[no-untyped-def]
    source, sizes, lengths, steps, centers, cosines, sines, inner, channels, groups, tables, first, out, at
):
    """Decode, turn blocks of (C, inner) to (inner, C), dequantize, add the centre of each channel, and rotate.

    Args:
        source: uint8, the chunks of all blocks.
        sizes: (blocks, chunks) int32, bytes of each chunk; validated, as the offsets of `decode.decode_chunks`.
        lengths: (blocks, chunks, 5) uint16.
        steps: (1, C) float32. centers: (C,) float32.
        cosines, sines: (tokens, n) float32: components d and d + n of each head are turned by these angles.
        inner, channels, groups, tables: as in `decode.decode_chunks`, of one block.
        first: block to begin with.
        out: (H, T, D) float32 with H * D = C, written.
        at: the token of `out` where block `first` starts.

    Returns:
        -1, or the number of the block whose escapes do not fit.
    """
    heads, width = out.shape[0], out.shape[2]
    codes, turned = np.empty(heads * width * inner, np.int16), np.empty(width * inner, np.int16)
    raw, raw_turned = codes.view(np.uint8), turned.view(np.uint8)
    floats, chunks, step, room = np.empty(0, np.float32), lengths.shape[1], steps[0], scratch()
    offsets = np.zeros(chunks + 1, np.int64)
    tiled = inner % 4 == 0 and width % 4 == 0
    for block in range(sizes.shape[0]):
        offsets[0] = offsets[chunks]
        for k in range(chunks):
            offsets[k + 1] = offsets[k] + sizes[block, k]
        if block < first:
            continue
        bad = decode_chunks(
            source, offsets, lengths[block], steps, inner, channels, groups, tables, 0, chunks, floats, codes, room
        )
        if bad >= 0:
            return block
        begin = (block - first) * inner
        for head in range(heads):
            base = head * width
            if tiled:
                turn_tiles(raw, 2 * base * inner, width, inner, raw_turned)
            else:
                for d in range(width):
                    for t in range(inner):
                        turned[t * width + d] = codes[(base + d) * inner + t]
            dequantize_head(turned, step, centers, base, cosines, sines, begin, out, head, at + begin, inner)
    return -1
