"""All of PT2E's flow in one call."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from dqa_plugins.batches import Call
from dqa_plugins.host.quantize import calibration_calls, run_calibration, split_methods
from dqa_plugins.method import Method

from .config import PluginQuantizer


def quantize_model(
    model: nn.Module,
    method: Method | Mapping[str, Method | None],
    calibration: Iterable[Any],
    *,
    example_inputs: Any = None,
    weight_bits: int | None = 8,
    inputs: Callable[[Any], Any] | None = None,
) -> GraphModule:
    """Export, prepare, calibrate and convert a model by the functions of torch.export and torchao.

    The batch is dynamic where the model and its example allow it: every tensor has two samples or more.

    Args:
        model: float, in eval mode; it is not changed. An exported program's module is taken as it is.
        method: for every layer, or {site or module: method or None}; what the mapping does not name stays float,
            unless it names "", which stands for all.
        calibration: what a DataLoader yields (see `dqa_plugins.batches`); targets are left out.
        example_inputs: for the export; None: the first item.
        weight_bits: 2 to 8; None leaves weights float.
        inputs: a function item -> inputs, where those are not clear.

    Raises:
        NotAMethod, InvalidArgument, UncalibratedQuantizer.
        UnsupportedInput: the model is quantized already.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    calls, example = calibration_calls(model, calibration, inputs, example_inputs)
    everywhere, named = split_methods(method)
    quantizer = PluginQuantizer(weight_bits=weight_bits).set_global(everywhere)
    for name, wanted in named.items():
        quantizer.set_module_name(name, wanted)
    prepared = prepare_pt2e(model if isinstance(model, GraphModule) else _exported(model, example), quantizer)
    run_calibration(prepared, calls)
    converted: GraphModule = convert_pt2e(prepared)
    return converted


def _exported(model: nn.Module, example: Call) -> GraphModule:
    positional, given = example.positional, example.keywords
    # export counts inputs in the order in which they are given, the other rooms in that of the parameters
    order = [name for name in inspect.signature(model.forward).parameters if name in given]
    keywords = {name: given[name] for name in [*order, *(name for name in given if name not in order)]}
    tensors = [x for x in (*positional, *keywords.values()) if isinstance(x, Tensor)]
    if all(x.ndim and x.shape[0] > 1 for x in tensors):
        names = [*itertools.islice(inspect.signature(model.forward).parameters, len(positional)), *keywords]
        values = (*positional, *keywords.values())
        shapes = {
            n: {0: torch.export.Dim.AUTO} if isinstance(x, Tensor) else None for n, x in zip(names, values, strict=True)
        }
        return torch.export.export(model, positional, keywords, dynamic_shapes=shapes).module()
    return torch.export.export(model, positional, keywords).module()
