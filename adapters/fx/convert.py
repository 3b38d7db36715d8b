"""What becomes of an observer in convert_fx, and all of FX's flow in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.fx import GraphModule

from dqa_plugins.host.quantize import calibration_calls, run_calibration, split_methods
from dqa_plugins.method import Method

from .config import get_qconfig, get_qconfig_mapping


def quantize_model(
    model: nn.Module,
    method: Method | Mapping[str, Method | None],
    calibration: Iterable[Any],
    *,
    example_inputs: Any = None,
    weight_bits: int | None = 8,
    inputs: Callable[[Any], Any] | None = None,
) -> GraphModule:
    """Prepare, calibrate and convert a model by FX's own functions.

    Args:
        model: float, in eval mode; it is not changed.
        method: for every layer, or {site or module: method or None}; what the mapping does not name stays float,
            unless it names "", which stands for all.
        calibration: what a DataLoader yields (see `dqa_plugins.batches`); targets are left out.
        example_inputs: for tracing shapes; None: the first item.
        weight_bits: 2 to 8; None leaves weights float.
        inputs: a function item -> inputs, where those are not clear.

    Raises:
        NotAMethod, InvalidArgument, UncalibratedQuantizer.
        UnsupportedInput: the model is quantized already.
    """
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    calls, example = calibration_calls(model, calibration, inputs, example_inputs)
    everywhere, named = split_methods(method)
    mapping = get_qconfig_mapping(everywhere, weight_bits=weight_bits)
    for name, wanted in named.items():
        mapping.set_module_name(name, None if wanted is None else get_qconfig(wanted, weight_bits=weight_bits))
    prepared = prepare_fx(model, mapping, example.inputs)
    run_calibration(prepared, calls)
    converted: GraphModule = convert_fx(prepared)
    return converted
