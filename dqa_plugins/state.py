"""State that travels in state_dicts: buffers that change shape, and what is no tensor, as JSON bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import StateMismatch
from .method import Method
from .methods import method_from_dict

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
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
    "synchronized": int,
}


class StateModule(nn.Module):
    """A module whose buffers change shape with calibration and keep their dtype through `.half()` and `.to(dtype)`."""

    def shapes(self) -> Mapping[str, tuple[str, ...]]:
        """What each buffer may look like, sizes as letters or numbers ("S G", "2", "" for a scalar); or be empty."""
        return {}

    def check_loaded(self, loaded: Mapping[str, Any], sizes: dict[str, int], label: str) -> None:
        """Refuse buffers of a state_dict that no calibration gives. Changes nothing.

        Args:
            loaded: by name, without a prefix.
            sizes: the letters that are known; the others are bound as they come, and have to agree.
            label: of the quantizer, for messages.

        Raises:
            StateMismatch: a buffer is no dense tensor of its kind, has another shape, or holds NaN or Inf.
        """
        for name, shapes in self.shapes().items():
            value, mine = loaded.get(name), self._buffers.get(name)
            if value is None or mine is None:
                continue
            if not _is_like(value, mine):
                kind = f"{value.dtype}, {value.layout}" if isinstance(value, Tensor) else type(value).__name__
                raise StateMismatch(f"{label}: {name} in the state_dict is {kind}; it is a dense {mine.dtype} tensor.")
            empty = value.numel() == 0 and value.shape[:1] == (0,)
            if value.is_meta or (empty and value.ndim in {1, *(len(shape.split()) for shape in shapes)}):
                continue
            if not any(_binds(shape, value.shape, sizes) for shape in shapes):
                known = {letter: size for letter, size in sizes.items() if any(letter in shape for shape in shapes)}
                raise StateMismatch(
                    f"{label}: {name} in the state_dict has shape {tuple(value.shape)}; it is "
                    f"({' or '.join(shape.replace(' ', ', ') for shape in shapes)}) with {known}."
                )
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise StateMismatch(f"{label}: {name} in the state_dict holds NaN or Inf, which cannot be.")

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


def _is_like(value: Any, mine: Tensor) -> bool:
    """Whether a value of a state_dict can be a buffer: dense, and of its kind (floats may have another width)."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_nested:
        return False
    return value.dtype in FLOATS if mine.is_floating_point() else value.dtype == mine.dtype


def _binds(shape: str, found: torch.Size, sizes: dict[str, int]) -> bool:
    """Whether a tensor has a shape; binds the letters that were free."""
    wanted = shape.split()
    if len(wanted) != len(found):
        return False
    bound = dict(sizes)
    for letter, size in zip(wanted, found, strict=True):
        if bound.setdefault(letter, int(letter) if letter.isdigit() else size) != size:
            return False
    sizes.update({letter: size for letter, size in bound.items() if not letter.isdigit()})
    return True


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
        loaded.setdefault("synchronized", 0)  # states of earlier releases
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


def check_buffers(loaded: Mapping[str, Any], state: Mapping[str, Any], method: Method, label: str) -> None:
    """Refuse values and gaps in the buffers of a quantizer that no calibration gives.

    Args:
        loaded: by name; of the right shapes.
        state: as `read_state` gave it.
        method, label: of the quantizer.

    Raises:
        StateMismatch: a scale is negative, extra bits are out of range, or a frozen quantizer lacks a parameter.
    """
    filled = {name: v for name, v in loaded.items() if isinstance(v, Tensor) and v.numel()}
    limits = {"scale": (0, None), "factor": (0, None), "extra_bits": (1 - method.bits, method.bits)}
    for name in limits.keys() & filled.keys():
        if filled[name].is_meta:
            continue
        least, most = limits[name]
        low, high = float(filled[name].min()), float(filled[name].max())
        if low < least or (most is not None and high > most):
            raise StateMismatch(f"{label}: {name} in the state_dict ranges from {low:g} to {high:g}, which cannot be.")
    if state["state"] != "frozen":
        return
    needed = {
        "static": ("lower", "upper") if method.uses_range else ("scale",),
        "predicted": ("predictor.bias",),  # fitted, or the static statistic
    }.get(method.source, ())
    gaps = [name for name in (*needed, *method.vectors) if name in loaded and name not in filled]
    gaps += [key for key in ("signed", "axis") if state[key] is None]
    gaps += ["channels"] if method.uses_channels and state["channels"] is None else []
    if gaps:
        raise StateMismatch(f"{label}: the state_dict is of a frozen quantizer, but has no {', '.join(gaps)}.")
