"""How much the loss, or the outputs, of a network move with the values of each channel that is stored."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..batches import Call
from ..digest import digest
from ..errors import NonFiniteInput, UnsupportedCombination
from ..metrics import cross_entropy
from ..processes import Processes
from ..progress import counted
from ..sharing import shared, shared_tensors
from .model.sites import StoredSite


def stored_sites(model: nn.Module) -> list[StoredSite]:
    """The stored values of a model whose quantizers have important channels.

    Raises:
        UnsupportedCombination: there are none, or they are frozen.
    """
    sites = [m for m in model.modules() if isinstance(m, StoredSite) and m.quantizer.method.has_important_channels]
    if not sites:
        raise UnsupportedCombination(
            "allocate_bits needs stored values with DQA quantizers: prepare_stored(model, DQA())"
        )
    for site in sites:
        if site.quantizer.state != "observe":
            raise UnsupportedCombination(f"{site.quantizer.label} is frozen; allocate bits before converting.")
    return sites


def sensitivities(
    prepared: GraphModule, sites: list[StoredSite], batches: list[Call], ranks: Processes
) -> dict[StoredSite, Tensor]:
    """(C,) mean squared gradient over samples and positions, of each site.

    With labels, of the cross-entropy of a sample; with inputs alone, of a random projection of the outputs, which
    stands for their squared error; without batches, one over the power of the tensor: the relative quantization error.

    Args:
        prepared: not changed, statistics of an adapter's observers included.
        sites: of the model.
        batches: with targets or without.
        ranks: do one batch each at a time.

    Raises:
        RanksDiffer: ranks were given different models or batches.
    """
    if ranks.size > 1:
        hint = "Give every rank the same batches, and a model whose calibration is merged (synchronize)."
        given = [(call.inputs, call.targets) for call in batches]
        ranks.agree(lambda: {"model": digest(prepared), "batches": digest(given)}, "allocate_bits", hint)
    if not batches:
        return {site: _power(site) for site in sites}
    gradients = _Gradients(prepared, len(sites))
    generator = torch.Generator().manual_seed(0)
    totals: dict[StoredSite, Tensor] = {}
    counts: dict[StoredSite, int] = {}
    for first in counted(range(0, len(batches), ranks.size), what="gradients of stored values", unit="batch"):
        mine = batches[first + ranks.rank : first + ranks.rank + 1]
        shapes = shared(ranks, functools.partial(gradients.run, mine), "allocate_bits: forward")
        # each rank draws for all, so that a batch meets the numbers of one process
        drawn = [None if shape is None else torch.randn(shape, generator=generator) for shape in shapes]
        work = functools.partial(gradients.squares, drawn[ranks.rank])
        found = shared_tensors(ranks, work, "allocate_bits: backward")
        for part in found:
            for key, squares in part.items():
                _, number, count = map(int, key.split())
                totals[sites[number]] = totals.get(sites[number], 0) + squares
                counts[sites[number]] = counts.get(sites[number], 0) + count
    return {site: totals[site] / max(counts[site], 1) for site in totals}


def _power(site: StoredSite) -> Tensor:
    kept = site.samples.values if site.samples is not None else torch.ones(1, 1, 1)
    return torch.full((kept.shape[1],), 1.0 / max(float(kept.double().square().mean()), 1e-30)).double()


class _Gradients:
    """Forward and backward passes of a copy of a prepared model."""

    def __init__(self, prepared: GraphModule, count: int) -> None:
        self.twin = copy.deepcopy(prepared)
        for module in self.twin.modules():  # not eval(), which exported models refuse
            module.training = False
        self.sites = stored_sites(self.twin)[:count]
        for site in self.sites:
            site.paused = True
        self._values: list[tuple[int, Tensor]] = []  # site, value: of the last forward
        self._outputs: Any = None
        self._targets: Any = None

    def run(self, batches: list[Call]) -> list[int] | None:
        """Run the batch, if there is one, forward; the shape of what is to be drawn for it, None if nothing."""
        if not batches:
            return None
        self._targets = batches[0].targets
        self._values = values = []

        def record(number: int, out: Tensor) -> Tensor:
            out = out if out.requires_grad else out.detach().requires_grad_()
            values.append((number, out))
            return out

        handles = [
            site.register_forward_hook(lambda _, args, out, number=number: record(number, out))
            for number, site in enumerate(self.sites)
        ]
        try:
            with torch.enable_grad():
                self._outputs = batches[0](self.twin)
        finally:
            for handle in handles:
                handle.remove()
        return list(self._outputs.shape) if self._targets is None else None

    def squares(self, drawn: Tensor | None) -> dict[str, Tensor]:
        """Squared gradients of the batch that ran, summed over samples and positions, (C,); none if none ran.

        Args:
            drawn: in the shape of the outputs, where there are no targets.

        Returns:
            {"<call> <site> <values per channel>": (C,) float64}.
        """
        if self._outputs is None:
            return {}
        with torch.enable_grad():
            if drawn is None:
                loss = cross_entropy(self._outputs, self._targets).sum()
            else:
                loss = (self._outputs * drawn.to(self._outputs)).sum()
            gradients = torch.autograd.grad(loss, [value for _, value in self._values], allow_unused=True)
        found = {}
        for call, ((number, value), gradient) in enumerate(zip(self._values, gradients, strict=True)):
            square = torch.zeros_like(value) if gradient is None else gradient.square()
            _require_finite(self.sites[number], value, square)
            rows = square.double().movedim(self.sites[number].quantizer.channel_axis, 0).flatten(1)
            found[f"{call} {number} {rows.shape[1]}"] = rows.sum(1).cpu()
        self._outputs, self._values = None, []
        return found


def _require_finite(site: StoredSite, value: Tensor, square: Tensor) -> None:
    for what, tensor in (("values", value), ("squared gradients", square)):
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteInput(
                f"{site.quantizer.label}: allocate_bits got a batch with {int((~torch.isfinite(tensor)).sum())} {what} "
                f"that are NaN or Inf, of shape {tuple(value.shape)}. Find the sample, or the layer, that makes them."
            )
