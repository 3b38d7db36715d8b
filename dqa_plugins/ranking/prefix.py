"""Runs only what a candidate can change: the prefix once per batch, then only the rest of the graph, many at a time.

What is guaranteed. A *single* pass runs the rest of the graph with a batch as it is: the same operations on the same
shapes as one full forward per candidate, so every score is that of the naive search bit for bit. A *stacked* pass
(`stacking`) runs rows (candidate, sample) of several candidates together: another batch size may sum in another order
(about 1e-7 of the outputs). So at every layer stacked passes are first compared with a single one on the unchanged
layer, and the deviation found decides what they may be trusted with:

- candidates with the same score whose cross-entropies lie closer than four times the mean deviation, and candidates
  with a sample whose two largest outputs lie closer than four times the largest deviation, are scored again one by one;
- if the deviation exceeds 1e-5 of the largest output (samples depend on each other), if a quantizer that is switched
  on is called again further on (it may round the other way), or if the graph cannot be stacked, all candidates of that
  layer are scored one by one.

The order of the channels and their accuracies are then those of the naive search; cross-entropies of channels that
were not scored again may differ in the last digits. Samples in which the channel left out was exact anyway (a channel
of zeros) need no run at all. A metric of the user's may jump anywhere, so it always gets single passes.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import GraphModule

from ..processes import Processes
from ..sharing import shared
from .replay import NotStackable, Replay, tensor_bytes
from .scoring import Batches, Means, Scorer, SiteScores, batch_size, site_scores
from .search_model import SearchModel
from .stacking import COMPARED, SAFETY, Deviation, Prefix, Stack, single_output

logger = logging.getLogger(__name__)


class PrefixEvaluator:
    """Scores the candidates of one layer after the other, in order of execution.

    Args:
        search: whose model is a GraphModule.
        batches: (inputs, targets).
        scorer: what outputs are worth.
        memory: bytes for cached prefixes and for one stacked pass, half each.
        ranks: share the candidates; stacked passes as they are, so that each gives what it gives in one process.
    """

    def __init__(self, search: SearchModel, batches: Batches, scorer: Scorer, memory: int, ranks: Processes) -> None:
        if not isinstance(search.model, GraphModule):
            raise TypeError("the model to search is no graph")
        self.search, self.batches, self.scorer, self.memory, self.ranks = search, batches, scorer, memory, ranks
        self.replay = Replay(search.model)
        self.calls = [self.replay.calls(site.quantizer) for site in search.sites]
        self._cached: dict[int, Prefix] = {}
        self._uncached: set[int] = set()
        self._stackable = scorer.metric is None
        self._compared = False

    def usable(self) -> bool:
        """Whether every quantizer is called by the graph, in the order of the search, with what it reads as inputs."""
        for site, calls in zip(self.search.sites, self.calls, strict=True):
            if site.reads_session and any(len(self.replay.nodes[call].args) < 2 for call in calls):
                return False  # QPP without edges needs a forward of the whole model
        firsts = [calls[0] for calls in self.calls if calls]
        return len(firsts) == len(self.calls) and all(a < b for a, b in itertools.pairwise(firsts))

    def scores(self, index: int, channels: int, advance: Callable[[int], None]) -> SiteScores:
        """Scores of all C channels of a layer."""
        name = self.search.sites[index].name
        if self._stackable and not self._rounds_again(index):
            try:
                found = self._stacked(index, channels)
            except (NotStackable, RuntimeError, ValueError, TypeError, IndexError) as error:
                self._stackable = False
                logger.info("%s: candidates cannot be stacked (%s: %s)", name, type(error).__name__, error)
            else:
                if found is not None:
                    advance(channels)
                    return found
        logger.info("%s: scoring candidates one by one", name)
        single = self.evaluate(index, list(range(channels)), advance)
        return site_scores([single[c] for c in range(channels)])

    def _rounds_again(self, index: int) -> bool:
        """Whether a quantizer that is switched on is called again behind the searched layer.

        Rounding turns a deviation of 1e-7 into a step, in few samples: comparing could miss it.
        """
        position = self.calls[index][0]
        return any(call > position for calls in self.calls[: index + 1] for call in calls)

    def _prefixes(self, index: int) -> Iterator[Prefix]:
        """Each batch up to the searched layer: from the cache, or run again from the inputs."""
        self.search.quantize_before(index)
        position = self.calls[index][0]
        for number, (inputs, targets) in enumerate(self.batches):
            prefix = self._cached.get(number)
            if prefix is None:
                values = self.replay.start(inputs)
                size = batch_size(*(values[i] for i in sorted(values))) or 0
                prefix = Prefix(values, 0, targets, size)
            self.replay.run(prefix.values, prefix.position, position)
            prefix.position = position
            used = sum(tensor_bytes(p.values) for n, p in self._cached.items() if n != number)
            if number not in self._uncached and used + tensor_bytes(prefix.values) <= self.memory // 2:
                self._cached[number] = prefix
            else:
                self._cached.pop(number, None)
                self._uncached.add(number)
            yield prefix

    def evaluate(self, index: int, channels: list[int], advance: Callable[[int], None]) -> dict[int, Means]:
        """Score candidates one by one.

        Args:
            index: of the searched site.
            channels: the candidates.
            advance: told how many candidates are done.

        Returns:
            {channel: means over the batches}.
        """
        site = self.search.sites[index]
        mine = [channels[position] for position in self.ranks.mine(len(channels))]

        def measure() -> list[Any]:
            found = [Means() for _ in mine]
            for number, prefix in enumerate(self._prefixes(index)):
                for channel, means in zip(mine, found, strict=True):
                    outputs = single_output(self.replay, prefix, site, channel)
                    means.add(*self.scorer(outputs, prefix.targets, f"{site.name!r}, channel {channel}"))
                    if number == len(self.batches) - 1:
                        advance(1)
            return [means.to_list() for means in found]

        parts = shared(self.ranks, measure, f"ranking {site.name!r}")
        advance(len(channels) - len(mine))
        size = self.ranks.size
        return {channel: Means.from_list(parts[i % size][i // size]) for i, channel in enumerate(channels)}

    def _stacked(self, index: int, channels: int) -> SiteScores | None:
        """Scores by stacked passes, settled by single ones; None where stacked ones cannot be trusted."""
        means = [Means() for _ in range(channels)]
        doubtful = torch.zeros(channels, dtype=torch.bool)
        unchanged = torch.ones(channels, dtype=torch.bool)
        deviation: Deviation | None = None
        for prefix in self._prefixes(index):
            stack = Stack(self.replay, prefix, self.search.sites[index], self.scorer, self.ranks)
            if deviation is None:
                # every sample where the most operations follow, then a few
                deviation = self._deviation(stack, COMPARED if self._compared else prefix.size)
                if deviation is None:
                    return None
                self._compared = True
                step = stack.rows_per_pass(self.memory // 2)
            found = stack.run(channels, step, deviation)
            for channel, mean in enumerate(means):
                mean.add(found.scores[channel], found.losses[channel])
            doubtful |= found.doubtful
            unchanged &= ~stack.changes.any(0)
        result = site_scores(means)
        if deviation is not None:
            self._settle(index, result, doubtful, unchanged.nonzero().flatten().tolist(), deviation)
        return result

    def _deviation(self, stack: Stack, samples: int) -> Deviation | None:
        """Of stacked passes, as rank 0 finds it: what follows depends on it, and must be the same on all ranks."""

        def measure() -> list[float] | None:
            found = stack.deviation(samples)
            return None if found is None else [found.output, found.loss]

        told = shared(self.ranks, measure, f"comparing {stack.site.name!r}")[0]
        return None if told is None else Deviation(*told)

    def _settle(
        self, index: int, result: SiteScores, doubtful: torch.Tensor, unchanged: list[int], deviation: Deviation
    ) -> None:
        """Score candidates again, one by one, until no order rests on less than the deviation. Changes `result`."""
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
            single = self.evaluate(index, sorted({twin.get(c, c) for c in pending}), lambda _: None)
            for channel in pending:
                mean = single[twin.get(channel, channel)]
                result.scores[channel] = mean.score
                losses[channel] = losses[channel] if mean.loss is None else mean.loss
            settled |= pending
            pending = set()
