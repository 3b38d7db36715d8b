"""Our quantizers where a host's int8 has its own, and nowhere else: what is left of a difference is then not placement.

Each function takes the host's int8 model, as `hosts.STOCK` makes it, exchanges its quantizers of activations for
ActivationQuantizers in the observe state, in place, and leaves its weights. Sites that share a scale share a quantizer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from dqa_plugins import ActivationQuantizer, Method
from dqa_plugins.errors import UncalibratedQuantizer

from .hosts import Batches, run


def pt2e(model: nn.Module, method: Method) -> nn.Module:
    """Instead of each pair of quantize and dequantize nodes of an exported program."""
    graph: Any = model.graph
    decomposed = torch.ops.quantized_decomposed
    made: dict[Any, str] = {}
    for node in list(graph.nodes):
        if node.target is decomposed.quantize_per_tensor.default:
            source, name = node.args[0], made.setdefault(node.args[1:3], f"own_{len(made)}")
            if not hasattr(model, name):
                model.add_module(name, ActivationQuantizer(method, name=name))
            with graph.inserting_after(node):
                call = graph.call_module(name, (source,))
            for user in [u for u in node.users if u.target is decomposed.dequantize_per_tensor.default]:
                user.replace_all_uses_with(call)
    graph.eliminate_dead_code()
    model.recompile()  # type: ignore[operator]
    return model


class _Valued(nn.Module):
    """Brevitas' quantizer of a tensor with another's values: its scale goes on to biases."""

    def __init__(self, host: nn.Module, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.host, self.quantizer = host, quantizer

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.quantizer(x), *self.host(x)[1:]


def brevitas(model: nn.Module, method: Method) -> nn.Module:
    """Inside each proxy of an activation."""
    from brevitas.proxy.runtime_quant import ActQuantProxyFromInjectorBase

    made: dict[nn.Module, _Valued] = {}
    for name, proxy in model.named_modules():
        if isinstance(proxy, ActQuantProxyFromInjectorBase) and proxy.is_quant_enabled:
            fused: Any = proxy.fused_activation_quant_proxy
            host = fused.tensor_quant
            fused.tensor_quant = made.setdefault(host, _Valued(host, ActivationQuantizer(method, name=name)))
    return model


def nncf(model: nn.Module, method: Method) -> nn.Module:
    """Instead of each hook that quantizes what is not a parameter."""
    from nncf.torch.function_hook.wrapper import get_hook_storage
    from nncf.torch.quantization.layers import BaseQuantizer

    made: dict[nn.Module, nn.Module] = {}
    for hooks in [m for m in get_hook_storage(model).modules() if isinstance(m, nn.ModuleDict)]:
        for name, hook in hooks.items():
            if isinstance(hook, BaseQuantizer):
                hooks[name] = made.setdefault(hook, _Activations(hook, ActivationQuantizer(method, name=name)))
    return model


class _Activations(nn.Module):
    """NNCF's quantizer for parameters, another for activations: NNCF does not say which of the two it made it for."""

    def __init__(self, host: nn.Module, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.host, self.quantizer = host, quantizer

    def forward(self, x: Tensor) -> Tensor:
        quantized: Tensor = (self.host if isinstance(x, nn.Parameter) else self.quantizer)(x)
        return quantized


EXCHANGE: dict[str, Callable[[nn.Module, Method], nn.Module]] = {"pt2e": pt2e, "brevitas": brevitas, "nncf": nncf}


def at_sites_of_the_host(room: str, stock: nn.Module, method: Method, batches: Batches) -> nn.Module:
    """The host's int8 model with our quantizers instead of its own, calibrated."""
    model = EXCHANGE[room](stock, method)
    run(model, batches)
    for module in {m for m in model.modules() if isinstance(m, ActivationQuantizer)}:
        with suppress(UncalibratedQuantizer):  # nothing comes there but parameters
            module.freeze()
    return model
