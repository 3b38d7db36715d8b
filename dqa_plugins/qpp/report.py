"""How far predictions are from what each sample would choose, layer by layer."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dqa_plugins.batches import Pick, run_batches
from dqa_plugins.errors import MissingDependency, UncalibratedQuantizer, UnsupportedCombination
from dqa_plugins.metrics import failure_rate, prediction_error
from dqa_plugins.quantizer import ActivationQuantizer
from dqa_plugins.ranges import extents
from dqa_plugins.sites import iter_quantizers

from .features import outside

SOURCES = ("static", "predicted", "dynamic")


@dataclass
class LayerReport:
    """One quantizer on the samples given; each source is applied to the identical tensor.

    Attributes:
        site: its name.
        reads: the site whose features it reads.
        elements: values per sample.
        target: density asked for; nan where the method is not Dense+Sparse.
        densities: by source, (M,), share of each sample's values outside the range.
        errors: by source, (M,), error of the parameters relative to the sample's own.
        reason: why it kept static parameters, or "".
    """

    site: str
    reads: str
    elements: int
    target: float
    reason: str
    densities: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def small(self) -> bool:
        """Too few elements for the target: a step of one element is more than a tenth of it."""
        return self.elements < 10 / self.target if self.target > 0 else True

    def failure_rate(self, source: str, share: float) -> float:
        """FR with a margin of share * target."""
        return failure_rate(self.densities[source], self.target, share * self.target)


@dataclass
class QPPReport:
    """Predicted against static and dynamic parameters, on the tensors of one quantized model."""

    layers: list[LayerReport]

    def failure_rate(self, source: str = "predicted", share: float = 0.5, *, small: bool = False) -> float:
        """FR over all (sample, layer) pairs; the paper's FR(0.5) is share=0.5 at a target density of 1%.

        Args:
            source: "static", "predicted" or "dynamic" (the floor: ties).
            share: margin, as a share of the target.
            small: of the layers with fewer than 10 / density elements, else of the others.
        """
        chosen = [x for x in self.layers if x.target > 0 and x.small == small]
        pairs = sum(len(x.densities[source]) for x in chosen)
        failures = sum(x.failure_rate(source, share) * len(x.densities[source]) for x in chosen)
        return failures / pairs if pairs else float("nan")

    def as_dict(self) -> dict[str, Any]:
        """JSON-compatible."""
        rates = {
            f"{source}_fr{name}": self.failure_rate(source, share)
            for source in SOURCES
            for name, share in (("05", 0.5), ("1", 1.0))
        }
        rows = [
            {
                "site": x.site,
                "reads": x.reads,
                "elements": x.elements,
                "fallback": x.reason,
                **{f"{s}_error": float(x.errors[s].mean()) for s in SOURCES[:2]},
                **{f"{s}_density": float(x.densities[s].mean()) for s in SOURCES},
            }
            for x in self.layers
        ]
        return {**rates, "layers": rows}

    def __str__(self) -> str:
        width = max([len(x.site) for x in self.layers] + [5])
        head = f"{'layer':{width}}  elements  error %: static  predicted   FR(0.5) %: static  predicted  dynamic"
        rows = [head]
        for x in self.layers:
            row = f"{x.site:{width}}  {x.elements:8d}  {x.errors['static'].mean():15.1%}  "
            row += f"{x.errors['predicted'].mean():9.1%}"
            if x.target > 0:
                rates = [x.failure_rate(source, 0.5) for source in SOURCES]
                row += f"   {rates[0]:17.1%}  {rates[1]:9.1%}  {rates[2]:7.1%}" + (
                    "  (few elements)" if x.small else ""
                )
            rows.append(row + (f"  static: {x.reason}" if x.reason else ""))
        if any(x.target > 0 and not x.small for x in self.layers):
            for name, share in (("FR(1)", 1.0), ("FR(0.5)", 0.5)):
                totals = [f"{source} {self.failure_rate(source, share):.2%}" for source in SOURCES]
                rows.append(f"{name}: " + ", ".join(totals))
        return "\n".join(rows)

    def plot(self, path: str | os.PathLike[str], title: str = "") -> None:
        """Error per layer (the paper's figure 7) and distribution of the density (figures 8 and 9), as an image.

        Args:
            path: of the image; its suffix is the format.
            title: names model and data.

        Raises:
            MissingDependency: matplotlib is not installed.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingDependency("qpp_report(...).plot needs matplotlib: pip install matplotlib.") from error
        figure = Figure(figsize=(12, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        for source in SOURCES[:2]:
            mean = torch.tensor([float(x.errors[source].mean()) for x in self.layers]) * 100
            spread = torch.tensor([float(x.errors[source].std(correction=0)) for x in self.layers]) * 100
            places = range(len(mean))
            left.plot(places, mean, label=source)
            left.fill_between(places, (mean - spread).clamp(min=0), mean + spread, alpha=0.2)
        left.set(xlabel="quantized layer", ylabel="error of the parameters, %", title="against dynamic")
        left.legend()
        chosen = [x for x in self.layers if x.target > 0 and not x.small]
        if chosen:
            target = chosen[0].target * 100
            for source in SOURCES[:2]:
                values = torch.cat([x.densities[source] for x in chosen]) * 100
                right.hist(values.clamp(max=4 * target).numpy(), bins=80, alpha=0.55, label=source)
            right.axvline(target, color="black")
            right.legend()
            right.set(xlabel=f"density, % (target {target:g}; right edge: all above)", ylabel="(sample, layer) pairs")
        figure.suptitle(title)
        figure.savefig(path, dpi=130)


@torch.no_grad()
def qpp_report(model: nn.Module, batches: Iterable[Any], *, inputs: Pick = None) -> QPPReport:
    """Run a converted model and compare predicted qparams with static and dynamic ones.

    Args:
        model: converted by any adapter, with QPP quantizers.
        batches: held-out samples, what a DataLoader yields, see `batches`.
        inputs: a function batch -> inputs, where that is not clear.

    Raises:
        UncalibratedQuantizer: a quantizer is not frozen, or there are no batches.
        UnsupportedInput: a single batch was given, or one that does not fit the model.
        UnsupportedCombination: no quantizer of the model is predicted.
    """
    layers: dict[nn.Module, LayerReport] = {}
    found: dict[nn.Module, dict[str, list[Tensor]]] = {}
    for name, quantizer in iter_quantizers(model):
        if quantizer.predictor is None:
            continue
        if quantizer.state != "frozen":
            raise UncalibratedQuantizer(f"'{name}' is in state {quantizer.state!r}: convert the model first.")
        target = quantizer.method.target_density or float("nan")
        layers[quantizer] = LayerReport(name, quantizer.predictor.site or name, 0, target, quantizer.predictor.reason)
        found[quantizer] = {f"{kind} {source}": [] for kind in ("density", "error") for source in SOURCES}
    if not layers:
        raise UnsupportedCombination("qpp_report: no quantizer of this model has qparams=QPP(...).")

    def note(module: nn.Module, args: tuple[Tensor, ...], _: Tensor) -> None:
        if isinstance(module, ActivationQuantizer) and args[0].numel():
            layers[module].elements = args[0][0].numel()
            _compare(module, args[0], args[1] if len(args) > 1 else None, found[module])

    hooks = [quantizer.register_forward_hook(note) for quantizer in layers]
    try:
        run_batches(model, batches, "qpp_report", inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for module, report in layers.items():
        rows = {key: torch.cat(values) for key, values in found[module].items() if values}
        report.densities = {source: rows[f"density {source}"] for source in SOURCES if rows}
        report.errors = {source: rows[f"error {source}"] for source in SOURCES if rows}
    return QPPReport([layer for layer in layers.values() if layer.errors])


def _compare(
    quantizer: ActivationQuantizer, x: Tensor, prediction: Tensor | None, found: dict[str, list[Tensor]]
) -> None:
    predictor, axis = quantizer.predictor, quantizer.channel_axis
    if predictor is None:
        return
    if prediction is None:
        prediction = predictor.predict(quantizer, x)
    own = torch.stack(extents(x, quantizer.method.replace(signed=quantizer.signed), quantizer.signed, axis), 1)
    static = predictor.static.reshape(1, -1, predictor.groups).expand_as(own).to(own.dtype)
    count = x[0].numel()
    for source, range_ in zip(SOURCES, (static, prediction, own), strict=True):
        found[f"density {source}"].append((outside(x, range_, axis) / count).cpu())
        found[f"error {source}"].append(prediction_error(range_, own).cpu())
