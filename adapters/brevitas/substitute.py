"""Which activations of a model get a quantizer: replace layers by class and by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import brevitas.nn as qnn
from brevitas.nn.quant_layer import QuantNonLinearActLayer
from torch import nn

from dqa_plugins.errors import DQAWarning, InvalidArgument, UnsupportedCombination
from dqa_plugins.method import Method
from dqa_plugins.methods import check_method

from .config import get_act_quant
from .fields import require_supported
from .grid import require_common_grid
from .proxy import PluginActProxy

Layers = Mapping[type[nn.Module] | str, Method | None]


def _bounded(old: Any, **kwargs: Any) -> nn.Module:
    return qnn.QuantHardTanh(min_val=old.min_val, max_val=old.max_val, **kwargs)


# Brevitas' layer for each activation it knows; ReLU6 is a Hardtanh from 0 to 6.
LAYERS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.ReLU: lambda old, **kwargs: qnn.QuantReLU(**kwargs),
    nn.Sigmoid: lambda old, **kwargs: qnn.QuantSigmoid(**kwargs),
    nn.Tanh: lambda old, **kwargs: qnn.QuantTanh(**kwargs),
    nn.Hardswish: lambda old, **kwargs: qnn.QuantHardSwish(**kwargs),
    nn.Identity: lambda old, **kwargs: qnn.QuantIdentity(**kwargs),
    nn.Hardtanh: _bounded,
    nn.ReLU6: _bounded,
}


class QuantActivation(QuantNonLinearActLayer):
    """Any other activation module, GELU for example, as a Brevitas layer."""

    def __init__(self, function: nn.Module, *, act_quant: Any, return_quant_tensor: bool = False) -> None:
        super().__init__(
            act_impl=function,
            passthrough_act=False,
            input_quant=None,
            act_quant=act_quant,
            return_quant_tensor=return_quant_tensor,
        )


def substitute_layers(model: nn.Module, layers: Layers, *, return_quant_tensor: bool = False) -> nn.Module:
    """Replace activation modules by Brevitas layers which quantize with our methods. Changes the model in place.

    Args:
        model: float, or with Brevitas layers; their activation layers can be named here too.
        layers: {class or qualified name: method, or None for float}. A name goes before its class; a class matches
            exactly, not its subclasses.
        return_quant_tensor: of the new layers.

    Returns:
        the model; the new layer if the model itself is an activation.

    Raises:
        NotAMethod: a value is none.
        InvalidArgument: a name is not in the model, or nothing matches.
        UnsupportedCombination: a module with weights, or a method that cannot do what is asked for.
    """
    chosen = _choose(model, layers)
    for name, method in chosen.items():
        label = f"'{name}' ({type(method).__name__}, {method.bits} bits)"
        require_supported(method, label)
        if return_quant_tensor:
            require_common_grid(method, label)
    made: dict[nn.Module, nn.Module] = {}
    for name, method in chosen.items():
        old = model.get_submodule(name)
        made[old] = substitute(name, old, method, return_quant_tensor)
    for parent in list(model.modules()):
        for child, old in list(parent.named_children()):
            if old in made:
                setattr(parent, child, made[old])
    return made.get(model, model)


def _choose(model: nn.Module, layers: Layers) -> dict[str, Method]:
    """{qualified name: method} of the modules to replace, in registration order."""
    for key, method in layers.items():
        if not isinstance(key, str) and not (isinstance(key, type) and issubclass(key, nn.Module)):
            raise InvalidArgument(f"substitute_layers: {key!r} is neither a module class nor a qualified name.")
        if method is not None:
            check_method(method, f"substitute_layers, {key if isinstance(key, str) else key.__name__}")
    modules = dict(model.named_modules())
    for key in layers:
        if isinstance(key, str) and key not in modules:
            near = [name for name in modules if name.rpartition(".")[2] == key.rpartition(".")[2]]
            raise InvalidArgument(
                f"substitute_layers: the model has no module '{key}'"
                + (f"; did you mean {', '.join(map(repr, near[:4]))}?" if near else ".")
            )
        if not isinstance(key, str) and not any(type(module) is key for module in modules.values()):
            warnings.warn(DQAWarning(f"substitute_layers: the model has no {key.__name__}."), stacklevel=3)
    chosen = {}
    for name, module in modules.items():
        method = layers[name] if name in layers else layers.get(type(module))
        if method is not None:
            chosen[name] = method
    if not chosen and any(method is not None for method in layers.values()):
        raise InvalidArgument("substitute_layers: nothing in the model matches, so nothing would be quantized.")
    return chosen


def substitute(name: str, old: nn.Module, method: Method, return_quant_tensor: bool) -> nn.Module:
    """Brevitas' layer for an activation module, float or of Brevitas.

    Args:
        name: of the site.
        old: the module.
        method: of the layer's quantizer.
        return_quant_tensor: of the layer.

    Raises:
        UnsupportedCombination: the module has weights.
    """
    kwargs: dict[str, Any] = {"act_quant": get_act_quant(method), "return_quant_tensor": return_quant_tensor}
    if isinstance(old, QuantNonLinearActLayer):
        kwargs["return_quant_tensor"] = return_quant_tensor or old.return_quant_tensor
        function = old.act_quant.fused_activation_quant_proxy.activation_impl
        if isinstance(old, qnn.QuantHardTanh):  # a stock one leaves its Hardtanh out
            injector = old.act_quant.quant_injector
            function = nn.Hardtanh(injector.min_val, injector.max_val)
        new = LAYERS.get(type(function), QuantActivation)(function, **kwargs)
    elif next(old.parameters(), None) is not None or next(old.children(), None) is not None:
        raise UnsupportedCombination(
            f"substitute_layers: '{name}' is a {type(old).__name__}, not an activation. Name the activations inside or "
            "behind it, or give a Brevitas layer output_quant=get_act_quant(method)."
        )
    else:
        new = LAYERS.get(type(old), QuantActivation)(old, **kwargs)
    for proxy in new.children():
        if isinstance(proxy, PluginActProxy):
            proxy.quantizer.name = name
    return new.train(old.training)
