"""Greedy search, algorithm 3 of the DQA paper.

Layers are searched in order of execution. In a layer each channel in turn is left unquantized, the others are Direct
at n bits; earlier layers are quantized with their single best channel left out, later ones are float. The channels are
then sorted by the metric; ties, frequent with accuracy, go to the lower cross-entropy and then to the lower index
(`strict`: to the lower index at once, which is what keeping the first highest accuracy, lines 13 to 15, comes to).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule

from ..processes import Processes
from ..progress import Progress
from ..sharing import shared
from .checkpoint import Checkpoint
from .prefix import PrefixEvaluator
from .scoring import Batches, Means, Scorer, SiteScores, forward, site_scores
from .search_model import SearchModel
from .table import LayerRanks

logger = logging.getLogger(__name__)


def greedy(
    search: SearchModel,
    batches: Batches,
    scorer: Scorer,
    checkpoint: Checkpoint,
    progress: Progress,
    ranks: Processes,
    *,
    strict: bool,
    memory: int,
) -> None:
    """Rank every layer that the checkpoint lacks, and add it there.

    Args:
        search: a frozen copy of the model.
        batches: (inputs, targets).
        scorer: the metric.
        ranks: share the candidates.
        strict: ties go to the lower index at once.
        memory: bytes for cached prefixes and stacked passes.
    """
    evaluator = _evaluator(search, batches, scorer, memory, ranks)
    for index, site in enumerate(search.sites):
        if not site.rankable:
            continue
        if site.name not in checkpoint.done:
            progress.at(site.name)
            found = evaluator.scores(index, site.channels, progress.advance)
            losses = None if found.losses is None else tuple(found.losses)
            checkpoint.add(LayerRanks(site.name, found.order(strict), tuple(found.scores), losses))
        order = checkpoint.done[site.name].order
        site.left_out = order[0] if order else None


class FullForward:
    """One forward pass of the whole model per candidate and batch: for models that are no graphs.

    Args:
        search: the copy to run.
        batches: (inputs, targets).
        scorer: what outputs are worth.
        ranks: share the candidates.
    """

    def __init__(self, search: SearchModel, batches: Batches, scorer: Scorer, ranks: Processes) -> None:
        self.search, self.batches, self.scorer, self.ranks = search, batches, scorer, ranks

    def scores(self, index: int, channels: int, advance: Callable[[int], None]) -> SiteScores:
        """Scores of all C channels of a layer.

        Args:
            index: of the searched site.
            channels: C.
            advance: told how many candidates are done.
        """
        site = self.search.sites[index]
        self.search.quantize_before(index)
        site.active = True

        def measure() -> list[Any]:
            found = []
            for site.left_out in self.ranks.mine(channels):
                means = Means()
                for inputs, targets in self.batches:
                    outputs = forward(self.search.model, inputs)
                    means.add(*self.scorer(outputs, targets, f"{site.name!r}, channel {site.left_out}"))
                found.append(means.to_list())
                advance(1)
            return found

        parts = shared(self.ranks, measure, f"ranking {site.name!r}")
        advance(channels - len(parts[self.ranks.rank]))
        return site_scores([Means.from_list(parts[c % self.ranks.size][c // self.ranks.size]) for c in range(channels)])


def _evaluator(
    search: SearchModel, batches: Batches, scorer: Scorer, memory: int, ranks: Processes
) -> FullForward | PrefixEvaluator:
    if isinstance(search.model, GraphModule):
        prefix = PrefixEvaluator(search, batches, scorer, memory, ranks)
        keywords = any(isinstance(inputs, dict) for inputs, _ in batches)
        if prefix.usable() and not (keywords and prefix.replay.flattened):
            return prefix
    logger.info("%s is no graph that can be cut: one full forward pass per channel", type(search.model).__name__)
    return FullForward(search, batches, scorer, ranks)
