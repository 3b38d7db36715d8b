"""Site names and channel axes, which a Brevitas layer is never told.

Names: a quantizer is called after its activation module. `substitute_layers` and `load_state_dict` know the qualified
name; a layer that was built by hand learns it at its first call, from the modules whose forward is running.

Axes: while `calibration_mode` is on, each tensor carries the axis of its channels from the operation that made it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dqa_plugins.graph.axes import DEFAULT, made_axis
from dqa_plugins.graph.operations import Operation, Value, function_name

_AXIS = "_dqa_channel_axis"
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def site_of(path: str) -> str:
    """Site name of the proxy at `path`: the activation module, or the layer whose output it quantizes."""
    layer, _, attribute = path.rpartition(".")
    return layer if attribute in ("act_quant", "output_quant") else path


def name_from_callers(proxy: nn.Module) -> str:
    """Site name of a proxy whose forward is running, "" if it was called by itself.

    The outermost module on the call stack which contains the proxy is the model that the user called.
    """
    owners: list[nn.Module] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and not isinstance(owner, _WRAPPERS):
            owners.append(owner)
        frame = frame.f_back
    for owner in reversed(owners):
        for path, module in owner.named_modules():
            if module is proxy:
                return site_of(path)
    return ""


def channel_axis_of(x: Tensor) -> int | None:
    """The channel axis that AxisTracker wrote on x; None outside calibration."""
    return getattr(x, _AXIS, None)


class AxisTracker(TorchFunctionMode):
    """Writes on every tensor which axis its channels are, by the rules of `graph.axes`; 1 where nothing tells."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if type(tensor) is Tensor:
                axis = _axis(func, args, kwargs, tensor)
                setattr(tensor, _AXIS, getattr(tensor, _AXIS, DEFAULT) if axis is None else axis)
        return result


def _axis(func: Callable[..., Any], args: Any, kwargs: Any, result: Tensor) -> int | None:
    """The channel axis of what a function of torch gave."""
    read = [a for a in _flat((args, kwargs)) if isinstance(a, Tensor) and not isinstance(a, nn.Parameter)]
    inputs = tuple(Value(x, tuple(x.shape)) for x in read)
    output = Value(result, tuple(result.shape))
    operation = Operation(
        function_name(func),
        "function",
        inputs=inputs,
        outputs=(output,),
        arguments=tuple(a for a in args if not isinstance(a, Tensor)),
        keywords={k: a for k, a in kwargs.items() if not isinstance(a, Tensor)},
    )
    return made_axis(operation, output, {value: getattr(value.key, _AXIS, None) for value in inputs})


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for item in value:
            yield from _flat(item)
    elif isinstance(value, dict):
        yield from _flat(tuple(value.values()))
    else:
        yield value


def started_without_axis(x: Tensor) -> bool:
    """True for a tensor that could be (batch, tokens, channels) as well as (batch, channels, length)."""
    return x.ndim == 3 and channel_axis_of(x) is None and not torch.compiler.is_compiling()
