"""Every limit of the format, version 1 (docs/storage_format.md, "Limits"), and the dtypes that it knows."""

from __future__ import annotations

import torch

from ...kernels.fields import CHUNK, RAW, WINDOW

__all__ = [
    "CHUNK",
    "DTYPES",
    "LENGTHS_PER_CHUNK",
    "LONGEST_CODE",
    "MAX_BITS",
    "MAX_CODE",
    "MAX_DIMENSIONS",
    "MAX_GAP_BYTES",
    "MAX_GROUPS",
    "MAX_PRODUCT",
    "MAX_SYMBOLS_PER_BYTE",
    "MIN_BITS",
    "RAW",
    "VERSION",
]

VERSION = 1
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # by number in the header
MAX_DIMENSIONS = 16
MAX_PRODUCT = 2**59  # of all sizes, zeros counted as 1: torch counts bytes in 63 bits
MAX_SYMBOLS_PER_BYTE = 32  # a word of four symbols takes at least one bit
MIN_BITS, MAX_BITS = 2, 8  # n; a whole code has n + m bits with 1 - n <= m <= n
MAX_GROUPS = 255
MAX_CODE = 2**20  # of an explicit grid: float32 holds it and its neighbours exactly
LONGEST_CODE = WINDOW  # bits
MAX_GAP_BYTES = 5  # of the gap between two outliers, 7 bits each
LENGTHS_PER_CHUNK = 5  # four streams and the escapes, uint16 each
