"""Typed errors of ranking: each names the layer, the value and the way out."""

from __future__ import annotations

from ..errors import DQAError


class RankingError(DQAError, ValueError):
    """An argument of `rank_channels` cannot be used: unknown strategy, no batches, nothing to rank, ..."""


class MetricError(RankingError):
    """A metric did not return one finite score per sample, or none is defined for these outputs and targets."""


class CheckpointMismatch(RankingError):
    """A checkpoint file belongs to another model, other data or other settings."""


class RankTableError(DQAError, ValueError):
    """A rank table is not what it claims to be: damaged file, unknown schema version, order is no permutation."""


class RankTableMismatch(RankTableError):
    """A rank table belongs to another model: names or numbers of channels differ."""
