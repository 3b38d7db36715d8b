"""Decode many tensors of one shape, packed behind each other, into the layout that attention reads.

Requirements this file meets:

- A block holds one channel's values side by side, because they share a step and a table; attention wants one token's.
  Turning a block while it is in the cache of a core costs a third of decoding it, a pass of its own over the result
  would cost as much again.
- One call for many blocks: calling the decoder costs more than a small block does.
"""

from __future__ import annotations

import numpy as np

from .compiling import kernel
from .decode import decode_range


@kernel
def rotate(a, b, cosines, sines):  # type: ignore[no-untyped-def]
    """(a, b) = (a cos - b sin, a sin + b cos), in place."""
    for t in range(a.size):
        x, y = a[t], b[t]
        a[t] = x * cosines[t] - y * sines[t]
        b[t] = x * sines[t] + y * cosines[t]


@kernel
def decode_blocks(  # type: ignore[no-untyped-def]
    source, offsets, lengths, steps, centers, cosines, sines, turn, inner, channels, groups, tables, first, out, at
):
    """Decode, dequantize, add the centre of each channel, rotate, and turn blocks of (C, inner) to (inner, C).

    Args:
        source: uint8, the chunks of all blocks.
        offsets: (blocks, chunks + 1) int64, where each chunk starts; validated, as in `decode.decode_range`.
        lengths: (blocks, chunks, 5) uint16.
        steps: (1, C) float32. centers: (C,) float32.
        cosines, sines: (n, tokens) float32: components d and d + n of each head are turned by these angles.
        turn: column of the first token.
        inner, channels, groups, tables: as in `decode.decode_range`, of one block.
        first: block to begin with.
        out: (H, T, D) float32 with H * D = C, written.
        at: the token of `out` where block `first` starts.

    Returns:
        -1, or the number of the block whose escapes do not fit.
    """
    heads, width, pairs = out.shape[0], out.shape[2], cosines.shape[0]
    turned = np.empty(heads * width * inner, np.float32)
    codes = np.empty(0, np.int16)
    for block in range(first, offsets.shape[0]):
        chunks = lengths.shape[1]
        if (
            decode_range(
                source, offsets[block], lengths[block], steps, inner, channels, groups, tables, 0, chunks, turned, codes
            )
            >= 0
        ):
            return block
        begin = (block - first) * inner
        start, angle = at + begin, turn + begin
        for channel in range(heads * width):
            turned[channel * inner : (channel + 1) * inner] += centers[channel]
        for head in range(heads):
            base = head * width * inner
            for d in range(pairs):
                a = turned[base + d * inner : base + (d + 1) * inner]
                b = turned[base + (d + pairs) * inner : base + (d + pairs + 1) * inner]
                rotate(a, b, cosines[d, angle : angle + inner], sines[d, angle : angle + inner])
            for t in range(inner):
                for d in range(width):
                    out[head, start + t, d] = turned[base + d * inner + t]
    return -1
