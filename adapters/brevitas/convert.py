"""All of Brevitas' flow in one call, and the start of training without calibration."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from brevitas.graph.calibrate import calibration_mode
from torch import nn
from torch.fx import GraphModule

from dqa_plugins.host.quantize import calibration_calls, require_float, run_calibration, split_methods
from dqa_plugins.method import Method

from .fields import require_supported
from .names import site_of
from .place import insert, place, trace
from .proxy import PluginActProxy


def quantize_model(
    model: nn.Module,
    method: Method | Mapping[str, Method | None],
    calibration: Iterable[Any],
    *,
    example_inputs: Any = None,
    weight_bits: int | None = 8,
    inputs: Callable[[Any], Any] | None = None,
) -> GraphModule:
    """Trace a model, put Brevitas' layers where the judge says, and calibrate it by Brevitas' calibration_mode.

    Args:
        model: float, that torch.fx can trace; it is not changed.
        method: for every layer, or {site or module: method or None}; what the mapping does not name stays float,
            unless it names "", which stands for all.
        calibration: what a DataLoader yields (see `dqa_plugins.batches`); targets are left out.
        example_inputs: for shapes; None: the first item.
        weight_bits: 2 to 8, per output channel, by Brevitas' own weight quantizers; None leaves weights float.
        inputs: a function item -> inputs, where those are not clear.

    Returns:
        the traced model in eval mode, with frozen quantizers.

    Raises:
        UnsupportedInput: torch.fx cannot trace the model, or it is quantized already.
        NotAMethod, InvalidArgument, UnsupportedCombination, UncalibratedQuantizer.
    """
    require_float(model, "quantize_model")
    calls, example = calibration_calls(model, calibration, inputs, example_inputs)
    everywhere, named = split_methods(method)
    for wanted in (everywhere, *named.values()):
        if wanted is not None:
            require_supported(wanted, "quantize_model")
    traced = trace(copy.deepcopy(model).eval())
    insert(traced, place(traced, everywhere, named, example.inputs), weight_bits)
    with torch.no_grad(), calibration_mode(traced):
        run_calibration(traced, calls)
    for module in traced.modules():
        if isinstance(module, PluginActProxy):
            module.quantizer.freeze()  # nothing to do, but for one that saw no data: that raises
    return traced.eval()


def start_qat(model: nn.Module) -> nn.Module:
    """Let the quantizers of an uncalibrated model collect their statistics while it trains. Changes it in place.

    Training such a model does the same at its first forward; this names every quantizer beforehand. A calibrated
    model needs neither: it trains with the scales it has.

    Raises:
        UnsupportedCombination: a quantizer is calibrated already.
    """
    for path, module in model.named_modules():
        if isinstance(module, PluginActProxy):
            module.quantizer.name = module.quantizer.name or site_of(path)
            module.quantizer.start_qat()
    return model
