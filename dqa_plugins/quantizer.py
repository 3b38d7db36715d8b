"""ActivationQuantizer: the one module that every adapter places.

It joins a method (how a tensor becomes codes), a qparams source (where scale or thresholds come from) and a state:

    observe  returns x and records it (the initial state)
    frozen   fake-quantizes; no statistic moves, whatever `.training` is
    qat      training mode records and fake-quantizes, eval mode fake-quantizes

`train()` and `eval()` never change the state; `state_dict` carries it.
"""

from __future__ import annotations

import itertools
import operator
import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .calibration import rows_to_keep
from .errors import (
    ChannelAxisError,
    ChannelMismatch,
    DQAWarning,
    InvalidArgument,
    NonFiniteInput,
    UncalibratedQuantizer,
    UnsupportedCombination,
    UnsupportedInput,
)
from .grid import QParams
from .kernels import eager
from .method import Method
from .parameters import QuantizerParameters
from .ranges import measure
from .resolve import kept_values, next_layer_weight, static_qparams
from .rounding import cast
from .scripted import scripted, traced

LARGEST = 2**31 - 1  # values of a tensor: what int32 indices of kernels and backends reach
# of frozen quantizers: beside them, so that no copy and no file takes it along
_tables: WeakKeyDictionary[nn.Module, tuple[Any, ...]] = WeakKeyDictionary()
_written = operator.attrgetter("_version")
_first_executions = itertools.count()
# float8 has neither arithmetic nor infinities to saturate at: it is a format to store in, not one to compute with
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_LISTED = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)


