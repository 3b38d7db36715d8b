"""ActivationQuantizer: the one module that every adapter places.

It joins a method (how a tensor becomes codes), a qparams source (where scale or thresholds come from) and a state:

    observe  returns x and records it (the initial state)
    frozen   fake-quantizes; no statistic moves, whatever `.training` is
    qat      training mode records and fake-quantizes, eval mode fake-quantizes

`train()` and `eval()` never change the state; `state_dict` carries it.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import CalibrationRecord, rows_to_keep
from .errors import (
    ChannelAxisError,
    ChannelMismatch,
    DQAWarning,
    InvalidMethod,
    NonFiniteInput,
    UncalibratedQuantizer,
    UnsupportedCombination,
    UnsupportedInput,
)
from .grid import Grid, QParams
from .method import Method
from .methods import check_method, method_to_dict
from .ranges import lay_out, statistic
from .resolve import kept_values, next_layer_weight, static_qparams
from .source import QParamsSource, make_source
from .state import StateModule, check_buffers, read_state, to_bytes

_UNIT = ("unit_step", "unit_low", "unit_high", "unit_zero_point", "unit_bias")
_first_executions = itertools.count()


class ActivationQuantizer(StateModule):
    """Quantizes one activation.

    Args:
        method: Direct, DQA, NoisyQuant or DenseSparse.
        name: the site's name, for messages, rank tables and the noise of NoisyQuant.
        producer_axis: channel axis where the method names none (adapters know the layer before).
        index: position in the order of execution; None: set at the first call.

    Buffers once frozen (G = 1 or C; the unused ones are empty):
        scale: () or (C,), static Direct, DQA and NoisyQuant, unit of x.
        lower, upper: () or (C,), static thresholds of DenseSparse and asymmetric Direct, unit of x.
        factor: () or (C,), clip="mse".
        extra_bits: (C,) int64, DQA's m of each channel.
        noise: (C,), NoisyQuant, in units of the scale.

    Raises:
        NotAMethod: `method` is not one.
    """

    scale: Tensor
    lower: Tensor
    upper: Tensor
    factor: Tensor
    extra_bits: Tensor
    noise: Tensor

    def __init__(self, method: Method, *, name: str = "", producer_axis: int = 1, index: int | None = None) -> None:
        super().__init__()
        self.method = check_method(method, "ActivationQuantizer")
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
        # where freezing searches against the next linear layer, its geometry, set by the adapter before calibration:
        # () for Linear, (kernel, dilation, stride) for Conv2d; None: unknown.
        self.consumer_geometry: tuple[Any, ...] | None = None
        self.consumer_missing = False
        source = make_source(self.method)
        self.predictor: Any = source if isinstance(source, nn.Module) else None  # a submodule: it has state
        self._source = None if self.predictor is not None else source
        # called with the name and every tensor before it is quantized (QPP: others read its features)
        self.listener: Callable[[str, Tensor], None] | None = None

    # ------------------------------------------------------------ what it is

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

    def extra_repr(self) -> str:
        return f"{self.method}, name={self.name!r}, state={self._state!r}"

    # ------------------------------------------------------------ states

    def freeze(self, consumer_weight: Tensor | None = None) -> ActivationQuantizer:
        """Fix everything that calibration decides, forget the calibration data, and fake-quantize from now on.

        Args:
            consumer_weight: (O, D), the next linear layer's weight, for NoisyQuant(objective="output").

        Raises:
            UncalibratedQuantizer: it saw no data; dynamic quantizers need some too, for sign and channels.
        """
        if self._state == "frozen":
            return self
        self._require_data("was frozen or converted")
        if self._state == "observe":
            self._decide(consumer_weight)
            self.source.freeze(self)
        self._signed = self.signed
        self._state = "frozen"
        self.calibration.reset()
        return self

    def _decide(self, consumer_weight: Tensor | None) -> None:
        """Searches first (again only where samples were kept since), then static qparams."""
        method, record, signed = self.method, self.calibration, self.signed
        if method.signed is False and record.negative:
            warnings.warn(
                DQAWarning(
                    f"{self.label}: signed=False, but calibration saw {float(record.minimum):.4g}; negative values "
                    "become 0. Use signed=None or True unless that is meant."
                ),
                stacklevel=4,
            )
        kept = int(record.counts[1])
        if self.searched != kept:
            searched = method.needs_next_layer and not self.consumer_missing
            weight = next_layer_weight(consumer_weight, record, self.label) if searched else None
            channels = self._channels or 0
            factor, values = kept_values(method, record, signed, channels=channels, site=self.name, weight=weight)
            if factor is not None:
                self.factor = factor
            for name, vector in method.decide(values).items():
                if not (name == "extra_bits" and self.ranked):
                    setattr(self, name, vector)
            self.searched = kept
        if method.qparams == "static":
            decided = static_qparams(method, record, signed, self.clip_factor)
            for name, value in zip(QParams._fields, decided, strict=True):
                if value is not None:
                    setattr(self, name, value)
        self.derive_grid()

    def start_qat(self) -> ActivationQuantizer:
        """Enter the qat state (adapters do this from the host's training flow)."""
        if self._state == "frozen":
            raise UnsupportedCombination(f"{self.label} is frozen; prepare the float model for training instead.")
        if self.method.needs_next_layer:
            raise UnsupportedCombination(
                f"{self.label}: objective='output' searches against fixed weights, which training moves; "
                "use objective='activation', or give an amplitude."
            )
        if self.predictor is not None:
            raise UnsupportedCombination(
                f"{self.label}: QPP is fitted once, to a network that no longer changes; train with qparams='static' "
                "or 'dynamic', and calibrate the trained network with QPP."
            )
        self._state = "qat"
        if self.calibration.count:
            self._decide(None)  # calibrated before: training, or an eval pass, starts from there
        return self

    def set_extra_bits(self, extra_bits: Tensor) -> None:
        """Choose DQA's per-channel extra bits (a ranking or an allocation); freezing keeps them.

        Args:
            extra_bits: (C,) integers in [1 - bits, bits].

        Raises:
            UnsupportedCombination: the method has no important channels.
            ChannelMismatch: not one entry per channel.
            InvalidMethod: an entry is out of range.
        """
        if not self.method.has_important_channels:
            raise UnsupportedCombination(f"{self.label} has no important channels; use DQA to rank channels.")
        if not isinstance(extra_bits, Tensor) or extra_bits.is_floating_point() or extra_bits.ndim != 1:
            raise InvalidMethod(f"{self.label}: extra bits are a (C,) tensor of integers; got {extra_bits!r}.")
        if self._channels is not None and tuple(extra_bits.shape) != (self._channels,):
            raise ChannelMismatch(
                f"{self.label} has {self._channels} channels; got extra bits of shape {tuple(extra_bits.shape)}."
            )
        bits = self.method.bits
        if extra_bits.numel() and not 1 - bits <= int(extra_bits.min()) <= int(extra_bits.max()) <= bits:
            raise InvalidMethod(
                f"{self.label}: extra bits from {int(extra_bits.min())} to {int(extra_bits.max())}; "
                f"each must be in [{1 - bits}, {bits}]."
            )
        self.extra_bits = extra_bits.detach().to(self.extra_bits.device, torch.int64).clone()
        self.ranked = True
        if self.calibrated:
            self.derive_grid()

    # ------------------------------------------------------------ forward

    def forward(self, x: Tensor, prediction: Tensor | None = None) -> Tensor:
        """Observe or fake-quantize x, (B, ...), depending on the state. One tensor in, one tensor out.

        Raises:
            NonFiniteInput, UnsupportedInput, ChannelMismatch, ChannelAxisError, UncalibratedQuantizer: each names
                the layer.
        """
        self._check_tensor(x)
        if prediction is not None and self.predictor is None:
            raise UnsupportedCombination(f"{self.label} takes no prediction: its qparams are {self.method.qparams!r}.")
        if x.ndim == 1:
            return self.forward(x.unsqueeze(1), prediction).squeeze(1)
        if self._state == "observe":
            self._observe(x)
            return x
        if self._state == "qat":
            if self.training:
                self._observe(x)
                if self.calibration.count:
                    self._decide(None)
            else:
                self._require_data("was run in eval mode")
        return self.fake_quantize(x, prediction)

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

    def fake_quantize(self, x: Tensor, prediction: Tensor | None = None) -> Tensor:
        """Quantize and dequantize x, (B, ...), with the decided parameters; in the dtype of x."""
        self._check_tensor(x)
        if not torch.compiler.is_compiling() and x.numel() == 0:
            return x
        self._check_channels(x)
        if prediction is None and self.listener is not None:
            self.listener(self.name, x)
        return self.grid(x, prediction).fake_quantize(x)

    # ------------------------------------------------------------ calibration

    @property
    def clip_factor(self) -> Tensor | None:
        """() or (C,): the multiple of the maximum that clip="mse" chose; None for other clips."""
        return self.factor if self.factor.numel() else None

    def _require_data(self, event: str) -> None:
        if self.calibration.count == 0:
            raise UncalibratedQuantizer(
                f"{self.label} {event} without having seen data. Run the prepared model on calibration batches "
                "first, or leave the layer out of quantization."
            )

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        if x.numel() == 0:
            return
        x = x.detach()
        if not torch.isfinite(x).all():
            nans, infs = int(x.isnan().sum()), int(x.isinf().sum())
            raise NonFiniteInput(
                f"{self.label} saw {nans} NaN and {infs} Inf values in calibration data of shape {tuple(x.shape)}; "
                "no scale can be taken from them. Find the sample, or the layer before, that makes them."
            )
        if self.index is None:
            self.index = next(_first_executions)
        self._axis = self.channel_axis
        if self.uses_channels:
            axis = self._checked_axis(x)
            if self._channels is None:
                self._channels = x.shape[axis]
                if self.ranked:
                    self.set_extra_bits(self.extra_bits)
        self._check_channels(x)
        if self.listener is not None:
            self.listener(self.name, x)
        values = statistic(x, self.method, self._axis)
        if self.source.observe(self, x, values):
            rows = rows_to_keep(x, self.uses_channels, self._axis, self.consumer_geometry)
            self.calibration.observe(x, values, rows, self.method, moving=self._state == "qat")

    def _check_tensor(self, x: object) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim == 0:
            what = f"{x.dtype}, shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise UnsupportedInput(f"{self.label} quantizes floating-point tensors with a batch axis; got {what}.")

    def _checked_axis(self, x: Tensor) -> int:
        axis = self.channel_axis
        resolved = axis + x.ndim if axis < 0 else axis
        if not 0 < resolved < x.ndim:
            raise ChannelAxisError(
                f"{self.label}: channel axis {axis} does not exist, or is the batch, in a tensor of shape "
                f"{tuple(x.shape)}; give channel_axis in [1, {x.ndim - 1}]."
            )
        return resolved

    def _check_channels(self, x: Tensor) -> None:
        if self._channels is not None and x.shape[self._checked_axis(x)] != self._channels:
            raise ChannelMismatch(
                f"{self.label} was calibrated on {self._channels} channels along axis {self.channel_axis}; got a "
                f"tensor of shape {tuple(x.shape)}. Calibrate again, or give this tensor a quantizer of its own."
            )

    # ------------------------------------------------------------ state_dict

    def get_extra_state(self) -> Tensor:
        """What is not a buffer, as UTF-8 JSON in a uint8 tensor."""
        state: dict[str, Any] = {
            "method": method_to_dict(self.method),
            "state": self._state,
            "axis": self._axis,
            "channels": self._channels,
            "signed": self._signed,
            "ranked": self.ranked,
            "searched": self.searched,
            "index": self.index,
        }
        if self.predictor is not None:
            state["predictor"] = self.predictor.describe()
        return to_bytes(state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # before any buffer is touched: a refused state changes nothing
        if prefix + "_extra_state" in state_dict:
            read_state(state_dict[prefix + "_extra_state"], self.method, self.label)
            check_buffers({name: state_dict.get(prefix + name) for name in self._buffers}, self.method, self.label)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def set_extra_state(self, state: Tensor) -> None:
        """Inverse of `get_extra_state`.

        Raises:
            StateMismatch: the state belongs to another method, or is damaged.
        """
        loaded = read_state(state, self.method, self.label)
        self._state, self._axis, self._channels = loaded["state"], loaded["axis"], loaded["channels"]
        self._signed, self.ranked, self.searched = loaded["signed"], loaded["ranked"], loaded["searched"]
        self.index = loaded["index"] if self.index is None else self.index
        if self.predictor is not None:
            self.predictor.restore(loaded["predictor"], self.label)


def _derive_after_loading(quantizer: nn.Module, _: Any) -> None:
    """The grid depends on the sign, which the calibration record knows: that one is loaded last."""
    if isinstance(quantizer, ActivationQuantizer) and quantizer.calibrated:
        quantizer.derive_grid()
