"""Stored activations: tensors that must outlive other layers, held as packed bytes instead of floats.

packed = pack(x, quantizer, coding="joint")      # bytes, with all side information counted
packed.unpack()                                  # exactly what the quantizer would have returned
"""

from .allocation import allocate_bits
from .books import calibrate_tables
from .bound import storage_bound
from .codebook import Codebook
from .engine import get_threads, set_threads
from .errors import (
    CorruptFrame,
    NothingToStore,
    NotPackable,
    StorageError,
    TraceFailed,
    UnknownCoding,
    UnsupportedFrame,
)
from .packed import PackedActivation, pack
from .pipeline import convert_stored, prepare_stored, stored_edges
from .report import StorageReport, storage_report

__all__ = [
    "Codebook",
    "CorruptFrame",
    "NotPackable",
    "NothingToStore",
    "PackedActivation",
    "StorageError",
    "StorageReport",
    "TraceFailed",
    "UnknownCoding",
    "UnsupportedFrame",
    "allocate_bits",
    "calibrate_tables",
    "convert_stored",
    "get_threads",
    "pack",
    "prepare_stored",
    "set_threads",
    "storage_bound",
    "storage_report",
    "stored_edges",
]
