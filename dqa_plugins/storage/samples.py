"""Calibration samples: short runs of neighbouring values, from which entropy tables are made.

A quantizer's own kept values lie far apart, so they cannot tell how neighbours depend on each other; and freezing
forgets them. Here runs of 64 neighbours at evenly spaced positions are kept, with the statistics of the whole tensor
beside them, so that dynamic qparams are those of the real tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..grid import Grid
from ..quantizer import ActivationQuantizer
from ..ranges import extents, qparams_of
from ..rounding import compute_dtype
from .coder import codec
from .grids import axis_of, row_grid

RUN = 64
MAX_VALUES = 2**19  # kept per quantizer, over all samples
MAX_SAMPLES = 64  # fewer where they are large
_LARGEST_SHARE = 16  # a sample takes at most this part of the values


@dataclass
class CalibrationSamples:
    """What is kept of the first samples.

    Args:
        values: (S, C, L) in the compute dtype.
        extents: (S, G) each, see `ranges.extents`; () where qparams are static.
        others: samples of another length were left out.
    """

    values: Tensor
    extents: tuple[Tensor, ...]
    others: bool = False


@torch.no_grad()
def take_samples(x: Tensor, quantizer: ActivationQuantizer, source: Tensor | None = None) -> CalibrationSamples:
    """Runs of values of the first samples of x, (B, ...), which holds values.

    Args:
        source: what dynamic parameters are taken from; None: x. Predicted ones count as dynamic here: only how long a
            code gets depends on these samples.
    """
    x = x.detach()[:MAX_SAMPLES]
    source = x if source is None else source.detach()[:MAX_SAMPLES]
    if x.ndim == 1:
        x, source = x.unsqueeze(1), source.unsqueeze(1)
    rows = codec.rows(x, axis_of(quantizer))
    channels, inner = rows.shape[1:]
    runs = -(-inner // RUN)
    wanted = max(1, MAX_VALUES // (_LARGEST_SHARE * max(channels, 1) * RUN))
    if runs > wanted:
        starts = torch.arange(wanted) * (inner // RUN) // wanted * RUN
        rows = rows[..., (starts[:, None] + torch.arange(RUN)).ravel().to(rows.device)]
    fitting = max(1, MAX_VALUES // max(channels * rows.shape[2], 1))
    source = source[:fitting]
    values = rows[:fitting].to(compute_dtype(x.dtype)).cpu().clone()
    if quantizer.method.source == "static":
        return CalibrationSamples(values, ())
    found = extents(source, quantizer.method, quantizer.method.signed, quantizer.channel_axis)
    return CalibrationSamples(values, tuple(e.cpu() for e in found))


def samples_wanted(kept: CalibrationSamples | None) -> int:
    """How many samples more should be kept."""
    if kept is None:
        return MAX_SAMPLES
    taken = len(kept.values)
    room = (MAX_VALUES - kept.values.numel()) // max(kept.values[0].numel(), 1)
    return max(0, min(MAX_SAMPLES - taken, room)) if taken else MAX_SAMPLES


def join(first: CalibrationSamples | None, second: CalibrationSamples) -> CalibrationSamples:
    """The samples of both; those of another length (other spatial size) are left out."""
    if first is None:
        return second
    if first.values.shape[1:] != second.values.shape[1:]:
        return replace(first, others=True)
    left = samples_wanted(first)
    second = CalibrationSamples(second.values[:left], tuple(e[:left] for e in second.extents))
    return CalibrationSamples(
        torch.cat([first.values, second.values]),
        tuple(torch.cat(pair) for pair in zip(first.extents, second.extents, strict=True)),
        first.others,
    )


def sample_grid(
    samples: CalibrationSamples, quantizer: ActivationQuantizer, vectors: dict[str, Tensor] | None = None
) -> Grid:
    """The grid of the kept values, (S, C, L).

    Args:
        vectors: (C,) each, instead of the quantizer's own.
    """
    if quantizer.method.source != "static":
        factor = None if quantizer.clip_factor is None else quantizer.clip_factor.cpu()
        found = qparams_of(quantizer.method, samples.extents, quantizer.signed, factor)
        return row_grid(quantizer, found.map(lambda p: p.unsqueeze(-1)), vectors)  # (S, G, 1)
    dtype = samples.values.dtype
    return row_grid(quantizer, quantizer.static.map(lambda p: p.cpu().to(dtype).reshape(1, -1, 1)), vectors)
