"""ActivationQuantizer: the one module that every adapter places.

It joins a method (how a tensor becomes codes), a qparams source (where scale or thresholds come from) and a state:

    observe  returns x and records it (the initial state)
    frozen   fake-quantizes; no statistic moves, whatever `.training` is
    qat      training mode records and fake-quantizes, eval mode fake-quantizes

`train()` and `eval()` never change the state; `state_dict` carries it.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import torch
from torch import Tensor, nn

from . import functional as F
from .calibration import CalibrationRecord, StateModule
from .decide import decide
from .errors import (
    ChannelAxisError,
    ChannelMismatch,
    InvalidMethod,
    NonFiniteInput,
    StateMismatch,
    UncalibratedQuantizer,
    UnsupportedCombination,
    UnsupportedInput,
)
from .grid import compute_dtype
from .methods import DQA, DenseSparse, Method, NoisyQuant, check_method, method_from_dict, method_to_dict
from .qparams import QParams, from_extents, lay_out, valid
from .qpp.bus import Bus
from .qpp.fit import fit
from .qpp.predictor import Predictor
from .statistics import extents, grouped, statistic

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
    grid_step: Tensor
    grid_low: Tensor
    grid_high: Tensor

    def __init__(self, method: Method, *, name: str = "", producer_axis: int = 1, index: int | None = None) -> None:
        super().__init__()
        self.method = check_method(method, "ActivationQuantizer")
        self.name = name
        self.producer_axis = producer_axis
        self.index = index
        self.calibration = CalibrationRecord()
        for buffer in ("scale", "lower", "upper", "factor", "noise"):
            self.register_buffer(buffer, torch.empty(0))
        self.register_buffer("extra_bits", torch.empty(0, dtype=torch.int64))
        for buffer in ("grid_step", "grid_low", "grid_high"):  # derived from extra_bits
            self.register_buffer(buffer, torch.empty(0), persistent=False)
        self.register_load_state_dict_post_hook(_derive_after_loading)
        self._state = "observe"
        self._axis: int | None = None
        self._channels: int | None = None
        self._signed: bool | None = None
        self.ranked = False  # extra_bits were given, not derived
        self.searched = 0  # kept samples at the last search (QAT)
        # objective="output": the geometry of the next linear layer, set by the adapter before calibration:
        # () for Linear, (kernel, dilation, stride) for Conv2d; None: unknown.
        self.consumer_geometry: tuple[Any, ...] | None = None
        self.consumer_missing = False
        self.predictor = Predictor(self.method) if self.method.source == "predicted" else None
        self.tap: tuple[Bus, tuple[str, ...]] | None = None  # QPP: what reads this tensor's features

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
        return self.method.granularity == "channel" or isinstance(self.method, (DQA, NoisyQuant))

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
            if self.predictor is not None and self.predictor.bus is not None:
                fit(self.predictor.bus)
            decide(self, consumer_weight)
        self._signed = self.signed
        self._state = "frozen"
        self.calibration.reset()
        if self.predictor is not None:
            self.predictor.forget()
        return self

    def start_qat(self) -> ActivationQuantizer:
        """Enter the qat state (adapters do this from the host's training flow)."""
        if self._state == "frozen":
            raise UnsupportedCombination(f"{self.label} is frozen; prepare the float model for training instead.")
        if isinstance(self.method, NoisyQuant) and self.method.objective == "output":
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
            decide(self, None)  # calibrated before: training, or an eval pass, starts from there
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
        if not isinstance(self.method, DQA):
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
                    decide(self, None)
            else:
                self._require_data("was run in eval mode")
        return self.fake_quantize(x, prediction)

    def runtime_qparams(self, x: Tensor, prediction: Tensor | None = None) -> QParams:
        """The qparams that x, (B, ...), is quantized with, shaped to broadcast against it."""
        axis = self.channel_axis
        if self.predictor is not None:
            predicted = (self.predictor.predict(self, x) if prediction is None else prediction).to(
                compute_dtype(x.dtype)
            )
            found = from_extents(self.method, predicted.unbind(1), self.signed, self.clip_factor)
            return valid(found).map(lambda p: lay_out(p, x, axis, per_sample=True))
        if self.method.qparams == "dynamic":
            found_extents = extents(x, self.method, self.signed, axis)
            if self.method.scope == "batch":
                found_extents = tuple(e.amax(0, keepdim=True) for e in found_extents)
            found = from_extents(self.method, found_extents, self.signed, self.clip_factor)
            return found.map(lambda p: lay_out(p, x, axis, per_sample=True))
        static = QParams(*(p if p.numel() else None for p in (self.scale, self.lower, self.upper)))
        return static.map(lambda p: lay_out(p.reshape(-1), x, axis, per_sample=False))

    def fake_quantize(self, x: Tensor, prediction: Tensor | None = None) -> Tensor:
        """Quantize and dequantize x, (B, ...), with the decided parameters; in the dtype of x."""
        self._check_tensor(x)
        if not torch.compiler.is_compiling() and x.numel() == 0:
            return x
        self._check_channels(x)
        if prediction is None:
            self._offer(x)
        method, axis = self.method, self.channel_axis
        scale, lower, upper = self.runtime_qparams(x, prediction)
        if isinstance(method, DenseSparse):
            return F.dense_sparse_fake_quantize(x, lower, upper, method.bits)  # type: ignore[arg-type]
        if scale is None:
            return F.affine_fake_quantize(x, lower, upper, method.bits)  # type: ignore[arg-type]
        if isinstance(method, DQA):
            step, low, high = (F.along_channels(v, x, axis) for v in (self.grid_step, self.grid_low, self.grid_high))
            return F.grid_fake_quantize(x, scale * step, low, high)
        if isinstance(method, NoisyQuant):
            return F.noisyquant_fake_quantize(x, scale, self.noise, method.bits, signed=self.signed, channel_axis=axis)
        return F.direct_fake_quantize(x, scale, method.bits, signed=self.signed)

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
                if isinstance(self.method, DQA) and self.ranked:
                    self.set_extra_bits(self.extra_bits)
        self._check_channels(x)
        augmenting = self.tap is not None and self.tap[0].augmenting
        if self.predictor is not None:
            self.predictor.start(self, x)
        self._offer(x)
        if self.predictor is not None:
            self.predictor.observe(self, x, statistic(x, self.method, self._axis))
        if not augmenting:
            self.calibration.observe(x, self._rows(x), self.method, self._axis, moving=self._state == "qat")

    def _offer(self, x: Tensor) -> None:
        """Give the features of x to the quantizers that read them, where the graph has no edges for that."""
        if self.tap is not None and self.tap[1]:
            self.tap[0].tap(self.name, self.tap[1], x)

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

    def _rows(self, x: Tensor) -> Tensor:
        """(B, D, L): what the record keeps columns of."""
        if self.consumer_geometry and x.ndim == 4:
            kernel, dilation, stride = self.consumer_geometry
            if all(n > d * (k - 1) for n, d, k in zip(x.shape[2:], dilation, kernel, strict=True)):
                return nn.functional.unfold(grouped(x, "tensor", 1).view_as(x), kernel, dilation, 0, stride)
        return grouped(x, "channel" if self.uses_channels else "tensor", self.channel_axis)

    def derive_grid(self) -> None:
        """Recompute DQA's grid (step, low, high of each channel) from extra_bits and the sign."""
        if isinstance(self.method, DQA) and self.extra_bits.numel():
            one = torch.ones((), device=self.extra_bits.device)
            self.grid_step, self.grid_low, self.grid_high = F.dqa_grid(
                one, self.extra_bits, self.method.bits, signed=self.signed
            )

    # ------------------------------------------------------------ state_dict

    def get_extra_state(self) -> Tensor:
        """What is not a buffer, as UTF-8 JSON in a uint8 tensor: loads with weights_only and fits safetensors."""
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
        if self.tap is not None:
            state["tap"] = [self.tap[0].name, list(self.tap[1])]
        return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8).clone()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # before any buffer is touched: a refused state changes nothing
        if prefix + "_extra_state" in state_dict:
            self._read_extra_state(state_dict[prefix + "_extra_state"])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _read_extra_state(self, state: Any) -> dict[str, Any]:
        try:
            loaded: dict[str, Any] = json.loads(bytes(state.cpu().numpy()).decode())
            method = method_from_dict(loaded["method"])
            for key in ("state", "axis", "channels", "signed", "ranked", "searched", "index"):
                loaded[key]
            if self.predictor is not None:
                loaded["predictor"]["site"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StateMismatch(
                f"{self.label}: the extra state in the state_dict is damaged or not ours ({type(error).__name__})."
            ) from error
        if method != self.method:
            raise StateMismatch(
                f"{self.label}: the state_dict holds {method}, this quantizer is {self.method}. Prepare the model "
                "with the methods it was saved with."
            )
        return loaded

    def set_extra_state(self, state: Tensor) -> None:
        """Inverse of `get_extra_state`.

        Raises:
            StateMismatch: the state belongs to another method, or is damaged.
        """
        loaded = self._read_extra_state(state)
        self._state, self._axis, self._channels = loaded["state"], loaded["axis"], loaded["channels"]
        self._signed, self.ranked, self.searched = loaded["signed"], loaded["ranked"], loaded["searched"]
        self.index = loaded["index"] if self.index is None else self.index
        if self.predictor is not None:
            self.predictor.restore(loaded["predictor"])
        if self.tap is None and loaded.get("tap"):
            name, modes = loaded["tap"]
            self.tap = (Bus.named(name), tuple(modes))


def _derive_after_loading(quantizer: nn.Module, _: Any) -> None:
    """The grid depends on the sign, which the calibration record knows: that one is loaded last."""
    if isinstance(quantizer, ActivationQuantizer):
        quantizer.derive_grid()
