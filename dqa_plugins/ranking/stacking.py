"""Several candidates in one pass: their samples stacked along the batch, at one layer, for one batch of data."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..processes import Processes
from ..sharing import shared_tensors
from .replay import NotStackable, Replay, Values, map_tensors, tensor_bytes
from .scoring import Scorer
from .search_model import SearchSite

logger = logging.getLogger(__name__)

TRUSTED = 1e-5  # largest deviation of stacked passes, relative to the largest output
SAFETY = 4.0  # what is decided must be clear by so many deviations
TEMPORARIES = 3  # bytes per row: the values kept, and what operations need besides
COMPARED = 32  # samples on which stacked and single passes are compared
WORKING_SET = 16 * 2**20  # bytes of a pass that still run fast (measured: ResNet-32, 16 to 64 channels)


@dataclass
class Prefix:
    """A batch, run up to the searched layer.

    Attributes:
        values: what the nodes from `position` on need.
        position: of the first node that calls the searched quantizer.
        targets: of the batch.
        size: B.
    """

    values: Values
    position: int
    targets: Any
    size: int


@dataclass(frozen=True)
class Deviation:
    """Of stacked from single passes on the unchanged layer: largest of an output, mean of a sample's loss."""

    output: float
    loss: float


@dataclass(frozen=True)
class CandidateScores:
    """What candidates score on each sample of a batch.

    Attributes:
        scores, losses: (C, B) float64, with channel c left out.
        doubtful: (C,) bool: a sample's two largest outputs are as close as the deviation.
    """

    scores: Tensor
    losses: Tensor
    doubtful: Tensor


def single_output(
    replay: Replay, prefix: Prefix, site: SearchSite, channel: int, watch: Callable[[Values], None] | None = None
) -> Any:
    """The output for one candidate (-1: nothing left out), bit for bit that of a full forward pass.

    Args:
        site: the searched one.
        watch: called with the values after every node.
    """
    site.active, site.left_out = True, None if channel < 0 else channel
    values = copy.deepcopy(prefix.values)  # together, so that views of one storage stay so
    return replay.run(values, prefix.position, replay.length, watch)


