"""Site names and channel axes, which a Brevitas layer is never told.

Names: a quantizer is called after its activation module. `substitute_layers` and `load_state_dict` know the qualified
name; a layer that was built by hand learns it at its first call, from the modules whose forward is running.

Axes: while `calibration_mode` is on, each tensor carries the axis of its channels from the operation that made it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dqa_plugins.sites import LAST_AXIS_PRODUCERS, default_channel_axis

_AXIS = "_dqa_channel_axis"

# Functions behind which the channels are where they were before (as in the FX room).
_ELEMENTWISE = frozenset(
    "add iadd radd mul imul rmul sub isub truediv div relu relu6 gelu silu hardswish sigmoid tanh softmax dropout "
    "clamp hardtanh contiguous clone".split()
)
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
    """The channel axis that AxisTracker noted on x; None outside calibration."""
    return getattr(x, _AXIS, None)


class AxisTracker(TorchFunctionMode):
    """Notes on every tensor which axis its channels are: last behind Linear and its like, else 1."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if type(result) is Tensor:
            name = getattr(func, "__name__", "").strip("_")
            if name in LAST_AXIS_PRODUCERS:
                setattr(result, _AXIS, default_channel_axis(name))
            elif name in _ELEMENTWISE:
                first = next((a for a in args if isinstance(a, Tensor)), None)
                setattr(result, _AXIS, 1 if first is None else getattr(first, _AXIS, 1))
            elif not hasattr(result, _AXIS):
                setattr(result, _AXIS, 1)
        return result


def started_without_axis(x: Tensor) -> bool:
    """True for a tensor that could be (batch, tokens, channels) as well as (batch, channels, length)."""
    return x.ndim == 3 and channel_axis_of(x) is None and not torch.compiler.is_compiling()
