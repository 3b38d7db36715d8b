"""Everything that calibration decides: clip factor, extra bits, noise, static qparams.

Runs once when a quantizer freezes, and after every training batch in the qat state (there the searches stop when the
kept samples are complete).
"""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import DQAWarning, UnsupportedCombination
from .methods import DQA, NoisyQuant
from .qparams import QParams, from_extents
from .search import channel_errors, clip_factor, draw_noise, search_noise

if TYPE_CHECKING:
    from .quantizer import ActivationQuantizer


logger = logging.getLogger(__name__)


def kept_qparams(quantizer: ActivationQuantizer, factor: Tensor | None) -> QParams:
    """The qparams each kept value would be quantized with: its sample's if dynamic or predicted, else the static ones.

    Args:
        quantizer: calibrated, not frozen.
        factor: multiplies the range (clip="mse"), or None.

    Returns:
        parameters that broadcast against `quantizer.calibration.kept`, (D, K).
    """
    method, record, signed = quantizer.method, quantizer.calibration, quantizer.signed
    taps = _taps(quantizer)
    if method.qparams != "static":  # predictions stand close to the sample's own
        found = from_extents(method, record.kept_statistic.unbind(1), signed, factor)
        return found.map(lambda p: p[record.kept_sample].T.repeat_interleave(taps if p.shape[1] > 1 else 1, 0))
    found = from_extents(method, record.reduced(method).unbind(0), signed, factor)
    return found.map(lambda p: p.repeat_interleave(taps if len(p) > 1 else 1)[:, None])


def _taps(quantizer: ActivationQuantizer) -> int:
    """Kept rows per channel: the kernel taps of a convolution for objective="output", else 1."""
    channels = quantizer.num_channels
    return len(quantizer.calibration.kept) // channels if channels else 1


@torch.no_grad()
def decide(quantizer: ActivationQuantizer, consumer_weight: Tensor | None) -> None:
    """Searches first, then static qparams. Sets the buffers of the quantizer.

    Args:
        quantizer: calibrated, not frozen.
        consumer_weight: (O, D), the next linear layer, for objective="output".
    """
    method, record, signed = quantizer.method, quantizer.calibration, quantizer.signed
    if method.signed is False and record.negative:
        warnings.warn(
            DQAWarning(
                f"{quantizer.label}: signed=False, but calibration saw {float(record.minimum):.4g}; negative values "
                "become 0. Use signed=None or True unless that is meant."
            ),
            stacklevel=4,
        )
    kept = int(record.counts[1])
    if quantizer.searched != kept:
        _search(quantizer, _objective_weight(quantizer, consumer_weight))
        quantizer.searched = kept
    if method.qparams == "static":
        found = from_extents(method, record.reduced(method).unbind(0), signed, quantizer.clip_factor)
        for name, value in zip(QParams._fields, found, strict=True):
            if value is not None:
                setattr(quantizer, name, value[0].clone() if method.granularity == "tensor" else value.clone())
    quantizer.derive_grid()


def _search(quantizer: ActivationQuantizer, weight: Tensor | None) -> None:
    method, rows, signed = quantizer.method, quantizer.calibration.kept, quantizer.signed
    taps = _taps(quantizer)
    if method.clip == "mse":
        groups = len(rows) if method.granularity == "channel" and taps == 1 else 1
        quantizer.factor = clip_factor(
            method, rows, lambda factor: kept_qparams(quantizer, factor), signed, groups=groups, weight=weight
        )
    if isinstance(method, DQA) and not quantizer.ranked:
        errors = channel_errors(method, rows, kept_qparams(quantizer, quantizer.clip_factor), signed)
        quantizer.extra_bits = extra_bits_by(errors, method)
    if isinstance(method, NoisyQuant):
        unit = draw_noise(method.seed, quantizer.name, quantizer.num_channels or 0, method.noise)
        scale = kept_qparams(quantizer, quantizer.clip_factor).scale
        if scale is None:
            raise TypeError("NoisyQuant has a scale")
        mean, amplitude = search_noise(method, unit, rows, scale, signed, taps=taps, weight=weight)
        quantizer.noise = (unit * amplitude + mean).to(rows.device)


def extra_bits_by(importance: Tensor, method: DQA, ratio: float | None = None) -> Tensor:
    """m on the round(ratio * C) channels of highest importance, ties to the lower index; 0 elsewhere.

    Args:
        importance: (C,), higher is more important.
        method: gives m, and the ratio where none is given.

    Returns:
        (C,) int64.
    """
    order = importance.argsort(descending=True, stable=True)
    extra = torch.zeros(len(importance), dtype=torch.int64, device=importance.device)
    extra[order[: round((method.ratio if ratio is None else ratio) * len(importance))]] = method.extra
    return extra


def _objective_weight(quantizer: ActivationQuantizer, weight: Tensor | None) -> Tensor | None:
    method = quantizer.method
    if not isinstance(method, NoisyQuant) or method.objective != "output" or quantizer.consumer_missing:
        return None
    if weight is None:
        raise UnsupportedCombination(
            f"{quantizer.label}: objective='output' needs the next linear layer, which only the FX and PT2E adapters "
            "know; use objective='activation' here."
        )
    kept = quantizer.calibration.kept
    if weight.shape[1] != len(kept):
        # a Linear along another axis than the channels: its rows do not share one noise value each
        logger.warning(
            "%s: the next linear layer has %d inputs, the kept values %d rows: its noise is searched on the activation",
            quantizer.label,
            weight.shape[1],
            len(kept),
        )
        return None
    return weight.detach().double().to(kept.device)
