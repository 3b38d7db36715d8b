"""Everything that calibration decides, as pure functions: method and record in, what freezing sets out.

Runs once when a quantizer freezes, and after every training batch in the qat state (there the searches stop when the
kept samples are complete).
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from .calibration import CalibrationRecord
from .errors import UnsupportedCombination
from .grid import Grid, QParams
from .method import Method
from .ranges import qparams_of
from .search import Kept, clip_factor

logger = logging.getLogger(__name__)


def static_qparams(method: Method, record: CalibrationRecord, signed: bool, factor: Tensor | None) -> QParams:
    """Qparams reduced over calibration: () for granularity "tensor", (C,) for "channel"."""
    found = qparams_of(method, record.reduced(method).unbind(0), signed, factor)
    return found.map(lambda p: p[0].clone() if method.granularity == "tensor" else p.clone())


def kept_grid(method: Method, record: CalibrationRecord, signed: bool, factor: Tensor | None, taps: int) -> Grid:
    """The plain grid of each kept value: its sample's if dynamic or predicted, else the static one.

    Args:
        factor: multiplies the range (clip="mse"), or None.
        taps: kept rows per channel.

    Returns:
        a grid that broadcasts against `record.kept`, (D, K).
    """
    if method.qparams != "static":  # predictions stand close to the sample's own
        found = qparams_of(method, record.kept_statistic.unbind(1), signed, factor)
        found = found.map(lambda p: p[record.kept_sample].T.repeat_interleave(taps if p.shape[1] > 1 else 1, 0))
    else:
        found = qparams_of(method, record.reduced(method).unbind(0), signed, factor)
        found = found.map(lambda p: p.repeat_interleave(taps if len(p) > 1 else 1)[:, None])
    return method.grid(found, signed, {})


@torch.no_grad()
def kept_values(
    method: Method, record: CalibrationRecord, signed: bool, *, channels: int, site: str, weight: Tensor | None = None
) -> tuple[Tensor | None, Kept]:
    """The clip factor that was searched, if any, and the values that further searches work on.

    Args:
        record: of the calibration data.
        signed: resolved.
        channels: C, 0 where the method does not look at channels.
        site: the site's name, which NoisyQuant draws its noise with.
        weight: (O, D) float64, the next linear layer, where its output is what counts.
    """
    rows = record.kept
    taps = len(rows) // channels if channels else 1
    factor = None
    if method.clip == "mse":
        groups = len(rows) if method.granularity == "channel" and taps == 1 else 1
        factor = clip_factor(
            rows,
            lambda trial: kept_grid(method, record, signed, trial, taps),
            method.clip_resolution,
            groups=groups,
            weight=weight,
        )
    return factor, Kept(rows, kept_grid(method, record, signed, factor, taps), channels, site, weight)


def next_layer_weight(weight: Tensor | None, record: CalibrationRecord, label: str) -> Tensor | None:
    """(O, D) float64, the next linear layer's weight on the device of the kept values; None where it does not fit them.

    Raises:
        UnsupportedCombination: there is none.
    """
    if weight is None:
        raise UnsupportedCombination(
            f"{label}: objective='output' needs the next linear layer, which only the FX and PT2E adapters know; use "
            "objective='activation' here."
        )
    if weight.shape[1] == len(record.kept):
        return weight.detach().double().to(record.kept.device)
    # a Linear along another axis than the channels: its rows do not share one noise value each
    logger.warning(
        "%s: the next linear layer has %d inputs, the kept values %d rows: its noise is searched on the activation",
        label,
        weight.shape[1],
        len(record.kept),
    )
    return None
