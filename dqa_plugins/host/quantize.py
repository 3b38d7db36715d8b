"""What every room's `quantize_model` needs: calibration items as inputs of a model, methods by site."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from dqa_plugins.batches import Call, ItemReader, Pick
from dqa_plugins.errors import UnsupportedInput
from dqa_plugins.graph.operations import Operation
from dqa_plugins.method import Method
from dqa_plugins.methods import check_method
from dqa_plugins.progress import counted
from dqa_plugins.sites import iter_quantizers

from .skip import within


def require_float(model: nn.Module, caller: str) -> None:
    """Refuse a model whose activations are quantized already: each would be quantized twice.

    Raises:
        UnsupportedInput: a quantizer is frozen.
    """
    placed = [name for name, quantizer in iter_quantizers(model) if quantizer.state == "frozen"]
    if placed:
        raise UnsupportedInput(
            f"{caller} takes a float model; this one is quantized already ({placed[0]!r}, ...). Quantize "
            "the float model again, with all methods at once, by layer or site."
        )


def calibration_calls(
    model: nn.Module, calibration: Iterable[Any], inputs: Pick, example_inputs: Any
) -> tuple[Iterator[Call], Call]:
    """(all items as calls of the model, example inputs): the user's example, else the first item, which is calibrated
    on too.

    Args:
        model: whose parameters decide what an item is (see `batches`).
        example_inputs: a tensor, a tuple or a dict of keyword inputs; None: the first item.

    Raises:
        UncalibratedQuantizer: there is no item.
        UnsupportedInput: an item does not fit the model, or `calibration` is a single batch.
    """
    reader = ItemReader(model, "quantize_model", inputs=inputs)
    calls = reader.items(calibration)
    first = next(calls)
    if example_inputs is not None:
        given = ItemReader(model, "quantize_model", inputs=lambda item: item).read(example_inputs)
        return itertools.chain((first,), calls), given
    return itertools.chain((first,), calls), first


def run_calibration(model: nn.Module, calls: Iterable[Call]) -> None:
    """Run a prepared model on every item, without gradients."""
    with torch.no_grad():
        for call in counted(calls, what="calibrating", unit="batch"):
            call(model)


def split_methods(
    method: Method | Mapping[str, Method | None],
) -> tuple[Method | None, dict[str, Method | None]]:
    """(the method for all, {site or module: method}) of what a user gave; in a mapping "" stands for all.

    Raises:
        NotAMethod: a value is neither a method nor None.
    """
    if not isinstance(method, Mapping):
        return check_method(method, "quantize_model"), {}
    named = {name: None if m is None else check_method(m, f"quantize_model, {name!r}") for name, m in method.items()}
    return named.pop("", None), named


def methods_by_name(
    everywhere: Method | None, named: Mapping[str, Method | None]
) -> Callable[[Operation], Method | None]:
    """The method of an operation: that of the innermost module around it that is named, else that for all."""

    def method_of(operation: Operation) -> Method | None:
        if operation.how in ("input", "parameter", "output"):
            return None
        names = [name for name in named if within(operation.path, (name,))]
        return named[max(names, key=len)] if names else everywhere

    return method_of
