"""A network whose predicted quantizers were placed by hand: connected, calibrated and frozen without an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from dqa_plugins import ActivationQuantizer
from dqa_plugins.qpp import connect
from dqa_plugins.qpp.augment import run_augmented
from dqa_plugins.qpp.bus import tap_inputs


def calibrate_connected(model: nn.Module, quantizers: Sequence[ActivationQuantizer], batches: Iterable[Tensor]) -> None:
    """Calibrate in place, augmented runs included, and freeze."""
    bus = connect(quantizers)
    assert bus is not None
    hooks = run_augmented(bus, model)
    with torch.no_grad():
        for x in batches:
            model(x)
    hooks.remove()
    for quantizer in quantizers:
        quantizer.freeze()
    tap_inputs(model, bus)
