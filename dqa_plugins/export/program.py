"""A converted model as a torch.export program: what every exporter starts from.

`make_program` gives one node per quantizer call and one per quantized weight (see `operators`), `to_exported_program`
the same in plain aten operations.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from dqa_plugins.errors import ExportFailed, UncalibratedQuantizer, UnsupportedCombination
from dqa_plugins.host.weights import weight_sites
from dqa_plugins.progress import busy
from dqa_plugins.qpp.session import forwards_of
from dqa_plugins.sites import iter_quantizers

from .expand import expand
from .file import in_one_sentence
from .frozen import freeze_for_export


def as_inputs(example_inputs: Any) -> tuple[Any, ...]:
    """The example inputs as a tuple; a single tensor becomes a tuple of one."""
    if isinstance(example_inputs, Tensor):
        return (example_inputs,)
    if not isinstance(example_inputs, Sequence) or isinstance(example_inputs, str):
        raise ExportFailed(f"example_inputs is a tensor or a tuple of them; got {type(example_inputs).__name__}.")
    return tuple(example_inputs)


@torch.no_grad()
def exportable(model: nn.Module, example_inputs: Any) -> nn.Module:
    """A copy of a converted model that torch.export takes: our operators for weights and quantizers, eval mode.

    Raises:
        UncalibratedQuantizer: a quantizer is not frozen; the model was not converted.
        UnsupportedCombination: the model packs activations into bytes.
    """
    for name, quantizer in iter_quantizers(model):
        if quantizer.state != "frozen":
            raise UncalibratedQuantizer(
                f"'{name}' is in state {quantizer.state!r}: export takes converted models. Calibrate and convert the "
                "model (or freeze the quantizer) first."
            )
    for path, module in model.named_modules():
        # asked by name: importing storage would compile its kernels
        if type(module).__module__.startswith("dqa_plugins.storage."):
            raise UnsupportedCombination(
                f"'{path}' packs a stored activation into bytes ({type(module).__name__}), which no export format has. "
                "Export the model without stored activations: quantize it with an adapter."
            )
    ready = copy.deepcopy(model)
    for site in list(weight_sites(ready)):
        site.replace()
    # GraphModules made by torch.export refuse eval(); they are exported in the mode they are in
    if ready.training and not hasattr(ready, "_exported_training"):
        try:
            ready.eval()
        except NotImplementedError:
            ready = copy.deepcopy(ready)
    frozen = freeze_for_export(ready, as_inputs(example_inputs))
    if isinstance(frozen, torch.fx.GraphModule) and forwards_of(frozen):
        # torch.export runs a GraphModule node by node, without its forward hooks, in which predictions begin
        frozen.__class__ = type("Traced", (nn.Module,), {"forward": type(frozen).forward})
    return frozen


def _dynamic_shapes(inputs: tuple[Any, ...], dynamic_batch: bool) -> tuple[Any, tuple[Any, ...]]:
    """Dynamic shapes with one batch dimension, and inputs whose batch is not specialised (at least two samples)."""
    tensors = [x for x in inputs if isinstance(x, Tensor) and x.ndim > 0]
    if not dynamic_batch or not tensors:
        return None, inputs
    size = tensors[0].shape[0]
    batch = torch.export.Dim("batch", min=1, max=65536)

    def batched(x: Any) -> bool:
        return isinstance(x, Tensor) and x.ndim > 0 and x.shape[0] == size

    shapes: tuple[Any, ...] = tuple({0: batch} if batched(x) else None for x in inputs)
    if size == 1:  # torch.export takes a dimension of size 1 for a constant
        inputs = tuple(torch.cat([x, x]) if batched(x) else x for x in inputs)
    return shapes, inputs


def make_program(
    model: nn.Module, example_inputs: Any, *, dynamic_batch: bool = True, dynamic_shapes: Any = None
) -> ExportedProgram:
    """Export a converted model with our two operators unexpanded: what formats with integers of their own start from.

    Args:
        model: converted by any room, or a single frozen ActivationQuantizer.
        example_inputs: a tensor or a tuple of them; the first dimension of the first one is the batch.
        dynamic_batch: every tensor with the batch of the first one gets a dynamic first dimension.
        dynamic_shapes: which sizes are open, as torch.export takes them; dynamic_batch does not count then.

    Returns:
        a program whose outputs equal the model's. Quantizers are dqa_plugins::fake_quantize nodes, quantized weights
        dqa_plugins::dequantize nodes that read integer buffers. It runs where this package is imported.

    Raises:
        UncalibratedQuantizer: a quantizer is not frozen.
        UnsupportedCombination: the model packs activations into bytes.
        ExportFailed: torch.export failed.
    """
    inputs = as_inputs(example_inputs)
    shapes, inputs = _dynamic_shapes(inputs, dynamic_batch and dynamic_shapes is None)
    ready = exportable(model, inputs)
    parameters = inspect.signature(ready.forward).parameters.values()
    named = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    if shapes is not None and any(p.kind is p.VAR_POSITIONAL for p in parameters):
        shapes = (*shapes[:named], shapes[named:])  # torch.export takes *args as one nested argument
    try:
        return _traced(ready, inputs, dynamic_shapes or shapes)
    except Exception as error:
        way_out = "" if shapes is None else " If the batch size is fixed inside the model, give dynamic_batch=False."
        raise ExportFailed(f"torch.export failed: {in_one_sentence(error)}.{way_out}") from error


def _traced(ready: nn.Module, inputs: tuple[Any, ...], shapes: Any) -> ExportedProgram:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.export.export(ready, inputs, dynamic_shapes=shapes)
        except torch._dynamo.exc.UserError as error:
            if "Constraints violated" not in str(error):
                raise
            # a model that torch.export made keeps the range of its own batch dimension: take it as it is
            open_range = torch.utils._pytree.tree_map_only(torch.export.Dim, lambda _: torch.export.Dim.DYNAMIC, shapes)
            return torch.export.export(ready, inputs, dynamic_shapes=open_range)


@busy("exporting")
def to_exported_program(
    model: nn.Module, example_inputs: Any, *, dynamic_batch: bool = True, dynamic_shapes: Any = None
) -> ExportedProgram:
    """Export a converted model, or a single frozen ActivationQuantizer, with torch.export.

    Args:
        model: converted by any adapter.
        example_inputs: a tensor or a tuple of them; the first dimension of the first one is the batch.
        dynamic_batch, dynamic_shapes: see `make_program`.

    Returns:
        torch.export.ExportedProgram; outputs equal the model's. Plain aten operations, weights as float constants that
        hold the dequantized numbers: a saved .pt2 opens and runs without this package.

    Raises:
        UncalibratedQuantizer, ExportFailed.
    """
    return expand(make_program(model, example_inputs, dynamic_batch=dynamic_batch, dynamic_shapes=dynamic_shapes))
