"""Several candidates in one pass: their samples stacked along the batch, at one layer, for one batch of data."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .evaluate import Scorer
from .fused import Chains
from .graph import Graph, NotStackable, Values, gather_rows, map_tensors, tensor_bytes, to_rows_first
from .stage import Seam, Stage

logger = logging.getLogger(__name__)

TRUSTED = 1e-5  # largest deviation of the stacked way, relative to the largest output
SAFETY = 4.0  # what is decided must be clear by so many deviations
TEMPORARIES = 3  # bytes per row: the values kept, and what operations need besides
COMPARED = 32  # samples on which the ways are compared
WORKING_SET = 32 * 2**20  # bytes of a pass that still run fast (measured: ResNet-32, 16 to 64 channels)


@dataclass
class Cut:
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
class Way:
    """A stage and its graph, whether its values are laid out channels-last, and what is computed together."""

    stage: Stage
    graph: Graph
    channels_last: bool
    chains: Chains | None = None

    @property
    def name(self) -> str:
        """For log messages."""
        format_ = " in channels-last format" if self.channels_last else ""
        return "stacking candidates" + format_ + (" with fused convolutions" if self.chains else "")

    def begin(self, position: int) -> None:
        """Prepare the graph for runs from the node behind `position` on."""
        if self.chains is not None:
            self.graph.specials = self.chains.specials(position + 1)


@dataclass(frozen=True)
class Deviation:
    """Between the stacked and the exact way on the unchanged layer: largest of an output, mean of a sample's loss."""

    output: float
    loss: float


@dataclass(frozen=True)
class Rows:
    """What candidates score on each sample.

    Attributes:
        scores, losses: (C, B) float64, with channel c left out.
        doubtful: (C,) bool: a sample's two largest outputs are as close as the deviation.
    """

    scores: Tensor
    losses: Tensor
    doubtful: Tensor


def exact_output(
    graph: Graph, cut: Cut, seam: Seam, channel: int, watch: Callable[[Values], None] | None = None
) -> Any:
    """The output for one candidate (-1: nothing left out), bit for bit that of a full forward pass.

    Args:
        seam: of the searched quantizer, in the stage of `graph`.
        watch: called with the values after every node.
    """
    seam.active, seam.left_out = True, None if channel < 0 else channel
    values = copy.deepcopy(cut.values)  # together, so that views of one storage stay so
    return graph.run(values, cut.position, graph.length, watch)


