"""Greedy search, algorithm 3 of the DQA paper.

Layers are searched in order of execution. In a layer each channel in turn is left unquantized, the others are Direct
at n bits; earlier layers are quantized with their single best channel left out, later ones are float. The channels are
then sorted by the metric; ties, frequent with accuracy, go to the lower cross-entropy and then to the lower index
(`strict`: to the lower index at once, which is what keeping the first highest accuracy, lines 13 to 15, comes to).
"""

from __future__ import annotations

import logging

from torch.fx import GraphModule

from .checkpoint import Checkpoint
from .evaluate import Batches, FullForward, Scorer
from .progress import Progress
from .stage import Stage
from .suffix import SuffixEvaluator
from .table import LayerRanks

logger = logging.getLogger(__name__)


def greedy(
    stage: Stage,
    batches: Batches,
    scorer: Scorer,
    checkpoint: Checkpoint,
    progress: Progress,
    *,
    strict: bool,
    exact: bool,
    memory: int,
    rows: int | None,
) -> None:
    """Rank every layer that the checkpoint lacks, and add it there.

    Args:
        stage: a frozen copy of the model.
        batches: (inputs, targets).
        scorer: the metric.
        strict: ties go to the lower index at once.
        exact: only operations with the very shapes of a full forward pass (see `suffix`).
        memory: bytes for cached prefixes and stacked passes.
        rows: most samples in one stacked pass, or None.
    """
    evaluator = _evaluator(stage, batches, scorer, exact=exact, memory=memory, rows=rows)
    for index, seam in enumerate(stage.seams):
        if not seam.rankable:
            continue
        if seam.name not in checkpoint.done:
            progress.layer(seam.name)
            channels = seam.quantizer.num_channels or 0
            found = evaluator.scores(index, channels, progress.advance)
            losses = None if found.losses is None else tuple(found.losses)
            checkpoint.add(LayerRanks(seam.name, found.order(strict), tuple(found.scores), losses))
        order = checkpoint.done[seam.name].order
        seam.left_out = order[0] if order else None


def _evaluator(
    stage: Stage, batches: Batches, scorer: Scorer, *, exact: bool, memory: int, rows: int | None
) -> FullForward | SuffixEvaluator:
    if isinstance(stage.model, GraphModule):
        suffix = SuffixEvaluator(stage, batches, scorer, stacking=not exact, memory=memory, rows=rows)
        keywords = any(isinstance(inputs, dict) for inputs, _ in batches)
        if suffix.usable() and not (keywords and suffix.graph.flattened):
            return suffix
    logger.info("%s is no graph that can be cut: one full forward pass per channel", type(stage.model).__name__)
    return FullForward(stage, batches, scorer)
