"""Columns of the integer arrays that tell the kernels how a tensor is laid out (one row per group of channels)."""

from __future__ import annotations

CHUNK = 4096  # symbols of a full chunk
PAD = 32  # bytes behind each quarter that a multi-symbol look-up may overwrite
WINDOW = 12  # bits of a decoder look-up, and the longest code of a unit
RAW = 0xFFFF  # in place of the first stream length: the chunk is stored with fixed width
SLOT = 1024 * WINDOW // 8 + 32  # bytes that one stream can need, and room for wide stores
SLACK = 16384  # room behind the output for a chunk before it is known to be larger than its fixed-width form

CHANNELS = 0  # number of channels of the group
CHANNEL_OFFSET = 1  # where its channel numbers start in the channel list
WIDTH = 2  # w, bits of a whole code q
SIGN = 3  # 2^(w-1) for signed codes, else 0
PACKED_SHIFT, PACKED_BITS = 4, 5  # packed part beside a coded one: (q >> shift) & (2^bits - 1); bits 0: none
CODED_SHIFT, CODED_BITS = 6, 7  # entropy coded part; bits 0: none, the whole code is packed
LOWEST = 8  # symbol 0 stands for this value of the coded part
ESCAPE = 9  # symbol that says "the value follows in the escapes"; 256: there is none
SYMBOL_BITS = 10  # b, bits of a symbol in an encoder index
WORD = 11  # g, symbols of an encoder index
FLUSH = 12  # look-ups between two writes, 2 or 4
FIRST_CHUNK = 13  # number of the group's first chunk
SYMBOLS = 14  # symbols of the group in this tensor
FIELDS = 15