class Stack:
    """Stacked passes over one batch at one layer.

    Args:
        exact: the way of full forward passes.
        way: the way to stack; its seams do what those of `exact` do.
        cut: the batch, run up to the layer.
        index: of the searched quantizer.
        scorer: what outputs are worth.

    Attributes:
        changes: (B, C) bool: whether leaving a channel out changes anything in a sample.
        bytes_per_row: an estimate, good after `deviation`.

    Raises:
        NotStackable: a value does not hold one row per sample.
    """

    def __init__(self, exact: Way, way: Way, cut: Cut, index: int, scorer: Scorer) -> None:
        self.cut, self.way, self.scorer, self.exact = cut, way, scorer, exact
        self.exact_seam, self.seam = exact.stage.seams[index], way.stage.seams[index]
        way.begin(cut.position)
        quantized, original = self._run_site()
        self.changes = self.seam.changes(original, quantized).cpu()
        live = exact.graph.alive_after(cut.position, {**cut.values, cut.position: quantized})
        self.fixed = {i: v for i, v in live.items() if i not in exact.graph.from_input}
        self.rows = {i: map_tensors(v, self._lay_out) for i, v in live.items() if i in exact.graph.from_input}
        self.source = self._lay_out(original)
        self.bytes_per_row = TEMPORARIES * max(1, tensor_bytes(self.rows) // max(1, cut.size))

    def _lay_out(self, value: Tensor) -> Tensor:
        return to_rows_first(value, self.cut.size, self.way.channels_last)

    def _run_site(self) -> tuple[Tensor, Tensor]:
        """(quantized, original) activation of the searched layer, nothing left out."""
        seam = self.exact_seam
        seam.active, seam.left_out, seam.calls = True, None, []
        try:
            made = self.exact.graph.execute(self.cut.position, copy.deepcopy(self.cut.values))
            calls = seam.calls
        finally:
            seam.calls = None
        if len(calls) != 1 or made is not calls[0][1]:
            raise NotStackable("the quantizer is called inside a larger module")
        return made, calls[0][0]

    def deviation(self, samples: int) -> Deviation | None:
        """Compare with the exact way where nothing is left out, on the first samples of the batch.

        Returns:
            the deviation; None if the stacked way is not to be trusted.
        """
        size, peak = min(self.cut.size, samples), 0

        def watch(values: Values) -> None:
            nonlocal peak
            peak = max(peak, tensor_bytes(values))

        few = self._few(size)
        exact = exact_output(self.exact.graph, few, self.exact_seam, -1, watch)
        self.bytes_per_row = max(self.bytes_per_row, TEMPORARIES * peak // max(1, size))
        where = f"{self.seam.name!r}, no channel left out"
        _, exact_losses = self.scorer(exact, few.targets, where)
        # some samples twice, in a candidate that changes much: where samples depend on each other, this shows
        half = (size + 1) // 2
        rows = torch.cat([torch.arange(size), torch.arange(half)])
        left_out = torch.full_like(rows, -1)
        left_out[size:] = self.changes.sum(0).argmax()
        stacked = self._outputs(rows, left_out)[:size]
        if exact_losses is None or stacked.shape != exact.shape:
            return None
        _, losses = self.scorer(stacked, few.targets, where)
        output = float((stacked.double() - exact.double()).abs().max())
        if losses is None or not output <= TRUSTED * float(exact.abs().max()):
            logger.info("%s: %s: outputs deviate by %.3g", self.seam.name, self.way.name, output)
            return None
        return Deviation(output, float((losses - exact_losses).abs().mean()))

    def _few(self, size: int) -> Cut:
        """The first `size` samples of the batch."""
        values = {
            i: map_tensors(v, lambda t: to_rows_first(t, self.cut.size, False)[:size])
            if i in self.exact.graph.from_input
            else v
            for i, v in self.cut.values.items()
        }
        return Cut(values, self.cut.position, self.cut.targets[:size], size)

    def rows_per_pass(self, rows: int | None, memory: int) -> int:
        """How many rows go through at once: `rows` or what runs fastest, within `memory` bytes."""
        wanted = max(COMPARED, min(2048, WORKING_SET // self.bytes_per_row)) if rows is None else rows
        return int(max(1, min(wanted, memory // self.bytes_per_row)))

    def run(self, channels: int, step: int, deviation: Deviation) -> Rows:
        """Scores of every candidate on this batch.

        Args:
            channels: C.
            step: rows per pass.
            deviation: of this layer.
        """
        size = self.cut.size
        # (channel, sample): first all samples with nothing left out, which is what unchanged samples get
        unchanged = torch.stack([torch.full((size,), -1), torch.arange(size)], 1)
        pairs = torch.cat([unchanged, self.changes.T.nonzero()])
        parts = [self._score(left_out, rows, deviation) for left_out, rows in (p.unbind(1) for p in pairs.split(step))]
        channel, sample = pairs[size:].unbind(1)
        tables = []
        for found in zip(*parts, strict=True):
            values = torch.cat(found)
            table = values[:size].repeat(channels, 1)
            table[channel, sample] = values[size:]
            tables.append(table)
        scores, losses, doubtful = tables
        return Rows(scores, losses, doubtful.any(1))

    def _score(self, left_out: Tensor, rows: Tensor, deviation: Deviation) -> tuple[Tensor, Tensor, Tensor]:
        """(R,) scores, losses, and whether the two largest outputs are too close to tell."""
        outputs = self._outputs(rows, left_out)
        targets = self.cut.targets[rows.to(self.cut.targets.device)]
        scores, losses = self.scorer(outputs, targets, repr(self.seam.name))
        if losses is None:
            raise NotStackable("outputs of stacked samples are no classification")
        if outputs.shape[1] < 2:
            return scores, losses, torch.zeros(len(rows), dtype=torch.bool)
        first, second = outputs.topk(2, dim=1).values.unbind(1)
        gap = (first - second).reshape(len(rows), -1).amin(1)
        return scores, losses, (gap <= SAFETY * deviation.output).cpu()

    def _outputs(self, rows: Tensor, left_out: Tensor) -> Tensor:
        """Outputs of sample `rows[r]` with channel `left_out[r]` float (-1: none); both (R,) int64."""
        rows, left_out = rows.to(self.source.device), left_out.to(self.source.device)

        def gather(value: Tensor) -> Tensor:
            return gather_rows(value, rows, self.way.channels_last)

        values: Values = copy.deepcopy(self.fixed)
        values.update({i: map_tensors(value, gather) for i, value in self.rows.items()})
        position, graph = self.cut.position, self.way.graph
        if position in values:
            values[position] = self.seam.without(gather(self.source), values[position], left_out)
        self.seam.active, self.seam.left_out = True, left_out
        outputs = graph.run(values, position + 1, graph.length)
        if not isinstance(outputs, Tensor) or len(outputs) != len(rows):
            raise NotStackable("the output is not one tensor with a row per sample")
        return outputs
