"""A method in Brevitas' own configuration: an injector, to be given as act_quant, input_quant or output_quant."""

from __future__ import annotations

from typing import Any

from brevitas.inject import ExtendedInjector

from dqa_plugins.method import Method
from dqa_plugins.methods import DQA, DenseSparse, Direct, NoisyQuant, check_method

from .proxy import PluginActProxy


class DirectAct(ExtendedInjector):
    """Direct. Keyword arguments of the layer: bit_width (`Direct.bits`) and the other fields of `Direct`."""

    proxy_class = PluginActProxy
    method = Direct()


class DQAAct(ExtendedInjector):
    """DQA. Keyword arguments of the layer: bit_width (`DQA.bits`) and the other fields of `DQA`."""

    proxy_class = PluginActProxy
    method = DQA()


class NoisyQuantAct(ExtendedInjector):
    """NoisyQuant. Keyword arguments of the layer: bit_width (`NoisyQuant.bits`) and its other fields."""

    proxy_class = PluginActProxy
    method = NoisyQuant()


class DenseSparseAct(ExtendedInjector):
    """Dense+Sparse. Keyword arguments of the layer: bit_width (`DenseSparse.bits`) and its other fields."""

    proxy_class = PluginActProxy
    method = DenseSparse()


class _PluginAct(ExtendedInjector):
    """Any registered method."""

    proxy_class = PluginActProxy


def get_act_quant(method: Method) -> Any:
    """The method as an injector, for Brevitas' layers and for its `quantize` and `layerwise_quantize` maps.

    Args:
        method: Direct, DQA, NoisyQuant or DenseSparse.

    Raises:
        NotAMethod: it is none of them.
    """
    bases: dict[type[Method], Any] = {
        type(act.method): act for act in (DirectAct, DQAAct, NoisyQuantAct, DenseSparseAct)
    }
    return bases.get(type(check_method(method, "get_act_quant")), _PluginAct).let(method=method)