class ActivationQuantizer(QuantizerParameters):
    """Quantizes one activation.

    Args:
        method: Direct, DQA, NoisyQuant or DenseSparse.
        name: the site's name, for messages, rank tables and the noise of NoisyQuant.
        producer_axis: channel axis where the method names none (adapters know the layer before).
        index: position in the order of execution; None: set at the first call.

    Raises:
        NotAMethod: `method` is not one.
    """

    def __init__(self, method: Method, *, name: str = "", producer_axis: int = 1, index: int | None = None) -> None:
        super().__init__(method, name=name, producer_axis=producer_axis, index=index)
        # where freezing searches against the next linear layer, its geometry, set by the adapter before calibration:
        # () for Linear, (kernel, dilation, stride) for Conv2d; None: unknown.
        self.consumer_geometry: tuple[Any, ...] | None = None
        self.consumer_missing = False
        # called with the name and every tensor before it is quantized (QPP: others read its features)
        self.listener: Callable[[str, Tensor], None] | None = None

    # ------------------------------------------------------------ states
    __prepare_scriptable__ = scripted  # torch.jit.script calls it

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
            for name, value in decided._asdict().items():
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
            InvalidArgument: an entry is out of range.
        """
        if not self.method.has_important_channels:
            raise UnsupportedCombination(f"{self.label} has no important channels; use DQA to rank channels.")
        if not isinstance(extra_bits, Tensor) or extra_bits.is_floating_point() or extra_bits.ndim != 1:
            raise InvalidArgument(f"{self.label}: extra bits are a (C,) tensor of integers; got {extra_bits!r}.")
        if self._channels is not None and tuple(extra_bits.shape) != (self._channels,):
            raise ChannelMismatch(
                f"{self.label} has {self._channels} channels; got extra bits of shape {tuple(extra_bits.shape)}."
            )
        bits = self.method.bits
        if extra_bits.numel() and not 1 - bits <= int(extra_bits.min()) <= int(extra_bits.max()) <= bits:
            raise InvalidArgument(
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
        if isinstance(x, Proxy):
            return traced(self, x, prediction)
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

    def fake_quantize(self, x: Tensor, prediction: Tensor | None = None) -> Tensor:
        """Quantize and dequantize x, (B, ...), with the decided parameters; in the dtype of x."""
        self._check_tensor(x)
        if not torch.compiler.is_compiling() and x.numel() == 0:
            return x
        self._check_channels(x)
        if prediction is None and self.listener is not None:
            self.listener(self.name, x)
        table = self._table(x, prediction)
        if table is not None:
            return eager.fake_quantize(x, table)
        return self.grid(x, prediction).fake_quantize(x)

    def _table(self, x: Tensor, prediction: Tensor | None) -> eager.Table | None:
        """What the kernel reads in place of `grid`; None where kernels do not serve x, or the method has its own way.

        What no sample changes is kept until a buffer is another one, or has been written.
        """
        if self._state != "frozen" or not eager.usable(x):
            return None
        buffers = tuple(self._buffers.values())
        try:
            key = (x.ndim, self._axis, *map(id, buffers), *map(_written, buffers))
        except RuntimeError:  # inference tensors count no writes
            return None
        held = _tables.get(self)
        if held is None or held[0] != key:
            held = _tables[self] = key, buffers, self._fixed_table(x)
        fixed, method = held[2], self.method
        if fixed is None or method.source == "static":
            return fixed
        found = self.source.extents(self, x, prediction)
        if found is None:
            return None
        if self.clip_factor is not None:
            found = found * cast(self.clip_factor, found.dtype)
        steps = (2**method.bits - 1) / 2 if method.uses_range else method.steps(self.signed)
        axis, predicted = self.channel_axis % x.ndim, self.predictor is not None
        return eager.derive(fixed, axis, found, steps, ranged=method.uses_range, predicted=predicted)

    def _fixed_table(self, x: Tensor) -> eager.Table | None:
        """The table of a static grid, of the grid of scale 1, or of a range from 0 to 1."""
        method = self.method
        if method.source == "static":
            return self.grid(x).table(x)
        if not method.uses_range:
            return self.unit_grid_for(x).table(x)
        if type(method).grid is not Method.grid:
            return None
        one = torch.ones((), device=x.device)
        return method.grid(QParams(None, one - one, one), self.signed, {}).table(x)

    # ------------------------------------------------------------ calibration

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
        if x.is_meta:
            raise UnsupportedInput(
                f"{self.label} cannot observe a meta tensor, shape {tuple(x.shape)}: it has no values. Calibrate on "
                "a device; once frozen the quantizer takes meta tensors too."
            )
        x = x.detach()
        axis = self._checked_axis(x) if self.uses_channels else self.channel_axis
        self._check_channels(x)
        measured = measure(x, self.method, axis)
        if measured is None:
            nans, infs = int(x.isnan().sum()), int(x.isinf().sum())
            raise NonFiniteInput(
                f"{self.label} saw {nans} NaN and {infs} Inf values in calibration data of shape {tuple(x.shape)}; "
                "no scale can be taken from them. Find the sample, or the layer before, that makes them."
            )
        if self.index is None:
            self.index = next(_first_executions)
        self._axis = self.channel_axis
        if self.uses_channels:
            if self._channels is None:
                self._channels = x.shape[axis]
                if self.ranked:
                    self.set_extra_bits(self.extra_bits)
        if self.listener is not None:
            self.listener(self.name, x)
        if self.source.observe(self, x, measured.values):
            # what is kept are the first samples: rows of others need not be made
            rows = rows_to_keep(x[: self.calibration.room], self.uses_channels, self._axis, self.consumer_geometry)
            self.calibration.observe(measured, rows, self.method, moving=self._state == "qat")

    def adopt(self, axis: int, channels: int | None, index: int | None) -> None:
        """Take what another process learnt of this site: channel axis, channels, and position in the execution."""
        self._axis, self.index = axis, index
        if self._channels is None and channels is not None:
            self._channels = channels
            if self.ranked:
                self.set_extra_bits(self.extra_bits)

    def _check_tensor(self, x: object) -> None:
        if not isinstance(x, Tensor):
            raise UnsupportedInput(f"{self.label} quantizes tensors; got a {type(x).__name__}.")
        # nested tensors first: they have no shape
        if x.is_nested or x.layout != torch.strided:
            layout = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
            raise UnsupportedInput(
                f"{self.label} quantizes dense tensors; got a {layout} one of {x.dtype}. Make it dense before: "
                "to_dense(), to_padded_tensor(...) where it is nested."
            )
        if x.dtype not in DTYPES or x.ndim == 0:
            raise UnsupportedInput(
                f"{self.label} quantizes floating-point tensors with a batch axis ({_LISTED}); got {x.dtype}, shape "
                f"{tuple(x.shape)}. Convert it before, or leave this layer out of quantization."
            )
        # a traced size would become a condition of the exported program
        if not torch.compiler.is_compiling() and x.numel() > LARGEST:
            raise UnsupportedInput(
                f"{self.label} quantizes tensors of up to 2^31 - 1 values, and got {x.numel()} in a tensor of shape "
                f"{tuple(x.shape)}. Use smaller batches."
            )

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
