"""Stored activations: tensors that must outlive other layers, held as packed bytes instead of floats.

packed = pack(x, quantizer, coding="joint")      # bytes, with all side information counted
packed.unpack()                                  # exactly what the quantizer would have returned

`format` holds the bytes, `coder` the entropy coder, `model` what changes a network so that it stores packed values.
"""

from .allocation import allocate_bits
from .bound import storage_bound
from .coder.engine import get_threads, set_threads
from .format.codebook import Codebook
from .format.errors import (
    CorruptFrame,
    NothingToStore,
    NotPackable,
    StorageError,
    TraceFailed,
    UnsupportedFrame,
)
from .model.convert import convert_stored, prepare_stored, stored_edges
from .packed import PackedActivation
from .packing import pack
from .report import StorageReport, storage_report
from .tables import calibrate_tables

__all__ = [
    "Codebook",
    "CorruptFrame",
    "NotPackable",
    "NothingToStore",
    "PackedActivation",
    "StorageError",
    "StorageReport",
    "TraceFailed",
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
