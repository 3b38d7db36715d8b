"""Errors of packed storage; each derives from `DQAError` and from the built-in that a caller would guess."""

from __future__ import annotations

from ...errors import DQAError


class StorageError(DQAError):
    """Base class of the errors of `dqa_plugins.storage`."""


class NotPackable(StorageError, ValueError):
    """The tensor or the quantizer cannot be packed: not frozen, not floating point, NaN or Inf in the data."""


class CorruptFrame(StorageError, ValueError):
    """Packed bytes are truncated, damaged or inconsistent."""


class UnsupportedFrame(StorageError, ValueError):
    """Packed bytes of a format version, or with a feature, that this version does not know."""


class TraceFailed(StorageError, RuntimeError):
    """torch.fx cannot trace the model, so that its long-lived edges cannot be found."""


class NothingToStore(StorageError, ValueError):
    """The model has no edge that lives long enough to be stored."""
