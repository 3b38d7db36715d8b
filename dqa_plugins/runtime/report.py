"""What was lowered, what stayed in float and why, and what the quantizers saw since."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dqa_plugins.errors import UnsupportedCombination

from .quantizer import Int8Quantizer

META = "dqa_plugins.runtime"  # key of the layers in the meta of a lowered GraphModule


@dataclass(frozen=True)
class LayerReport:
    """A convolution or linear of the model.

    Args:
        name: qualified, of the layer that holds the weight.
        kind: of operation, as torch names it.
        site: the quantizer in front; "" if there is none.
        reason: why it stayed in float; "" if it was lowered.
    """

    name: str
    kind: str
    site: str
    reason: str

    @property
    def lowered(self) -> bool:
        """Whether it computes in int8."""
        return not self.reason


@dataclass(frozen=True)
class SiteReport:
    """A quantizer that makes bytes, and what it saw in all forwards of this model (copies count for themselves).

    Args:
        name: of the site.
        calls, fallbacks: forwards; those of them that were computed in float, exactly: too many outliers, NaN, or a
            range that a byte does not hold.
        density, highest: share of values that stayed in float: of all, and of the sample (static qparams: the batch)
            with the most. 0 for methods without outliers.
    """

    name: str
    calls: int
    fallbacks: int
    density: float
    highest: float


@dataclass(frozen=True)
class LoweringReport:
    """See `lowering_report`."""

    layers: tuple[LayerReport, ...]
    sites: tuple[SiteReport, ...]

    def __str__(self) -> str:
        width = max([len(r.name) for r in self.layers] + [len(r.name) for r in self.sites], default=0)
        lines = [f"{layer.name:{width}s}  {layer.kind:8s}  {layer.reason or 'int8'}" for layer in self.layers]
        for site in self.sites:
            seen = f"density {site.density:.2%}, at most {site.highest:.2%}; {site.calls} calls"
            lines.append(f"{site.name:{width}s}  site      {seen}, {site.fallbacks} in float")
        return "\n".join(lines)


def lowering_report(model: nn.Module) -> LoweringReport:
    """The layers of a lowered model, and the density that its quantizers have seen so far.

    Args:
        model: what `lower` returned, or a copy of it.

    Raises:
        UnsupportedCombination: it is no lowered model.
    """
    layers = getattr(model, "meta", {}).get(META)
    if layers is None:
        raise UnsupportedCombination(
            f"lowering_report takes what dqa_plugins.runtime.lower returned, got {type(model).__name__}."
        )
    sites = []
    for module in model.modules():
        if isinstance(module, Int8Quantizer):
            seen = module.density
            share = seen.outliers / seen.values if seen.values else 0.0
            sites.append(SiteReport(module.site, seen.calls, seen.fallbacks, share, seen.highest))
    return LoweringReport(tuple(layers), tuple(sites))
