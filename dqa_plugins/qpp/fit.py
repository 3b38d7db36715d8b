"""From calibration rows to predictors: for all quantizers of a model at once, in order of execution.

What a quantized tensor shows depends on the prediction of its quantizer, so each quantizer is fitted on the summaries
that the leave-one-out predictions of those before it would have left.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from dqa_plugins.errors import DQAWarning
from dqa_plugins.progress import counted
from dqa_plugins.quantizer import ActivationQuantizer
from dqa_plugins.ranges import resolved
from dqa_plugins.sites import iter_quantizers

from .features import PAPER_FEATURES, SCALE, SUMMARY_FEATURES, site_size
from .predictor import Predictor
from .radial import radial_basis
from .regression import Fit, least_squares, rank, ridge

FEW = 8  # originals: below, no regression
SMALL = 32  # originals: below, only mean and maximum
_MEAN_AND_MAX = (PAPER_FEATURES - 2, PAPER_FEATURES - 1)
_OFFSETS = torch.linspace(-0.3, 0.5, 81, dtype=torch.float64)


@torch.no_grad()
def fit(model: nn.Module) -> None:
    """Fit every predicted quantizer of a calibrated model that is not frozen yet, in order of execution.

    The rooms' convert calls it, and so does the end of Brevitas' calibration_mode.

    Args:
        model: prepared by any adapter, or with quantizers placed by hand; or a single quantizer.

    Warns (DQAWarning): quantizers that keep their static parameters, with the reason.
    """
    summaries: dict[str, tuple[Tensor, Tensor]] = {}
    fallen: dict[str, list[str]] = {}
    wanted = [
        (name, quantizer, quantizer.predictor)
        for name, quantizer in iter_quantizers(model)
        if quantizer.predictor is not None and not quantizer.predictor.fitted and quantizer.calibration.count
    ]
    last = {earlier: name for name, _, predictor in wanted for earlier in predictor.history}  # who reads it last
    for name, quantizer, predictor in counted(wanted, what="fitting predictions", unit="quantizer"):
        earlier = {name: summaries.get(name) for name in predictor.history}
        same = [name for name, rows in earlier.items() if rows and torch.equal(rows[0], predictor.record.samples)]
        predictor.history = tuple(same)  # summaries of other rows than its own say nothing of a sample
        reason = _fit_one(quantizer, predictor, summaries)
        # a site's own quantizer takes its statistic from the tensor at hand, whatever a fit would say
        predictor.reason = "" if predictor.reads_itself(quantizer.name) else reason
        for before in [*earlier, quantizer.name]:
            if last.get(before, name) == name:  # memory does not grow with the depth of the network
                summaries.pop(before, None)
        if predictor.reason:
            fallen.setdefault(predictor.reason, []).append(name or "unnamed quantizer")
    if fallen:
        said = [f"at {', '.join(map(repr, names))}: {reason}" for reason, names in fallen.items()]
        warnings.warn(DQAWarning(f"QPP: static parameters {'; '.join(said)}."), stacklevel=3)


def targets_of(quantizer: ActivationQuantizer) -> Tensor:
    """(M, S, G) of the statistics that the resolved sign needs."""
    recorded = quantizer.predictor.record.statistic.unbind(1)
    return torch.stack(resolved(quantizer.method, recorded, quantizer.signed), 1)


def _fit_one(quantizer: ActivationQuantizer, predictor: Predictor, summaries: dict[str, tuple[Tensor, Tensor]]) -> str:
    record, mode = predictor.record, predictor.mode
    if predictor.other_rows or record.count == 0:
        site = predictor.site
        predictor.keep_static(quantizer)
        return f"the first dimension is not that of site '{site}', so samples cannot be told apart"
    predictor.own.signed = quantizer.signed
    wanted = targets_of(quantizer)
    groups = wanted.shape[2]
    targets = wanted.flatten(1).double()
    logs = _logarithmic(targets, mode)
    unit = _unit(predictor)
    scaled = torch.where(logs, targets.clamp(min=1e-30).log(), targets / unit)
    floor = _floor(targets)
    scaled = torch.where(logs, torch.maximum(scaled, floor.log()), scaled)
    design, used = _design(predictor, summaries)
    reason = _degenerate(predictor, design, used, quantizer.method.prediction.intercept)
    basis = None
    if not reason:
        if mode == "paper":
            found = least_squares(design[:, used], scaled, quantizer.method.prediction.intercept)
        else:
            if len(used) >= site_size(mode):
                basis = radial_basis(record.features)
            found = ridge(design[:, used], scaled, record.samples, basis and basis(record.features))
            losing = found.error >= found.base
            if bool(losing.all()) and bool((found.base > 0).any()):
                reason = "left out of the fit, samples are predicted no better than by the mean"
    if reason:
        found = _nothing(scaled, len(used))
    weight = torch.zeros(design.shape[1], scaled.shape[1], dtype=torch.float64, device=scaled.device)
    weight[used] = found.weight[: len(used)]
    bumps = None
    if basis is not None and bool(found.weight[len(used) :].any()):
        bumps = (basis.rate, basis.centres, basis.mix @ found.weight[len(used) :])
    # a prediction that has no range to move in is the static statistic
    low, high = (predictor.static_statistic(quantizer),) * 2 if reason else _limits(targets, logs, floor)
    bias = found.bias if reason or mode == "paper" else found.bias + _offset(quantizer, found, logs, unit, (low, high))
    shift = bias - found.bias
    held_out = _bounded(found.held_out + shift, logs, unit, low, high).reshape(wanted.shape)
    if mode == "extended":
        used_range = wanted if predictor.reads_itself(quantizer.name) else held_out
        summaries[quantizer.name] = (record.samples, record.summaries(used_range))
    predictor.static, predictor.groups = predictor.static_statistic(quantizer), groups
    predictor.finish(weight, bias, logs, (low, high), bumps)
    return reason


def _design(predictor: Predictor, summaries: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, list[int]]:
    """(M, K) features, and which columns the fit may use."""
    record, size = predictor.record, site_size(predictor.mode)
    parts = [record.features]
    used = list(range(size))
    few = int(record.samples.unique().numel()) < SMALL and predictor.mode == "extended"
    for position, name in enumerate(predictor.history):
        values = summaries[name][1]
        if position < len(predictor.history) - 1:
            values = values[:, :SUMMARY_FEATURES]
        start = sum(part.shape[1] for part in parts)
        parts.append(values.to(record.features.device))
        used += range(start, start + values.shape[1])
    return torch.cat(parts, 1), list(_MEAN_AND_MAX) if few else used


def _degenerate(predictor: Predictor, design: Tensor, used: list[int], intercept: bool) -> str:
    """Why no regression is possible; "" if it is."""
    if predictor.site == "":
        return "no site of QPP(sites=...) runs before"
    originals = int(predictor.record.samples.unique().numel())
    if originals < FEW:
        return f"{originals} calibration samples are too few to fit (at least {FEW})"
    features = design[:, : site_size(predictor.mode)]
    if bool((features.std(0) <= 1e-9 * (1e-12 + features.abs().amax(0))).all()):
        return f"the features of site '{predictor.site}' are constant over the calibration samples"
    if predictor.mode == "paper":
        full = torch.cat([features, torch.ones_like(features[:, :1])], 1) if intercept else features
        if originals <= full.shape[1] + 1:
            return f"{originals} calibration samples are too few for {full.shape[1]} coefficients"
        if rank(full) < full.shape[1]:
            return f"the features of site '{predictor.site}' are linearly dependent (a singular system)"
    return ""


def _logarithmic(targets: Tensor, mode: str) -> Tensor:
    if mode == "paper":
        return torch.zeros(targets.shape[1], dtype=torch.bool, device=targets.device)
    return (targets > 0).double().mean(0) >= 0.9


def _floor(targets: Tensor) -> Tensor:
    """A small positive value per target: half the smallest positive one seen."""
    positive = torch.where(targets > 0, targets, torch.inf)
    least = positive.amin(0)
    return torch.where(torch.isfinite(least), least / 2, torch.full_like(least, 1e-12)).clamp(min=1e-12)


def _limits(targets: Tensor, logs: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """The range of predictions: what calibration saw, widened by its width and by a factor of four."""
    least, most = targets.amin(0), targets.amax(0)
    width = (most - least).clamp(min=1e-12)
    positive = torch.maximum(least, floor) / 4
    low = torch.where(logs | (least > 0), positive, least - width)
    return low, torch.where(most > 0, most * 4, most + width)


def _unit(predictor: Predictor) -> Tensor:
    """(M, 1): what targets that are not logarithms are measured in."""
    features = predictor.record.features
    if predictor.mode == "paper":
        return torch.ones_like(features[:, :1])
    return features[:, SCALE : SCALE + 1].exp()


def _bounded(linear: Tensor, logs: Tensor, unit: Tensor, low: Tensor, high: Tensor) -> Tensor:
    value = torch.where(logs, linear.clamp(-80, 80).exp(), linear * unit)
    return torch.minimum(torch.maximum(value, low), high)


def _nothing(targets: Tensor, features: int) -> Fit:
    """A regression that says zero."""
    zero = torch.zeros_like(targets[0])
    return Fit(targets.new_zeros(features, targets.shape[1]), zero, torch.zeros_like(targets), zero, zero)


def _offset(
    quantizer: ActivationQuantizer, found: Fit, logs: Tensor, unit: Tensor, limits: tuple[Tensor, Tensor]
) -> Tensor | float:
    """What is added to the bias, from leave-one-out predictions, where too small a range costs more than too large."""
    predictor, method = quantizer.predictor, quantizer.method
    if predictor is None or not bool(logs.any()):
        return 0.0
    record = predictor.record
    shape = (record.count, -1, record.statistic.shape[2])
    sigma = found.error.sqrt()
    if not method.target_density:
        # a maximum that is predicted too low clips: one standard error up
        return sigma * logs
    losses = []
    for offset in _OFFSETS.tolist():
        prediction = _bounded(found.held_out + offset * logs, logs, unit, *limits).reshape(shape)
        share = record.share_beyond(prediction) / max(method.target_density, 1e-6)
        losses.append(_density_loss(share))
    best = int(torch.stack(losses).argmin())
    return float(_OFFSETS[best]) * logs.double()


def _density_loss(share: Tensor) -> Tensor:
    """share: (M,) density over its target. Failures at 0.5 and at 1 (the second weigh more), softly."""
    ratio = share.clamp(min=1e-3)
    over, under = torch.sigmoid((ratio - 1.5) / 0.1), torch.sigmoid((0.5 - ratio) / 0.1)
    far = torch.sigmoid((ratio - 2.0) / 0.1)
    return (over + under + 3 * far + 0.05 * (ratio.log() ** 2)).mean()
