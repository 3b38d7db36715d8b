"""QPP in Brevitas: a model whose quantizers read from each other while calibration_mode is on, and ever after.

Brevitas' layers do not know their order of execution: the first calibration forward is preceded by one that records
nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dqa_plugins.qpp.augment import Foreign, Handles, augmented
from dqa_plugins.qpp.bus import Bus, connect, tap_inputs
from dqa_plugins.quantizer import ActivationQuantizer

from .proxy import PluginActProxy


def start(model: nn.Module) -> Handles | None:
    """Called when calibration_mode is entered.

    Returns:
        what to remove when it is left; None if nothing in the model is predicted.
    """
    proxies = [module for module in model.modules() if isinstance(module, PluginActProxy)]
    if not any(proxy.quantizer.predictor is not None for proxy in proxies):
        return None
    found: list[Bus] = []

    def before(module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if ordering:
            return
        if not found:
            quantizers = _execution_order(module, proxies, inputs, kwargs, ordering)
            bus = connect(quantizers, inputs=len(inputs))
            if bus is None:  # what is predicted does not run
                return
            tap_inputs(module, bus)
            found.append(bus)
        found[0].begin(inputs)

    def after(module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        changed = augmented(found[0], inputs) if found and not ordering else None
        if changed is not None:
            with found[0].augment(), torch.no_grad(), Foreign(module):
                module(*changed, **kwargs)

    ordering: list[bool] = []
    return Handles(
        [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, with_kwargs=True),
        ]
    )


def _execution_order(
    model: nn.Module, proxies: list[PluginActProxy], inputs: tuple[Any, ...], kwargs: dict[str, Any], busy: list[bool]
) -> list[ActivationQuantizer]:
    order: list[ActivationQuantizer] = []
    busy.append(True)
    for proxy in proxies:
        proxy._order = order
    try:
        with torch.no_grad(), Foreign(model):
            model(*inputs, **kwargs)
    finally:
        busy.clear()
        for proxy in proxies:
            proxy._order = None
    return order
