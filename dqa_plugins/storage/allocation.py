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
from torch import Tensor, nn
from torch.fx import GraphModule

from ..errors import InvalidMethod, NonFiniteInput, UncalibratedQuantizer, UnsupportedCombination
from ..grid import Grid
from ..metrics import cross_entropy
from ..quantizer import ActivationQuantizer
from .coder import engine
from .coder.histograms import entropy_bits
from .format.layout import Layout
from .model.sites import StoredSite
from .samples import CalibrationSamples, sample_grid
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
        self.entropy = np.stack([self._entropy(int(m)) for m in self.choices])  # (choices, C) bits per value

    def _grid(self, extra: Tensor) -> Grid:
        return sample_grid(self.samples, self.quantizer, {"extra_bits": extra})

    def _codes(self, extra: Tensor) -> np.ndarray:
        return self._grid(extra).codes(self.samples.values).movedim(1, 0).flatten(1).numpy()

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


def _sites(model: nn.Module) -> list[StoredSite]:
    sites = [m for m in model.modules() if isinstance(m, StoredSite) and m.quantizer.method.has_important_channels]
    if not sites:
        raise UnsupportedCombination(
            "allocate_bits needs stored values with DQA quantizers: prepare_stored(model, DQA())"
        )
    for site in sites:
        if site.quantizer.state != "observe":
            raise UnsupportedCombination(f"{site.quantizer.label} is frozen; allocate bits before converting.")
    return sites


def _sensitivities(model: nn.Module, sites: list[StoredSite], batches: Iterable[Any]) -> dict[StoredSite, Tensor]:
    """(C,) mean squared gradient over samples and positions.

    With labels, of the cross-entropy of a sample; with inputs alone, of a random projection of the outputs, which
    stands for their squared error; without batches, one over the power of the tensor: the relative quantization error.
    """
    totals: dict[StoredSite, Tensor] = {}
    counts: dict[StoredSite, int] = {}
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        inputs, targets = batch if isinstance(batch, list | tuple) and len(batch) == 2 else (batch, None)
        values: list[tuple[StoredSite, Tensor]] = []

        def record(site: nn.Module, _: Any, out: Tensor, values: list[tuple[StoredSite, Tensor]] = values) -> Tensor:
            out = out if out.requires_grad else out.detach().requires_grad_()
            if isinstance(site, StoredSite):
                values.append((site, out))
            return out

        handles = [site.register_forward_hook(record) for site in sites]
        try:
            with torch.enable_grad():
                outputs = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
                if targets is None:
                    loss = (outputs * torch.randn(outputs.shape, generator=generator).to(outputs)).sum()
                else:
                    loss = cross_entropy(outputs, targets).sum()
                found = torch.autograd.grad(loss, [t for _, t in values], allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        for (site, value), gradient in zip(values, found, strict=True):
            square = torch.zeros_like(value) if gradient is None else gradient.square()
            for what, tensor in (("values", value), ("squared gradients", square)):
                if not bool(torch.isfinite(tensor).all()):
                    raise NonFiniteInput(
                        f"{site.quantizer.label}: allocate_bits got a batch with "
                        f"{int((~torch.isfinite(tensor)).sum())} {what} that are NaN or Inf, of shape "
                        f"{tuple(value.shape)}. Find the sample, or the layer, that makes them."
                    )
            rows = square.double().movedim(site.quantizer.channel_axis, 0).flatten(1)
            totals[site] = totals.get(site, 0) + rows.sum(1).cpu()
            counts[site] = counts.get(site, 0) + rows.shape[1]
    if totals:
        return {site: totals[site] / max(counts[site], 1) for site in totals}
    powers = {}
    for site in sites:
        kept = site.samples.values if site.samples is not None else torch.ones(1, 1, 1)
        powers[site] = torch.full((kept.shape[1],), 1.0 / max(float(kept.double().square().mean()), 1e-30)).double()
    return powers


def _sensitivities_of_a_twin(
    prepared: GraphModule, sites: list[StoredSite], batches: Iterable[Any]
) -> dict[StoredSite, Tensor]:
    """`_sensitivities` without a trace in the model: not in statistics, which observers of an adapter would move."""
    twin = copy.deepcopy(prepared)
    for module in twin.modules():  # not eval(), which exported models refuse
        module.training = False
    own = dict(zip(_sites(twin), sites, strict=True))
    for site in own:
        site.paused = True
    return {own[site]: value for site, value in _sensitivities(twin, list(own), batches).items()}


def allocate_bits(prepared: GraphModule, batches: Iterable[Any], target_bits: float = 1.5) -> dict[str, Tensor]:
    """Give every channel its own extra bits, so that stored bits under joint coding meet a target. In place.

    Args:
        prepared: from `prepare_stored` with a DQA method, calibrated. m lies in [1 - bits, bits], so that `bits` sets
            how fine and how coarse channels can become.
        batches: (inputs, targets) of a classification, one backward pass each; or inputs alone (tensors): then how
            much the outputs move decides; or none, then the relative quantization error does.
        target_bits: average stored bits per activation over all stored values, without tables.

    Returns:
        {site name: (C,) int64 extra bits}, as they were set.

    Raises:
        UnsupportedCombination: no DQA sites, or they are frozen. UncalibratedQuantizer: no data seen.
        InvalidMethod: the target cannot be met within [1 - bits, bits].
        NonFiniteInput: a batch makes NaN or Inf, in values or gradients.
    """
    if not isinstance(target_bits, int | float) or not 0.25 <= target_bits <= 16:
        raise InvalidMethod(f"target_bits={target_bits!r}: a number of bits per activation from 0.25 to 16.")
    sites = _sites(prepared)
    sensitivity = _sensitivities_of_a_twin(prepared, sites, batches)
    candidates = [_Candidate(site, sensitivity[site]) for site in sites]
    weights = np.array([c.elements for c in candidates], np.float64)
    weights /= weights.sum()

    def average(of: list[float]) -> float:
        return float((np.array(of) * weights).sum())

    ratio, vectors, best = 1.0, [c.vector(0.0) for c in candidates], (np.inf, [c.vector(0.0) for c in candidates])
    for _ in range(_ROUNDS):
        low, high = -64.0, 64.0
        for _ in range(_STEPS):
            middle = (low + high) / 2
            vectors = [c.vector(middle) for c in candidates]
            estimated = average([c.estimate(v) for c, v in zip(candidates, vectors, strict=True)])
            low, high = (low, middle) if estimated * ratio > target_bits else (middle, high)
        vectors = [c.vector(low) for c in candidates]
        estimated = average([c.estimate(v) for c, v in zip(candidates, vectors, strict=True)])
        measured = average([c.measure(v) for c, v in zip(candidates, vectors, strict=True)])
        over = abs(measured - target_bits) + (10.0 if measured > target_bits * 1.02 else 0.0)
        if over < best[0]:
            best = (over, vectors)
        if abs(measured / target_bits - 1) < 0.01:
            break
        ratio = measured / max(estimated, 1e-9)
    if best[0] >= 10.0:
        raise InvalidMethod(
            f"target_bits={target_bits}: the coarsest steps already need more; use fewer bits in DQA(bits=...)."
        )
    result = {}
    for candidate, vector in zip(candidates, best[1], strict=True):
        candidate.site.quantizer.set_extra_bits(torch.from_numpy(vector))
        result[candidate.site.quantizer.name] = torch.from_numpy(vector)
    return result
