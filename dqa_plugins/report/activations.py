"""What each activation costs: bits, side information and error, site by site."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dqa_plugins.batches import Pick, run_batches
from dqa_plugins.errors import UncalibratedQuantizer, UnsupportedCombination
from dqa_plugins.grid import Grid
from dqa_plugins.quantizer import ActivationQuantizer
from dqa_plugins.sites import iter_quantizers


@dataclass(frozen=True)
class SiteReport:
    """One site, measured on the inputs given.

    Attributes:
        site: its name.
        method: of its quantizer.
        elements: values per sample.
        bits: per value with fixed-length codes, all side information of the tensor included: n-bit codes, m-bit shift
            errors of the important channels, 32-bit value and position of each outlier, per-sample qparams.
        sqnr: signal to quantization noise, decibels; inf where nothing was lost, -inf where nothing but noise is left.
        density: share of outliers (DenseSparse), else 0.
    """

    site: str
    method: str
    elements: int
    bits: float
    sqnr: float
    density: float


@dataclass(frozen=True)
class ActivationReport:
    """All sites of a model."""

    sites: list[SiteReport]

    @property
    def bits_per_activation(self) -> float:
        """Mean over all quantized values, weighted by elements; nan where none is quantized."""
        if not self.sites:
            return math.nan
        return sum(s.bits * s.elements for s in self.sites) / sum(s.elements for s in self.sites)

    def as_dict(self) -> dict[str, Any]:
        """JSON-compatible."""
        return {"bits_per_activation": self.bits_per_activation, "sites": [asdict(s) for s in self.sites]}

    def __str__(self) -> str:
        if not self.sites:
            return "no quantized activation"
        width = max([len(s.site) for s in self.sites] + [4])
        rows = [f"{'site':{width}}  method         elements   bits  SQNR dB  density"]
        rows += [
            f"{s.site:{width}}  {s.method:13} {s.elements:9d}  {s.bits:5.2f}  {s.sqnr:7.1f}  {s.density:7.2%}"
            for s in self.sites
        ]
        return "\n".join([*rows, f"bits per activation: {self.bits_per_activation:.3f}"])


def fixed_length_bits(quantizer: ActivationQuantizer, x: Tensor, prediction: Tensor | None = None) -> float:
    """Bits per value of x, (B, ...), with fixed-length codes and all side information of the tensor.

    Args:
        quantizer: frozen.
        x: what it quantizes.
        prediction: its second input, if it got one.
    """
    grid, per_sample = quantizer.grid(x, prediction), x[0].numel()
    bits = grid.bits() + kept_share(grid, x) * (32 + math.ceil(math.log2(max(per_sample, 2))))
    if quantizer.method.qparams != "static":
        values = sum(p.shape[0] * p[0].numel() for p in quantizer.runtime_qparams(x, prediction) if p is not None)
        bits += 32 * values / x.numel()
    return bits


def kept_share(grid: Grid, x: Tensor) -> float:
    """Share of the values of x that a grid keeps in float."""
    outside = grid.outside(x)
    return 0.0 if outside is None else float(outside.double().mean())


@torch.no_grad()
def activation_report(model: nn.Module, batches: Iterable[Any], *, inputs: Pick = None) -> ActivationReport:
    """Run a converted model and measure what each quantized activation costs and loses.

    Args:
        model: converted by any adapter.
        batches: what a DataLoader yields, see `batches`.
        inputs: a function batch -> inputs, where that is not clear.

    Raises:
        UncalibratedQuantizer: a quantizer is not frozen, or there are no batches.
        UnsupportedCombination: the model has no quantizers.
        UnsupportedInput: a single batch was given, or one that does not fit the model.
    """
    names = {}
    for name, quantizer in iter_quantizers(model):
        if quantizer.state != "frozen":
            raise UncalibratedQuantizer(f"'{name}' is in state {quantizer.state!r}: convert the model first.")
        names[quantizer] = name
    if not names:
        raise UnsupportedCombination("activation_report: this model has no quantizers; give one that was converted.")
    sums: dict[ActivationQuantizer, list[float]] = {quantizer: [0.0] * 5 for quantizer in names}

    def note(quantizer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        if not isinstance(quantizer, ActivationQuantizer) or args[0].numel() == 0:
            return
        x, prediction, entry = args[0], args[1] if len(args) > 1 else None, sums[quantizer]
        entry[0] += x.numel()
        entry[1] += len(x)
        entry[2] += fixed_length_bits(quantizer, x, prediction) * x.numel()
        entry[3] += float(x.double().square().sum())
        entry[4] += float((x.double() - y.double()).square().sum())
        outliers = kept_share(quantizer.grid(x, prediction), x) * x.numel()
        densities[quantizer] = densities.get(quantizer, 0.0) + outliers

    densities: dict[ActivationQuantizer, float] = {}
    hooks = [quantizer.register_forward_hook(note) for quantizer in names]
    try:
        run_batches(model, batches, "activation_report", inputs)
    finally:
        for hook in hooks:
            hook.remove()
    sites = []
    for quantizer, (count, samples, bits, signal, noise) in sums.items():
        if count:
            sqnr = math.inf if not noise else 10 * math.log10(signal / noise) if signal else -math.inf
            method = type(quantizer.method).__name__
            density = densities.get(quantizer, 0.0) / count
            sites.append(SiteReport(names[quantizer], method, round(count / samples), bits / count, sqnr, density))
    if not sites:
        raise UncalibratedQuantizer("activation_report: no value reached a quantizer; the batches are empty.")
    return ActivationReport(sites)
