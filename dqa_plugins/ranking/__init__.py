"""Which channels matter: rankings of the channels of each layer, and the table that holds them."""

from .api import STRATEGIES, rank_channels
from .errors import CheckpointMismatch, MetricError, RankingError, RankTableError, RankTableMismatch
from .table import LayerRanks, RankTable

__all__ = [
    "STRATEGIES",
    "CheckpointMismatch",
    "LayerRanks",
    "MetricError",
    "RankTable",
    "RankTableError",
    "RankTableMismatch",
    "RankingError",
    "rank_channels",
]
