"""What every room's `quantize_model` needs: calibration items as inputs of a model, methods by site."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dqa_plugins.errors import UncalibratedQuantizer, UnsupportedInput
from dqa_plugins.graph.operations import Operation
from dqa_plugins.methods import Method, check_method
from dqa_plugins.sites import iter_quantizers

from .skip import within

Inputs = Callable[[Any], Any] | None


def require_float(model: nn.Module, caller: str) -> None:
    """Refuse a model whose activations are quantized already: each would be quantized twice.

    Raises:
        UnsupportedInput: a quantizer is frozen.
    """
    placed = [name for name, quantizer in iter_quantizers(model) if quantizer.state == "frozen"]
    if placed:
        raise UnsupportedInput(
            f"{caller} takes a float model; this one is quantized already ({placed[0]!r}, ...). Give it the float "
            "model, and all methods at once, by layer or site."
        )


def as_call(item: Any, inputs: Inputs = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A calibration item as (positional, keyword) arguments of a model.

    Args:
        item: a tensor is the one input, a tuple or list the positional inputs, a mapping the keyword inputs.
        inputs: a function item -> inputs in one of these forms.

    Raises:
        UnsupportedInput: the item is something else.
    """
    found = item if inputs is None else inputs(item)
    if isinstance(found, Tensor):
        return (found,), {}
    if isinstance(found, Mapping):
        return (), dict(found)
    if isinstance(found, tuple | list):
        return tuple(found), {}
    raise UnsupportedInput(
        f"a calibration item is a tensor, a tuple or list of positional inputs, or a dict of keyword inputs; got "
        f"{type(found).__name__}. Give inputs=, a function from an item to one of these."
    )


def example_of(calibration: Iterable[Any], inputs: Inputs, example_inputs: Any) -> tuple[Iterable[Any], Any]:
    """(all items, example inputs): the user's, else the first item, which stays among the items.

    Raises:
        UncalibratedQuantizer: there is no item.
        UnsupportedInput: see `as_call`.
    """
    iterator = iter(calibration)
    try:
        first = next(iterator)
    except StopIteration:
        raise UncalibratedQuantizer("quantize_model got no calibration data: the iterable is empty.") from None
    if example_inputs is None:
        positional, keywords = as_call(first, inputs)
        example_inputs = keywords or positional
    elif isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    return itertools.chain((first,), iterator), example_inputs


def run_calibration(model: nn.Module, items: Iterable[Any], inputs: Inputs = None) -> None:
    """Run a prepared model on every item, without gradients."""
    with torch.no_grad():
        for item in items:
            positional, keywords = as_call(item, inputs)
            model(*positional, **keywords)


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
