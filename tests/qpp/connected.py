"""A network whose predicted quantizers were placed by hand: connected, calibrated and frozen without an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from dqa_plugins import ActivationQuantizer
from dqa_plugins.qpp import connect, fit, link


def calibrate_connected(model: nn.Module, quantizers: Sequence[ActivationQuantizer], batches: Iterable[Tensor]) -> None:
    """Calibrate in place, augmented runs included, fit and freeze."""
    forwards = connect(quantizers)
    assert forwards is not None
    forwards.attach(model)
    with torch.no_grad():
        for x in batches:
            model(x)
    fit(model)
    for quantizer in quantizers:
        quantizer.freeze()
    link(model)
