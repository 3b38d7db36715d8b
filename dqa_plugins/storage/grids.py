"""A quantizer's parameters and grid, laid out for rows (B, C, I): channels in front, positions side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from ..grid import Grid, QParams
from ..quantizer import ActivationQuantizer


def axis_of(quantizer: ActivationQuantizer) -> int:
    """The channel axis of what it packs; 0 where channels are not told apart (C = 1)."""
    return 0 if quantizer.num_channels is None else quantizer.channel_axis


def row_qparams(quantizer: ActivationQuantizer, x: Tensor, prediction: Tensor | None = None) -> QParams:
    """The parameters that x, (B, ...), is quantized with: (B or 1, C or 1, 1) each, in its compute dtype."""
    found = quantizer.source.qparams(quantizer, x, prediction)
    return found.map(lambda p: p.detach().reshape(1 if quantizer.method.source == "static" else p.shape[0], -1, 1))


def row_grid(quantizer: ActivationQuantizer, qparams: QParams, vectors: dict[str, Tensor] | None = None) -> Grid:
    """The grid of rows.

    Args:
        qparams: (B or 1, C or 1, 1) each.
        vectors: (C,) each, instead of the quantizer's own.
    """
    like = next(p for p in qparams if p is not None)

    def rows(vector: Tensor) -> Tensor:
        return vector.detach().to(like.device).reshape(1, -1, 1)

    own = {name: rows(v) for name, v in (quantizer.vectors if vectors is None else vectors).items()}
    if qparams.scale is None:
        return quantizer.method.grid(qparams, quantizer.signed, own)
    # as the quantizer does it: the grid of scale 1, scaled
    unit = quantizer.method.grid(QParams(torch.ones((1, 1, 1), device=like.device)), quantizer.signed, own)
    return unit.map(lambda p: p.to(like.dtype)).scaled(qparams.scale)
