"""Calibration strips: short runs of neighbouring values, from which entropy tables are made.

A quantizer's own kept values lie far apart, so they cannot tell how neighbours depend on each other; and freezing
forgets them. Strips are runs of 64 neighbours at evenly spaced places, with the statistics of the whole sample beside
them, so that dynamic qparams are those of the real tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import functional as F
from ..methods import DQA, DenseSparse, Method, NoisyQuant
from ..qparams import QParams, from_extents
from ..quantizer import ActivationQuantizer
from ..statistics import extents

RUN = 64
STRIP_VALUES = 2**19  # kept per quantizer, over all samples
STRIP_SAMPLES = 64  # at most; fewer where samples are large
_SHARE = 16  # no sample takes more than one part in so many


@dataclass
class Strips:
    """What is kept of the first samples.

    Args:
        values: (S, C, L) in the compute dtype.
        extents: (S, G) each, see `statistics.extents`; used by dynamic qparams.
    """

    values: Tensor
    extents: tuple[Tensor, ...]


def rows_of(x: Tensor, quantizer: ActivationQuantizer) -> Tensor:
    """x, (B, ...), as (B, C, I): channels in front of positions; C = 1 where the method ignores channels."""
    if x.ndim == 1:
        x = x.unsqueeze(1)
    if quantizer.num_channels is None:
        return x.reshape(x.shape[0], 1, x[0].numel() if len(x) else 0)
    rows = x.movedim(quantizer.channel_axis, 1)
    inner = 1
    for size in rows.shape[2:]:
        inner *= size
    return rows.reshape(rows.shape[0], rows.shape[1], inner)


@torch.no_grad()
def take_strips(
    x: Tensor, quantizer: ActivationQuantizer, samples: int = STRIP_SAMPLES, source: Tensor | None = None
) -> Strips:
    """Strips of the first `samples` samples of x, (B, ...).

    Args:
        source: what dynamic parameters are taken from; None: x.
    """
    x = x.detach()[:samples]
    source = x if source is None else source.detach()[:samples]
    if x.ndim == 1:
        x, source = x.unsqueeze(1), source.unsqueeze(1)
    rows = rows_of(x, quantizer)
    channels, inner = rows.shape[1:]
    runs = -(-inner // RUN)
    wanted = max(1, STRIP_VALUES // (_SHARE * max(channels, 1) * RUN))
    if runs > wanted:
        starts = torch.arange(wanted) * (inner // RUN) // wanted * RUN
        rows = rows[..., (starts[:, None] + torch.arange(RUN)).ravel().to(rows.device)]
    fitting = max(1, STRIP_VALUES // max(channels * rows.shape[2], 1))
    source = source[:fitting]
    values = rows[:fitting].to(F.compute_dtype(x.dtype)).cpu().clone()
    found = extents(source, quantizer.method, quantizer.method.signed, quantizer.channel_axis)
    return Strips(values, tuple(e.cpu() for e in found))


def samples_wanted(strips: Strips | None) -> int:
    """How many samples more should be kept."""
    if strips is None:
        return STRIP_SAMPLES
    taken = len(strips.values)
    room = (STRIP_VALUES - strips.values.numel()) // max(strips.values[0].numel(), 1)
    return max(0, min(STRIP_SAMPLES - taken, room)) if taken else STRIP_SAMPLES


def join(first: Strips | None, second: Strips) -> Strips:
    """Strips of both; those of another length (other spatial size) are left out."""
    if first is None:
        return second
    if first.values.shape[1:] != second.values.shape[1:]:
        return first
    left = samples_wanted(first)
    second = Strips(second.values[:left], tuple(e[:left] for e in second.extents))
    return Strips(
        torch.cat([first.values, second.values]),
        tuple(torch.cat(pair) for pair in zip(first.extents, second.extents, strict=True)),
    )


def strip_qparams(strips: Strips, quantizer: ActivationQuantizer) -> QParams:
    """The qparams of each strip, which broadcast against (S, C, L)."""
    method, signed = quantizer.method, quantizer.signed
    if method.qparams == "dynamic":
        factor = quantizer.factor.cpu() if quantizer.factor.numel() else None
        found = from_extents(method, strips.extents, signed, factor)
        return found.map(lambda p: p.unsqueeze(-1))  # (S, G, 1)
    static = QParams(*(p.cpu() if p.numel() else None for p in (quantizer.scale, quantizer.lower, quantizer.upper)))
    return static.map(lambda p: p.reshape(1, -1, 1))


def whole_codes(x: Tensor, method: Method, qparams: QParams, signed: bool, extra: Tensor, noise: Tensor) -> Tensor:
    """The whole code q of every value, by `functional`.

    Args:
        x: (B, C, I).
        qparams: broadcast against x.
        extra: (C,) int64, m.
        noise: (C,), NoisyQuant.

    Returns:
        int32, the shape of x; outliers of Dense+Sparse have code 0.
    """
    scale, lower, upper = qparams
    bits = method.bits
    if isinstance(method, DenseSparse):
        return F.dense_sparse_quantize(x, lower, upper, bits)[0].to(torch.int32)  # type: ignore[arg-type]
    if scale is None:
        if lower is None or upper is None:
            raise TypeError("qparams hold neither a scale nor thresholds")
        compute = F.compute_dtype(x.dtype)
        step, zero_point = F.affine_qparams(lower.to(compute), upper.to(compute), bits)
        return F.direct_quantize(x, step, bits, zero_point=zero_point).to(torch.int32)
    if isinstance(method, DQA):
        codes, errors = F.dqa_quantize(x, scale, extra, bits, signed=signed, channel_axis=1)
        shift = extra.clamp(min=0).to(torch.int32).view(1, -1, 1).to(x.device)
        return (codes.to(torch.int32) << shift) + errors.to(torch.int32)
    if isinstance(method, NoisyQuant):
        return F.noisyquant_quantize(x, scale, noise, bits, signed=signed, channel_axis=1).to(torch.int32)
    return F.direct_quantize(x, scale, bits, signed=signed).to(torch.int32)
