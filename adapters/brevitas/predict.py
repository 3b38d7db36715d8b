"""QPP in Brevitas: a model whose quantizers read from each other while calibration_mode is on, and ever after.

Brevitas' layers do not know their order of execution: the first calibration forward is preceded by one that records
nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dqa_plugins.qpp import Forwards, connect, fit, link
from dqa_plugins.qpp.augment import undisturbed
from dqa_plugins.qpp.session import positional
from dqa_plugins.quantizer import ActivationQuantizer

from .proxy import PluginActProxy


class PredictedCalibration:
    """From entering calibration_mode to leaving it, for a model with predicted quantizers.

    Args:
        model: whose calibration_mode was entered.
        proxies: its activation proxies.
    """

    def __init__(self, model: nn.Module, proxies: list[PluginActProxy]) -> None:
        self.model, self.proxies = model, proxies
        self.forwards: Forwards | None = None
        self._handle = model.register_forward_pre_hook(self._first, with_kwargs=True)

    def _first(self, model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The first forward: find the order of execution, connect, and begin its session."""
        self._handle.remove()
        quantizers = _execution_order(model, self.proxies, inputs, kwargs)
        given = positional(model, inputs, kwargs)
        self.forwards = connect(quantizers, inputs=len(given))
        if self.forwards is not None:  # else what is predicted does not run
            self.forwards.attach(model)
            # this call's hooks were collected before
            self.forwards.start(given)

    def leave(self, *, interrupted: bool) -> None:
        """Fit the predictions, unless an error cut calibration short; from now on every forward reads them."""
        self._handle.remove()
        if self.forwards is not None and not interrupted:
            fit(self.model)
            link(self.model)


def start(model: nn.Module) -> PredictedCalibration | None:
    """Called when calibration_mode is entered; None if nothing in the model is predicted."""
    proxies = [module for module in model.modules() if isinstance(module, PluginActProxy)]
    predicted = any(proxy.quantizer.predictor is not None for proxy in proxies)
    return PredictedCalibration(model, proxies) if predicted else None


def _execution_order(
    model: nn.Module, proxies: list[PluginActProxy], inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[ActivationQuantizer]:
    order: list[ActivationQuantizer] = []
    for proxy in proxies:
        proxy._order = order
    try:
        with torch.no_grad(), undisturbed(model):
            model(*inputs, **kwargs)
    finally:
        for proxy in proxies:
            proxy._order = None
    return order
