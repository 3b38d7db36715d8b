"""State that travels in state_dicts: buffers that change shape, and what is no tensor, as JSON bytes."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor, nn

from .errors import StateMismatch
from .method import Method
from .methods import method_from_dict

STATES = ("observe", "frozen", "qat")
VERSION = 1  # of the extra state; a state without one is of this version too
# what a quantizer's extra state holds besides its method
_KINDS: dict[str, type] = {
    "state": str,
    "axis": int,
    "channels": int,
    "signed": bool,
    "ranked": bool,
    "searched": int,
    "index": int,
}


class StateModule(nn.Module):
    """A module whose buffers change shape with calibration and keep their dtype through `.half()` and `.to(dtype)`."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, buffer in self._buffers.items():
            loaded = state_dict.get(prefix + name)
            if isinstance(loaded, Tensor) and buffer is not None and name not in self._non_persistent_buffers_set:
                self._buffers[name] = torch.empty_like(loaded, device=buffer.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> StateModule:
        dtypes = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, before in dtypes.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self


def to_bytes(state: dict[str, Any]) -> Tensor:
    """JSON-compatible values as UTF-8 in a uint8 tensor: loads with weights_only and fits safetensors."""
    return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8).clone()


def read_state(state: Any, method: Method, label: str) -> dict[str, Any]:
    """What the extra state of a quantizer holds.

    Args:
        state: uint8 tensor, from `to_bytes`.
        method: of the quantizer that loads it.
        label: of that quantizer, for messages.

    Raises:
        StateMismatch: the state is damaged, has values that cannot be, or belongs to another method.
    """
    try:
        loaded: dict[str, Any] = json.loads(bytes(state.cpu().numpy()).decode())
        version = loaded.get("version", VERSION)
        values = {key: loaded[key] for key in _KINDS}
        saved = method_from_dict(loaded["method"])
        if method.source == "predicted":
            loaded["predictor"]["site"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StateMismatch(
            f"{label}: the extra state in the state_dict is damaged or not ours ({type(error).__name__}: {error})."
        ) from error
    if type(version) is not int or version != VERSION:
        raise StateMismatch(f"{label}: the state_dict has version {version!r}; this release reads version {VERSION}.")
    if saved != method:
        raise StateMismatch(
            f"{label}: the state_dict holds {saved}, this quantizer is {method}. Prepare the model with the methods it "
            "was saved with."
        )
    for key, value in values.items():
        if value not in STATES if key == "state" else not (value is None or type(value) is _KINDS[key]):
            raise StateMismatch(f"{label}: the state_dict has {key}={value!r}, which cannot be.")
    return loaded


def check_buffers(loaded: dict[str, Any], method: Method, label: str) -> None:
    """Refuse buffers of a state_dict that no calibration gives.

    Args:
        loaded: by name.
        method, label: of the quantizer.

    Raises:
        StateMismatch: a scale or threshold is NaN, Inf or negative, or extra bits are out of range.
    """
    for name, value in loaded.items():
        if not isinstance(value, Tensor) or not value.numel() or value.is_meta:
            continue
        low, high = float(value.min()), float(value.max())
        good = math.isfinite(low) and math.isfinite(high)
        if name in ("scale", "factor"):
            good = good and low >= 0
        if name == "extra_bits":
            good = 1 - method.bits <= low and high <= method.bits
        if not good:
            raise StateMismatch(f"{label}: {name} in the state_dict ranges from {low:g} to {high:g}, which cannot be.")