class Stack:
    """Stacked passes over one batch at one layer.

    Args:
        replay: of the search's model.
        prefix: the batch, run up to the layer.
        site: the searched one.
        scorer: what outputs are worth.
        ranks: share the passes.

    Attributes:
        changes: (B, C) bool: whether leaving a channel out changes anything in a sample.
        bytes_per_row: an estimate, good after `deviation`.

    Raises:
        NotStackable: a value does not hold one row per sample.
    """

    def __init__(self, replay: Replay, prefix: Prefix, site: SearchSite, scorer: Scorer, ranks: Processes) -> None:
        self.replay, self.prefix, self.site, self.scorer, self.ranks = replay, prefix, site, scorer, ranks
        quantized, original = self._run_site()
        self.changes = site.changes(original, quantized).cpu()
        live = replay.alive_after(prefix.position, {**prefix.values, prefix.position: quantized})
        self.shared = {i: v for i, v in live.items() if i not in replay.from_input}
        self.per_sample = {i: map_tensors(v, self._checked) for i, v in live.items() if i in replay.from_input}
        self.original = self._checked(original)
        self.bytes_per_row = TEMPORARIES * max(1, tensor_bytes(self.per_sample) // max(1, prefix.size))

    def _checked(self, value: Tensor) -> Tensor:
        """A contiguous (B, ...), from which rows are gathered fast."""
        if value.ndim == 0 or len(value) != self.prefix.size:
            raise NotStackable(f"a tensor of shape {tuple(value.shape)} made from the inputs is used later")
        return value.contiguous()

    def _run_site(self) -> tuple[Tensor, Tensor]:
        """(quantized, original) activation of the searched layer, nothing left out."""
        site = self.site
        calls: list[tuple[Tensor, Tensor]] = []

        def record(x: Tensor, *predictions: Tensor) -> Tensor:
            calls.append((site.quantize(x, *predictions), x))
            return calls[-1][0]

        site.replacement = record
        try:
            made = self.replay.execute(self.prefix.position, copy.deepcopy(self.prefix.values))
        finally:
            site.replacement = None
        if len(calls) != 1 or made is not calls[0][0]:
            raise NotStackable("the quantizer is called inside a larger module")
        return calls[0]

    def deviation(self, samples: int) -> Deviation | None:
        """Compare with single passes where nothing is left out, on the first samples of the batch.

        Returns:
            the deviation; None if stacked passes are not to be trusted.
        """
        size, peak = min(self.prefix.size, samples), 0

        def watch(values: Values) -> None:
            nonlocal peak
            peak = max(peak, tensor_bytes(values))

        few = self._first(size)
        single = single_output(self.replay, few, self.site, -1, watch)
        self.bytes_per_row = max(self.bytes_per_row, TEMPORARIES * peak // max(1, size))
        where = f"{self.site.name!r}, no channel left out"
        _, single_losses = self.scorer(single, few.targets, where)
        # some samples twice, in a candidate that changes much: where samples depend on each other, this shows
        half = (size + 1) // 2
        rows = torch.cat([torch.arange(size), torch.arange(half)])
        left_out = torch.full_like(rows, -1)
        left_out[size:] = self.changes.sum(0).argmax()
        stacked = self._outputs(rows, left_out)[:size]
        if single_losses is None or stacked.shape != single.shape:
            return None
        _, losses = self.scorer(stacked, few.targets, where)
        output = float((stacked.double() - single.double()).abs().max())
        if losses is None or not output <= TRUSTED * float(single.abs().max()):
            logger.info("%s: outputs of stacked candidates deviate by %.3g", self.site.name, output)
            return None
        return Deviation(output, float((losses - single_losses).abs().mean()))

    def _first(self, size: int) -> Prefix:
        """The first `size` samples of the batch."""
        values = {
            i: map_tensors(v, lambda t: self._checked(t)[:size]) if i in self.replay.from_input else v
            for i, v in self.prefix.values.items()
        }
        return Prefix(values, self.prefix.position, self.prefix.targets[:size], size)

    def rows_per_pass(self, memory: int) -> int:
        """How many rows go through at once: what runs fastest, within `memory` bytes."""
        fastest = max(COMPARED, min(2048, WORKING_SET // self.bytes_per_row))
        return int(max(1, min(fastest, memory // self.bytes_per_row)))

    def run(self, channels: int, step: int, deviation: Deviation) -> CandidateScores:
        """Scores of every candidate on this batch.

        Args:
            channels: C.
            step: rows per pass.
            deviation: of this layer.
        """
        size = self.prefix.size
        # (channel, sample): first all samples with nothing left out, which is what unchanged samples get
        unchanged = torch.stack([torch.full((size,), -1), torch.arange(size)], 1)
        pairs = torch.cat([unchanged, self.changes.T.nonzero()])
        passes = pairs.split(step)

        def score() -> dict[str, Tensor]:
            found: dict[str, Tensor] = {}
            for number in self.ranks.mine(len(passes)):
                left_out, rows = passes[number].unbind(1)
                scored = self._score(left_out, rows, deviation)
                found |= {f"{number} {kind}": values for kind, values in enumerate(scored)}
            return found

        parts = {
            key: value
            for part in shared_tensors(self.ranks, score, f"ranking {self.site.name!r}")
            for key, value in part.items()
        }
        channel, sample = pairs[size:].unbind(1)
        tables = []
        for kind in range(3):
            values = torch.cat([parts[f"{number} {kind}"] for number in range(len(passes))])
            table = values[:size].repeat(channels, 1)
            table[channel, sample] = values[size:]
            tables.append(table)
        scores, losses, doubtful = tables
        return CandidateScores(scores, losses, doubtful.any(1))

    def _score(self, left_out: Tensor, rows: Tensor, deviation: Deviation) -> tuple[Tensor, Tensor, Tensor]:
        """(R,) scores, losses, and whether the two largest outputs are too close to tell."""
        outputs = self._outputs(rows, left_out)
        targets = self.prefix.targets[rows.to(self.prefix.targets.device)]
        scores, losses = self.scorer(outputs, targets, repr(self.site.name))
        if losses is None:
            raise NotStackable("outputs of stacked samples are no classification")
        if outputs.shape[1] < 2:
            return scores, losses, torch.zeros(len(rows), dtype=torch.bool)
        first, second = outputs.topk(2, dim=1).values.unbind(1)
        gap = (first - second).reshape(len(rows), -1).amin(1)
        return scores, losses, (gap <= SAFETY * deviation.output).cpu()

    def _outputs(self, rows: Tensor, left_out: Tensor) -> Tensor:
        """Outputs of sample `rows[r]` with channel `left_out[r]` float (-1: none); both (R,) int64."""
        rows, left_out = rows.to(self.original.device), left_out.to(self.original.device)

        def gather(value: Tensor) -> Tensor:
            return torch.index_select(value, 0, rows)

        values: Values = copy.deepcopy(self.shared)
        values.update({i: map_tensors(value, gather) for i, value in self.per_sample.items()})
        position, replay = self.prefix.position, self.replay
        if position in values:
            values[position] = self.site.keep_float(gather(self.original), values[position], left_out)
        self.site.active, self.site.left_out = True, left_out
        outputs = replay.run(values, position + 1, replay.length)
        if not isinstance(outputs, Tensor) or len(outputs) != len(rows):
            raise NotStackable("the output is not one tensor with a row per sample")
        return outputs
