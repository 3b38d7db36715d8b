"""Runs only what a candidate can change: the prefix once per batch, then only the rest of the graph, many at a time.

What is guaranteed. The *exact* way runs the rest of the graph with the batches as they are: the same operations on the
same shapes as one full forward per candidate, so every score is that of the naive search bit for bit. The *stacked*
way (`stack`) runs rows (candidate, sample) of several candidates together, in channels-last memory format and, on the
CPU, with convolutions of its own (`fused`, `convolution`), which sums in another order (about 1e-7 of the outputs). So
at every layer the stacked way is first compared with the exact way on the unchanged layer, and the deviation found
decides what it may be trusted with:

- candidates with the same score whose cross-entropies lie closer than four times the mean deviation, and candidates
  with a sample whose two largest outputs lie closer than four times the largest deviation, are scored again exactly;
- if the deviation exceeds 1e-5 of the largest output (samples depend on each other), if a quantizer that is switched
  on is called again further on (it may round the other way), or if the graph cannot be stacked, everything of that
  layer is scored exactly; before that, slower ways to stack that deviate less are tried.

The order of the channels and their accuracies are then those of the naive search; cross-entropies of channels that
were not scored again differ in the last digits. Samples in which the channel left out was exact anyway (a channel of
zeros) need no run at all. A metric of the user's may jump anywhere, so it is always evaluated exactly.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.fx import GraphModule

from .evaluate import Batches, Means, Scorer, SiteScores, batch_size, site_scores
from .fused import Chains
from .graph import Graph, tensor_bytes
from .inplace import overwrite
from .stack import COMPARED, SAFETY, Cut, Deviation, NotStackable, Stack, Way, exact_output
from .stage import Stage

logger = logging.getLogger(__name__)


class SuffixEvaluator:
    """Scores the candidates of one layer after the other, in order of execution.

    Args:
        stage: whose model is a GraphModule.
        batches: (inputs, targets).
        scorer: what outputs are worth.
        stacking: False: only the exact way.
        memory: bytes for cached prefixes and for one stacked pass, half each.
        rows: most samples in one stacked pass; None: what runs fastest.
    """

    def __init__(
        self, stage: Stage, batches: Batches, scorer: Scorer, *, stacking: bool, memory: int, rows: int | None
    ) -> None:
        if not isinstance(stage.model, GraphModule):
            raise TypeError("the stage holds no graph")
        self.stage, self.batches, self.scorer = stage, batches, scorer
        self.memory, self.rows = memory, rows
        self.graph = Graph(stage.model)
        self.calls = [self.graph.calls(seam.quantizer) for seam in stage.seams]
        self._cached: dict[int, Cut] = {}
        self._uncached: set[int] = set()
        # ways to stack, best first; one that fails is not tried again
        self._ways = _ways(stage, self.graph) if stacking and scorer.metric is None else []
        self._compared: Way | None = None

    def usable(self) -> bool:
        """Whether every quantizer is called by the graph, in the order of the search."""
        firsts = [calls[0] for calls in self.calls if calls]
        return len(firsts) == len(self.calls) and all(a < b for a, b in itertools.pairwise(firsts))

    def scores(self, index: int, channels: int, advance: Callable[[int], None]) -> SiteScores:
        """Scores of all C channels of a layer."""
        name = self.stage.seams[index].name
        for way in [] if self._rounds_again(index) else list(self._ways):
            try:
                found = self._stacked(index, channels, way)
            except (NotStackable, RuntimeError, ValueError, TypeError, IndexError) as error:
                self._ways.remove(way)
                logger.info("%s: %s does not work here (%s: %s)", name, way.name, type(error).__name__, error)
                continue
            if found is not None:
                advance(channels)
                return found
        logger.info("%s: scoring exactly", name)
        exact = self.evaluate(index, list(range(channels)), advance)
        return site_scores([exact[c] for c in range(channels)])

    def _rounds_again(self, index: int) -> bool:
        """Whether a quantizer that is switched on is called again behind the searched layer.

        Rounding turns a deviation of 1e-7 into a step, in few samples: comparing could miss it.
        """
        position = self.calls[index][0]
        return any(call > position for calls in self.calls[: index + 1] for call in calls)

    # ------------------------------------------------------------ prefixes

    def _cuts(self, index: int) -> Iterator[Cut]:
        """Each batch up to the searched layer: from the cache, or run again from the inputs."""
        self.stage.float_from(index)
        position = self.calls[index][0]
        for number, (inputs, targets) in enumerate(self.batches):
            cut = self._cached.get(number)
            if cut is None:
                values = self.graph.start(inputs)
                size = batch_size(*(values[i] for i in sorted(values))) or 0
                cut = Cut(values, 0, targets, size)
            self.graph.run(cut.values, cut.position, position)
            cut.position = position
            used = sum(tensor_bytes(c.values) for n, c in self._cached.items() if n != number)
            if number not in self._uncached and used + tensor_bytes(cut.values) <= self.memory // 2:
                self._cached[number] = cut
            else:
                self._cached.pop(number, None)
                self._uncached.add(number)
            yield cut

    # ------------------------------------------------------------ exact

    def evaluate(self, index: int, channels: list[int], advance: Callable[[int], None]) -> dict[int, Means]:
        """Score candidates exactly; arguments and result as in `FullForward.evaluate`."""
        seam = self.stage.seams[index]
        found = {channel: Means() for channel in channels}
        for number, cut in enumerate(self._cuts(index)):
            for channel in channels:
                outputs = exact_output(self.graph, cut, seam, channel)
                found[channel].add(*self.scorer(outputs, cut.targets, f"{seam.name!r}, channel {channel}"))
                if number == len(self.batches) - 1:
                    advance(1)
        return found

    # ------------------------------------------------------------ stacked

    def _stacked(self, index: int, channels: int, way: Way) -> SiteScores | None:
        """Scores by stacked passes, settled by exact ones; None where they cannot be trusted."""
        base = Way(self.stage, self.graph, False)
        means = [Means() for _ in range(channels)]
        doubtful = torch.zeros(channels, dtype=torch.bool)
        unchanged = torch.ones(channels, dtype=torch.bool)
        deviation: Deviation | None = None
        for cut in self._cuts(index):
            way.stage.follow(self.stage)
            stack = Stack(base, way, cut, index, self.scorer)
            if deviation is None:
                # every sample where the most operations follow, then a few
                deviation = stack.deviation(COMPARED if way is self._compared else cut.size)
                if deviation is None:
                    return None
                self._compared = way
                step = stack.rows_per_pass(self.rows, self.memory // 2)
            found = stack.run(channels, step, deviation)
            for channel, mean in enumerate(means):
                mean.add(found.scores[channel], found.losses[channel])
            doubtful |= found.doubtful
            unchanged &= ~stack.changes.any(0)
        result = site_scores(means)
        if deviation is not None:
            self._settle(index, result, doubtful, unchanged.nonzero().flatten().tolist(), deviation)
        return result

    def _settle(
        self, index: int, result: SiteScores, doubtful: Tensor, unchanged: list[int], deviation: Deviation
    ) -> None:
        """Score candidates again, exactly, until no order rests on less than the deviation. Changes `result`."""
        losses = result.losses
        if losses is None:
            return
        twin = dict.fromkeys(unchanged, min(unchanged, default=-1))  # these change nothing: one candidate
        pending = set(doubtful.nonzero().flatten().tolist())
        settled: set[int] = set()
        while True:
            for a, b in itertools.pairwise(result.order(strict=False)):
                close = abs(losses[a] - losses[b]) <= SAFETY * deviation.loss
                if result.scores[a] == result.scores[b] and close and twin.get(a, a) != twin.get(b, b):
                    pending |= {a, b}
            pending = {c for p in pending for c in (unchanged if p in twin else (p,))} - settled
            if not pending:
                return
            exact = self.evaluate(index, sorted({twin.get(c, c) for c in pending}), lambda _: None)
            for channel in pending:
                mean = exact[twin.get(channel, channel)]
                result.scores[channel] = mean.score
                losses[channel] = losses[channel] if mean.loss is None else mean.loss
            settled |= pending
            pending = set()


def _ways(stage: Stage, graph: Graph) -> list[Way]:
    """How candidates may be stacked, fastest first: where there are images channels-last, with convolutions fused."""
    plain = Way(stage, graph, False)
    if not any(t.ndim == 4 for t in itertools.chain(stage.model.parameters(), stage.model.buffers())):
        return [plain]
    try:
        twin = stage.copy()
    except RuntimeError as error:  # 5-d parameters have another channels-last format
        logger.info("no channels-last copy of the model: %s", error)
        return [plain]
    fast = Graph(twin.model)  # type: ignore[arg-type]
    passing = overwrite(fast, twin.seams)
    chains = [Chains(fast, passing), Chains(fast, passing, wanted=False)]
    return [*(Way(twin, fast, True, c) for c in chains if c or not c.wanted), plain]
