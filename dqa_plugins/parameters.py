"""The parameters of a quantizer: its buffers, the grid that they make, and how they travel in a state_dict."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .calibration import CalibrationRecord
from .errors import UnsupportedCombination
from .grid import Grid, QParams
from .method import Method
from .methods import check_method, method_to_dict
from .ranges import lay_out
from .source import QParamsSource, make_source
from .state import VERSION, StateModule, check_buffers, read_state, to_bytes

_UNIT = ("unit_step", "unit_low", "unit_high", "unit_zero_point", "unit_bias")


class QuantizerParameters(StateModule):
    """What a quantizer holds.

    Args:
        method: see `ActivationQuantizer`, as the other arguments.

    Buffers once frozen (G = 1 or C; the unused ones are empty):
        scale: () or (C,), static Direct, DQA and NoisyQuant, unit of x.
        lower, upper: () or (C,), static thresholds of DenseSparse and asymmetric Direct, unit of x.
        factor: () or (C,), clip="mse".
        extra_bits: (C,) int64, DQA's m of each channel.
        noise: (C,), NoisyQuant, in units of the scale.
    """

    scale: Tensor
    lower: Tensor
    upper: Tensor
    factor: Tensor
    extra_bits: Tensor
    noise: Tensor

    def shapes(self) -> dict[str, tuple[str, ...]]:
        """See `StateModule.shapes`; the vectors are the method's."""
        found: dict[str, tuple[str, ...]] = dict.fromkeys(("scale", "lower", "upper"), ("", "G"))
        found["factor"] = ("", "1", "G")
        for vector in (*self.method.vectors, "extra_bits", "noise"):
            found[vector] = ("C",)
        return found

    def __init__(self, method: Method, *, name: str = "", producer_axis: int = 1, index: int | None = None) -> None:
        super().__init__()
        self.method = check_method(method, type(self).__name__)
        self.name = name
        self.producer_axis = producer_axis
        self.index = index
        self.calibration = CalibrationRecord()
        for buffer in ("scale", "lower", "upper", "factor", "noise", *self.method.vectors):
            if buffer not in self._buffers:
                self.register_buffer(buffer, torch.empty(0))
        self.register_buffer("extra_bits", torch.empty(0, dtype=torch.int64))
        for buffer in _UNIT:  # the grid of scale 1, derived from the vectors and the sign
            self.register_buffer(buffer, torch.empty(0), persistent=False)
        self.register_load_state_dict_post_hook(_derive_after_loading)
        self._state = "observe"
        self._axis: int | None = None
        self._channels: int | None = None
        self._signed: bool | None = None
        self.ranked = False  # extra_bits were given, not derived
        self.searched = 0  # kept samples at the last search (QAT)
        self._unit_ends: tuple[Any, Any] = (0, 0)
        source = make_source(self.method)
        self.predictor: Any = source if isinstance(source, nn.Module) else None  # a submodule: it has state
        self._source = None if self.predictor is not None else source

    # ------------------------------------------------------------ what it is

    def extra_repr(self) -> str:
        """The method and, once frozen, what calibration decided: sign, static step, important channels."""
        found = [str(self.method), f"name={self.name!r}", f"state={self._state!r}"]
        # exporters print modules while they record what is computed: nothing may be computed then
        if self._state == "frozen" and not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            found += self._decided()
        return ", ".join(found)

    def _decided(self) -> list[str]:
        found = [f"signed={self.signed}"]
        step = self.static_grid.step if self.method.qparams == "static" else torch.empty(0)
        if step.numel() and not step.is_meta:
            low, high = float(step.min()), float(step.max())
            found.append(f"step={low:.4g}" if low == high else f"step={low:.4g}..{high:.4g}")
        if self.extra_bits.numel() and not self.extra_bits.is_meta:
            found.append(f"extra_bits>0 on {int((self.extra_bits > 0).sum())} of {self.extra_bits.numel()} channels")
        return found

    @property
    def state(self) -> str:
        """ "observe", "frozen" or "qat"."""
        return self._state

    @property
    def calibrated(self) -> bool:
        """True if it can quantize: it has seen data, or is frozen."""
        return self._state == "frozen" or self.calibration.count > 0

    @property
    def signed(self) -> bool:
        """Whether codes are signed: as the method says, else whether calibration saw a negative value."""
        if self.method.signed is not None:
            return self.method.signed
        return self.calibration.negative if self._signed is None else self._signed

    @property
    def channel_axis(self) -> int:
        """The resolved channel axis, possibly negative."""
        if self._axis is not None:
            return self._axis
        return self.producer_axis if self.method.channel_axis is None else self.method.channel_axis

    @property
    def num_channels(self) -> int | None:
        """C of the tensors it was calibrated on; None where the method does not look at channels."""
        return self._channels

    @property
    def uses_channels(self) -> bool:
        """True where the method treats channels differently."""
        return self.method.uses_channels

    @property
    def source(self) -> QParamsSource:
        """Where its qparams come from."""
        return self._source or self.predictor

    @property
    def static(self) -> QParams:
        """Qparams reduced over calibration, () or (C,); empty where they are not used."""
        return QParams(*(p if p.numel() else None for p in (self.scale, self.lower, self.upper)))

    @property
    def vectors(self) -> dict[str, Tensor]:
        """The method's per-channel vectors, (C,) each, once decided."""
        found = {name: getattr(self, name) for name in self.method.vectors}
        return {name: vector for name, vector in found.items() if vector.numel()}

    @property
    def label(self) -> str:
        """The site and method, as error messages name them."""
        return f"'{self.name or 'unnamed quantizer'}' ({type(self.method).__name__}, {self.method.bits} bits)"

    @property
    def clip_factor(self) -> Tensor | None:
        """() or (C,): the multiple of the maximum that clip="mse" chose; None for other clips."""
        return self.factor if self.factor.numel() else None

    # ------------------------------------------------------------ its grid

    def grid(self, x: Tensor, prediction: Tensor | None = None) -> Grid:
        """The grid that x, (B, ...), is quantized with, laid out to broadcast against it."""
        found = self.source.qparams(self, x, prediction)
        if found.scale is None:
            axis = self.channel_axis
            laid = {name: lay_out(v, x, axis, per_sample=False) for name, v in self.vectors.items()}
            return self.method.grid(found, self.signed, laid)
        return self.unit_grid_for(x).scaled(found.scale)

    def runtime_qparams(self, x: Tensor, prediction: Tensor | None = None) -> QParams:
        """The qparams behind `grid`, shaped to broadcast against x."""
        return self.source.qparams(self, x, prediction)

    def unit_grid_for(self, x: Tensor) -> Grid:
        """The grid of scale 1, laid out against x."""
        axis = self.channel_axis
        return self.unit_grid.to(x).map(lambda v: lay_out(v.reshape(-1), x, axis, per_sample=False))

    @property
    def unit_grid(self) -> Grid:
        """The grid of scale 1, () or (C,) each; the grid of a scale is proportional to it (`Grid.scaled`)."""
        step, low, high, zero_point, bias = (getattr(self, name) for name in _UNIT)
        if not low.numel():
            low, high = self._unit_ends
        return Grid(step, low, high, *(v if v.numel() else None for v in (zero_point, bias)))

    @property
    def static_grid(self) -> Grid:
        """The grid of static qparams, () or (C,) each, before it is laid out against a tensor.

        Raises:
            UnsupportedCombination: the qparams are not static.
        """
        static = self.static
        if static.scale is not None:
            return self.unit_grid.scaled(static.scale)
        if static.lower is None:
            raise UnsupportedCombination(f"{self.label} has no grid without a tensor: its qparams are not static.")
        return self.method.grid(static, self.signed, self.vectors)

    def derive_grid(self) -> None:
        """Recompute the grid of scale 1 from the vectors and the sign."""
        if self.method.uses_range:
            return
        one = torch.ones((), device=self.extra_bits.device)
        grid = self.method.grid(QParams(one), self.signed, self.vectors)
        for name, value in zip(_UNIT, (grid.step, grid.low, grid.high, grid.zero_point, grid.bias), strict=True):
            setattr(self, name, value if isinstance(value, Tensor) else torch.empty(0, device=one.device))
        if not isinstance(grid.low, Tensor):
            self._unit_ends = (grid.low, grid.high)

    # ------------------------------------------------------------ state_dict

    def get_extra_state(self) -> Tensor:
        """What is not a buffer, as UTF-8 JSON in a uint8 tensor."""
        state: dict[str, Any] = {
            "version": VERSION,
            "method": method_to_dict(self.method),
            "state": self._state,
            "axis": self._axis,
            "channels": self._channels,
            "signed": self._signed,
            "ranked": self.ranked,
            "searched": self.searched,
            "index": self.index,
            "synchronized": self.calibration.synchronized,
        }
        if self.predictor is not None:
            state["predictor"] = self.predictor.describe()
        return to_bytes(state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # before any buffer is touched, those of the modules inside included: a refused state changes nothing
        if prefix + "_extra_state" in state_dict:
            self._check_state({k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check_state(self, loaded: dict[str, Any]) -> None:
        state = read_state(loaded["_extra_state"], self.method, self.label)
        sizes = {"S": len(self.method.statistic(self.method.signed))}
        if self.method.granularity == "tensor":
            sizes["G"] = 1
        elif state["channels"] is not None:
            sizes["G"] = state["channels"]
        if state["channels"] is not None:
            sizes["C"] = state["channels"]
        self.check_loaded(loaded, dict(sizes), self.label)
        check_buffers(loaded, state, self.method, self.label)
        for name, module in self.named_children():
            if isinstance(module, StateModule):
                inside = {k.removeprefix(name + "."): v for k, v in loaded.items() if k.startswith(name + ".")}
                module.check_loaded(inside, dict(sizes), self.label)
        if self.predictor is not None:
            self.predictor.check_description(state["predictor"], self.label)

    def set_extra_state(self, state: Tensor) -> None:
        """Inverse of `get_extra_state`.

        Raises:
            StateMismatch: the state belongs to another method, or is damaged.
        """
        loaded = read_state(state, self.method, self.label)
        self._state, self._axis, self._channels = loaded["state"], loaded["axis"], loaded["channels"]
        self._signed, self.ranked, self.searched = loaded["signed"], loaded["ranked"], loaded["searched"]
        self.index = loaded["index"] if self.index is None else self.index
        self.calibration.synchronized = loaded["synchronized"]
        if self.predictor is not None:
            self.predictor.restore(loaded["predictor"], self.label)


def _derive_after_loading(quantizer: nn.Module, _: Any) -> None:
    """The grid depends on the sign, which the calibration record knows: that one is loaded last."""
    if isinstance(quantizer, QuantizerParameters) and quantizer.calibrated:
        quantizer.derive_grid()
