"""From the keyword arguments of a Brevitas layer to a method, each of them checked."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from dqa_plugins.errors import InvalidMethod, UnsupportedCombination
from dqa_plugins.method import Method
from dqa_plugins.methods import check_method

# What Brevitas and our injectors put into an injector beside the user's fields (0.13.4).
_PLUMBING = frozenset(
    "__parent__ proxy_class method module proxy_module act_impl passthrough_act dtype device inplace".split()
)
# An activation layer hands all its arguments to act_quant, those for input_quant included.
_OF_OTHERS = ("input_", "output_", "weight_", "bias_")
# Bounds that an activation function takes; on the others they would be ignored in silence.
_BOUNDS = {nn.ReLU: {"max_val"}, nn.Hardtanh: {"min_val", "max_val"}}


def resolve_method(injector: Any, layer: nn.Module) -> Method:
    """The method that an injector describes.

    Args:
        injector: DQAAct and the like, with the keyword arguments of the layer let in.
        layer: for messages.

    Raises:
        NotAMethod: `method` is none.
        InvalidMethod: an argument is no field of the method, or has a value that the field cannot have.
        UnsupportedCombination: valid, but not in Brevitas.
    """
    where = f"{type(layer).__name__}(act_quant={injector.__name__})"
    method = check_method(injector.method, where)
    known = {field.name for field in dataclasses.fields(method)}
    bounds = _BOUNDS.get(type(injector.act_impl), set()) if "act_impl" in injector else set()
    fields: dict[str, Any] = {}
    for key in injector.__dependencies__:
        if key in _PLUMBING or key in bounds:
            continue
        if key == "bit_width" or key in known:
            fields[key] = getattr(injector, key)
        elif not key.startswith(_OF_OTHERS):
            raise InvalidMethod(
                f"{where}: {key}={getattr(injector, key)!r} is no field of {type(method).__name__}; it takes "
                f"bit_width, {', '.join(sorted(known - {'bits'}))}."
            )
    if "bit_width" in fields:
        if "bits" in fields:
            raise InvalidMethod(f"{where}: bit_width and bits are the same field; give one of them.")
        fields["bits"] = fields.pop("bit_width")
    return require_supported(method.replace(**fields) if fields else method, where)


def require_supported(method: Method, where: str) -> Method:
    """The method, unless Brevitas lacks what it needs.

    Raises:
        UnsupportedCombination: NoisyQuant(objective="output").
    """
    if method.needs_next_layer:
        raise UnsupportedCombination(
            f"{where}: objective='output' needs the next linear layer, which a Brevitas layer does not know. Use "
            "objective='activation' here, or the FX or PT2E adapter."
        )
    return method


def activation(injector: Any) -> nn.Module:
    """The activation function of the layer.

    Brevitas leaves Hardtanh out where it quantizes (its scale comes from the bounds), and reads the max_val of a
    QuantReLU that stands for ReLU6 in the same way. Our scales come from data, so the bounds have to be applied.
    """
    impl = injector.act_impl if "act_impl" in injector else None
    if type(impl) is nn.ReLU and "max_val" in injector:
        return nn.Hardtanh(0.0, float(injector.max_val))
    return nn.Identity() if impl is None else impl
