"""What each activation costs and loses: bits, side information, error, saturation, and where its values lie."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dqa_plugins.batches import Pick, run_batches
from dqa_plugins.errors import DQAWarning, UncalibratedQuantizer, UnsupportedCombination
from dqa_plugins.grid import Grid
from dqa_plugins.quantizer import ActivationQuantizer
from dqa_plugins.sites import iter_quantizers

from .measured import Histogram, SiteReport
from .page import write_page
from .tables import Table, Tabled, described

BINS = 64
SATURATED = 0.1  # share of values beyond the code range from which a warning is due


@dataclass(frozen=True)
class ActivationReport(Tabled):
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
        found: dict[str, Any] = {
            "bits_per_activation": self.bits_per_activation,
            "sites": [asdict(s) for s in self.sites],
        }
        for site in found["sites"]:
            histogram = site["histogram"] or {}
            site.update({key: list(value) for key, value in site.items() if isinstance(value, tuple)})
            histogram.update({key: list(value) for key, value in histogram.items() if isinstance(value, tuple)})
        return found

    def table(self) -> Table:
        """What it prints as."""
        rows = [
            (
                s.site,
                s.method,
                str(s.elements),
                f"{s.bits:.2f}",
                f"{s.sqnr:.1f}",
                f"{s.density:.2%}",
                f"{s.saturated:.2%}",
            )
            for s in self.sites
        ]
        columns = ("site", "method", "elements", "bits", "SQNR dB", "density", "saturated")
        return Table(f"bits per activation: {self.bits_per_activation:.3f}", columns, rows)

    def __str__(self) -> str:
        title, *rows = str(self.table()).split("\n")
        return "\n".join([*rows, title]) if self.sites else "no quantized activation"

    def write_html(self, path: str | os.PathLike[str], *, sensitivity: dict[str, float] | None = None) -> Path:
        """Write one self-contained page: sortable tables, per site the histogram with its grid.

        Args:
            path: of the file; nothing that it needs lies elsewhere.
            sensitivity: {site: relative error of the outputs when this site alone is quantized}, such as
                `Suggestion.sensitivity()` gives.
        """
        return write_page(self.sites, self.bits_per_activation, Path(path), sensitivity or {})


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


@dataclass
class _Sums:
    """What is added up over the batches of a site."""

    count: int = 0
    samples: int = 0
    bits: float = 0.0
    signal: float = 0.0
    noise: float = 0.0
    kept: float = 0.0
    saturated: float = 0.0
    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS))
    histogram: Histogram | None = None

    def add(self, quantizer: ActivationQuantizer, x: Tensor, y: Tensor, prediction: Tensor | None) -> None:
        """One batch of a site."""
        grid = quantizer.grid(x, prediction)
        exact = x.double()
        self.count += x.numel()
        self.samples += len(x)
        self.bits += fixed_length_bits(quantizer, x, prediction) * x.numel()
        self.signal += float(exact.square().sum())
        self.noise += float((exact - y.double()).square().sum())
        self.kept += kept_share(grid, x) * x.numel()
        lowest, highest = grid.values(torch.as_tensor(grid.low)), grid.values(torch.as_tensor(grid.high))
        # the largest value calibrated is a step beyond the largest code: scale = max / 2^n
        clamped = (x < lowest - grid.step * 1.001) | (x > highest + grid.step * 1.001)
        outside = grid.outside(x)
        self.saturated += float((clamped if outside is None else clamped & ~outside).sum())
        finite = x[torch.isfinite(x)].float().cpu()
        if self.histogram is None:
            low, high = (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 0.0)
            kept = None if grid.keep is None else (float(grid.keep[0].min()), float(grid.keep[1].max()))
            represented = float(lowest.min()), float(highest.max())
            steps = grid.step[grid.step > 0]  # a channel that was always zero has none, and needs none
            step = float(steps.min()) if steps.numel() else 0.0
            self.histogram = Histogram(low, max(high, low + 1e-30), (), represented, step, kept)
        ends = self.histogram.low, self.histogram.high
        self.counts += torch.histc(finite.clamp(*ends), BINS, *ends)

    def report(self, name: str, quantizer: ActivationQuantizer) -> SiteReport:
        """What they say of the site."""
        sqnr = math.inf if not self.noise else 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf
        extra = quantizer.extra_bits if quantizer.method.has_important_channels else torch.zeros(0)
        return SiteReport(
            name,
            type(quantizer.method).__name__,
            round(self.count / self.samples),
            self.bits / self.count,
            sqnr,
            self.kept / self.count,
            self.saturated / self.count,
            described(quantizer.method),
            tuple(torch.nonzero(extra > 0).flatten().tolist()),
            self.histogram and replace(self.histogram, counts=tuple(int(c) for c in self.counts)),
        )


@torch.no_grad()
def activation_report(model: nn.Module, batches: Iterable[Any], *, inputs: Pick = None) -> ActivationReport:
    """Run a converted model and measure what each quantized activation costs and loses.

    Warns once, with the sites' names, where a tenth of the values or more are beyond the code range, and where a site
    has no range at all: calibration data unlike these.

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
    sums = {quantizer: _Sums() for quantizer in names}

    def measure(quantizer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        if isinstance(quantizer, ActivationQuantizer) and args[0].numel():
            sums[quantizer].add(quantizer, args[0], y, args[1] if len(args) > 1 else None)

    hooks = [quantizer.register_forward_hook(measure) for quantizer in names]
    try:
        run_batches(model, batches, "activation_report", inputs)
    finally:
        for hook in hooks:
            hook.remove()
    sites = [found.report(names[quantizer], quantizer) for quantizer, found in sums.items() if found.count]
    if not sites:
        raise UncalibratedQuantizer("activation_report: no value reached a quantizer; the batches are empty.")
    _warn(sites)
    return ActivationReport(sites)


def _warn(sites: list[SiteReport]) -> None:
    clamped = [f"{s.site!r} ({s.saturated:.0%})" for s in sites if s.saturated >= SATURATED]
    empty = [repr(s.site) for s in sites if s.histogram is not None and s.histogram.step == 0 and s.sqnr < math.inf]
    said = [f"values beyond the code range at {', '.join(clamped[:8])}"] if clamped else []
    said += [f"no range at {', '.join(empty[:8])}: calibration saw one value only"] if empty else []
    if said:
        warnings.warn(
            f"activation_report: {'; '.join(said)}. Calibrate on data like these, or choose clip, qparams='dynamic' or "
            "QPP().",
            DQAWarning,
            stacklevel=4,
        )
