"""allocate_bits: a per-channel vector of extra bits, chosen so that stored bits meet a target.

The DQA paper gives the same m to every important channel. Here each channel c gets the step delta / 2^m_c that costs
the loss least for the bits spent: an error of variance step^2 / 12 changes the loss by about the squared gradient
times that, and halving a step costs about one bit whatever the channel, so that at the optimum the step is
proportional to 1 / sqrt(mean squared gradient), with one factor for all channels of all layers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from ..batches import ItemReader, Pick
from ..errors import InvalidArgument, UncalibratedQuantizer
from ..grid import Grid
from ..processes import Processes
from ..progress import counted
from ..quantizer import ActivationQuantizer
from ..sharing import by_piece
from .coder import engine
from .coder.histograms import entropy_bits
from .format.layout import Layout
from .model.sites import StoredSite
from .samples import CalibrationSamples, sample_grid
from .sensitivity import sensitivities, stored_sites
from .tables import build_codebook

_ROUNDS = 4  # corrections of the order-0 estimate by the tables that are really made
_STEPS = 40  # bisection steps


class _Candidate:
    """One site: its frozen copy, and the order-0 entropy of each channel for every m."""

    def __init__(self, site: StoredSite, sensitivity: Tensor) -> None:
        if site.samples is None:
            raise UncalibratedQuantizer(f"{site.quantizer.label} has seen no data; calibrate before allocating bits.")
        self.site, self.samples = site, site.samples
        self.quantizer: ActivationQuantizer = copy.deepcopy(site.quantizer).freeze()
        bits = self.quantizer.method.bits
        self.choices = np.arange(1 - bits, bits + 1)
        self.elements = int(np.prod(site.edge.shape[1:], dtype=np.int64))
        step = self._grid(torch.zeros(self.samples.values.shape[1], dtype=torch.int64)).step
        step = step.double().mean(0).flatten().clamp(min=1e-30)
        # m at which the step is 1 / sqrt(sensitivity): the factor of all layers is added to it
        self.level = torch.log2(step * sensitivity.clamp(min=1e-30).sqrt()).numpy()
        self.entropy = np.empty(0)  # (choices, C) bits per value, see `entropies`

    def _grid(self, extra: Tensor) -> Grid:
        return sample_grid(self.samples, self.quantizer, {"extra_bits": extra})

    def _codes(self, extra: Tensor) -> np.ndarray:
        return self._grid(extra).codes(self.samples.values).movedim(1, 0).flatten(1).numpy()

    def entropies(self) -> Tensor:
        """(choices, C) order-0 bits per value."""
        return torch.from_numpy(np.stack([self._entropy(int(m)) for m in self.choices]))

    def _entropy(self, m: int) -> np.ndarray:
        rows = self._codes(torch.full((self.samples.values.shape[1],), m))
        rows = rows - rows.min()
        counts = np.stack([np.bincount(row, minlength=int(rows.max()) + 1) for row in rows]).astype(np.float64)
        return entropy_bits(counts) / rows.shape[1]

    def vector(self, factor: float) -> np.ndarray:
        """(C,) m for a common factor, in bits."""
        wanted = np.rint(self.level + factor).astype(np.int64)
        return np.clip(wanted, self.choices[0], self.choices[-1])

    def estimate(self, vector: np.ndarray) -> float:
        """Order-0 bits per value."""
        return float(self.entropy[vector - self.choices[0], np.arange(vector.size)].mean())

    def measure(self, vector: np.ndarray) -> float:
        """Bits per value under joint coding: tables from one half of the samples, codes of the other half."""
        self.quantizer.set_extra_bits(torch.from_numpy(vector))
        codes = self._codes(self.quantizer.extra_bits.cpu())
        half = len(self.samples.values) // 2
        if half < 2:
            return coded_bits(build_codebook(self.quantizer, "joint", self.samples).layout(1, codes.shape[1]), codes)
        first = CalibrationSamples(self.samples.values[:half], tuple(e[:half] for e in self.samples.extents))
        book = build_codebook(self.quantizer, "joint", first)
        rest = codes[:, half * self.samples.values.shape[2] :]
        return coded_bits(book.layout(1, rest.shape[1]), rest)


def coded_bits(layout: Layout, codes: np.ndarray) -> float:
    """Bits per value that the kernels need for codes (C, K), lengths of the streams included."""
    plan = engine.KernelPlan(layout)
    narrow = torch.from_numpy(codes.astype(np.int64).astype(np.int16)).unsqueeze(0)
    _, sizes, _ = engine.encode(plan, None, narrow.contiguous(), torch.ones(1, codes.shape[0]))
    return 8 * (int(sizes.sum()) + 10 * layout.coded_chunks) / codes.size


def _measured(candidates: list[_Candidate], vectors: list[np.ndarray], ranks: Processes) -> list[float]:
    """Bits per value of each site."""

    def measure(k: int) -> Tensor:
        return torch.tensor(candidates[k].measure(vectors[k]), dtype=torch.float64)

    return [float(bits) for bits in by_piece(len(candidates), measure, ranks, "allocate_bits: coded bits")]


def allocate_bits(
    prepared: GraphModule,
    batches: Iterable[Any],
    target_bits: float = 1.5,
    *,
    inputs: Pick = None,
    targets: Pick = None,
) -> dict[str, Tensor]:
    """Give every channel its own extra bits, so that stored bits under joint coding meet a target. In place.

    Where torch.distributed is initialised, every rank calls this with the same model (calibration merged by
    `distributed.synchronize`) and the same batches: ranks share the backward passes and the sites, and all get the bits
    of one process.

    Args:
        prepared: from `prepare_stored` with a DQA method, calibrated. m lies in [1 - bits, bits], so that `bits` sets
            how fine and how coarse channels can become.
        batches: as a DataLoader yields them, see `batches`: (inputs, targets) of a classification, one backward pass
            each; or inputs alone: then how much the outputs move decides; or none, then the relative quantization error
            does.
        target_bits: average stored bits per activation over all stored values, without tables.
        inputs, targets: functions of a batch, where what it holds is not clear.

    Returns:
        {site name: (C,) int64 extra bits}, as they were set.

    Raises:
        UnsupportedCombination: no DQA sites, or they are frozen. UncalibratedQuantizer: no data seen.
        InvalidArgument: the target cannot be met within [1 - bits, bits].
        UnsupportedInput: a batch does not fit the model.
        NonFiniteInput: a batch makes NaN or Inf, in values or gradients.
        RanksDiffer: ranks were given different models or data. RankLost: a rank died, raised, or did not call within
            the group's timeout.
    """
    ranks = Processes()
    if not isinstance(target_bits, int | float) or not 0.25 <= target_bits <= 16:
        raise InvalidArgument(f"target_bits={target_bits!r}: a number of bits per activation from 0.25 to 16.")
    sites = stored_sites(prepared)
    reader = ItemReader(prepared, "allocate_bits", "optional", inputs, targets)
    listed = list(batches)
    sensitivity = sensitivities(prepared, sites, list(reader.items(listed)) if listed else [], ranks)
    candidates = [_Candidate(site, sensitivity[site]) for site in sites]
    found = by_piece(len(candidates), lambda k: candidates[k].entropies(), ranks, "allocate_bits: entropies")
    for candidate, entropy in zip(candidates, found, strict=True):
        candidate.entropy = entropy.numpy()
    weights = np.array([c.elements for c in candidates], np.float64)
    weights /= weights.sum()

    def average(of: list[float]) -> float:
        return float((np.array(of) * weights).sum())

    ratio, vectors, best = 1.0, [c.vector(0.0) for c in candidates], (np.inf, [c.vector(0.0) for c in candidates])
    for _ in counted(range(_ROUNDS), what="allocating bits", unit=" round"):
        low, high = -64.0, 64.0
        for _ in range(_STEPS):
            middle = (low + high) / 2
            vectors = [c.vector(middle) for c in candidates]
            estimated = average([c.estimate(v) for c, v in zip(candidates, vectors, strict=True)])
            low, high = (low, middle) if estimated * ratio > target_bits else (middle, high)
        vectors = [c.vector(low) for c in candidates]
        estimated = average([c.estimate(v) for c, v in zip(candidates, vectors, strict=True)])
        measured = average(_measured(candidates, vectors, ranks))
        over = abs(measured - target_bits) + (10.0 if measured > target_bits * 1.02 else 0.0)
        if over < best[0]:
            best = (over, vectors)
        if abs(measured / target_bits - 1) < 0.01:
            break
        ratio = measured / max(estimated, 1e-9)
    if best[0] >= 10.0:
        raise InvalidArgument(
            f"target_bits={target_bits}: the coarsest steps already need more; use fewer bits in DQA(bits=...)."
        )
    result = {}
    for candidate, vector in zip(candidates, best[1], strict=True):
        candidate.site.quantizer.set_extra_bits(torch.from_numpy(vector))
        result[candidate.site.quantizer.name] = torch.from_numpy(vector)
    return result
