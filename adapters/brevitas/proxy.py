"""The proxy that Brevitas' layers hold: it owns the ActivationQuantizer and speaks Brevitas' protocol around it.

calibration_mode on          the quantizer observes; the activation passes unquantized
calibration_mode left        the quantizer is frozen; entering the mode again starts over
training, never calibrated   the quantizer is in the state "qat"
eval, never calibrated       UncalibratedQuantizer
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import torch
from brevitas import config
from brevitas.core.scaling import ConstScaling
from brevitas.nn import QuantIdentity
from brevitas.nn.quant_layer import QuantNonLinearActLayer, QuantWeightBiasInputOutputLayer
from brevitas.proxy import ActQuantProxyFromInjector
from brevitas.quant_tensor import IntQuantTensor, QuantTensor
from torch import Tensor, nn
from torch.fx import Proxy

from dqa_plugins.errors import ChannelMismatch, ExportFailed, UncalibratedQuantizer, UnsupportedCombination
from dqa_plugins.quantizer import ActivationQuantizer

from .fields import activation, resolve_method
from .grid import CommonGrid, common_grid, require_common_grid, why_no_common_grid
from .names import channel_axis_of, name_from_callers, site_of, started_without_axis


class _NoStockScale(nn.Module):
    """Stands where Brevitas' graph quantization looks for the scaling of a stock quantizer.

    A constant scaling makes `align_input_quant` requantize the inputs of an add or cat by a shared QuantIdentity, and
    leave our quantizer alone (0.13.4).
    """

    def __init__(self) -> None:
        super().__init__()
        self.scaling_impl = ConstScaling(1.0)
        self.int_scaling_impl = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Called by QuantLSTM(coupled_input_forget_gates=True), which quantizes ones by the quantizer of its gate.

        Raises:
            UnsupportedCombination: always.
        """
        raise UnsupportedCombination(
            "QuantLSTM(coupled_input_forget_gates=True) needs a stock sigmoid_quant: give it one, or leave the gates "
            "uncoupled."
        )


class _NoScale:
    """The scale of a quantizer without an integer grid: a typed error once Brevitas makes a QuantTensor with it."""

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        self.quantizer = quantizer

    def __float__(self) -> float:
        require_common_grid(self.quantizer.method, self.quantizer.label)
        return float("nan")


class _Fused(nn.Module):
    """Activation function and quantizer, under the names of Brevitas' FusedActivationQuantProxy.

    Not a ScriptModule, so BREVITAS_JIT=1 scripts the stock quantizers and leaves ours in Python.
    """

    proxy: PluginActProxy

    def __init__(self, activation_impl: nn.Module, proxy: PluginActProxy) -> None:
        super().__init__()
        self.activation_impl = activation_impl
        self.tensor_quant = _NoStockScale()
        self.__dict__["proxy"] = proxy  # which owns this module: not a submodule of it

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        """(value, scale, zero point, bit width), as the cells of QuantRNN and QuantLSTM call it."""
        y = self.proxy(x)
        if isinstance(y, QuantTensor):
            return y.value, y.scale, y.zero_point, y.bit_width
        quantizer = self.proxy.quantizer
        if quantizer.state != "frozen":
            return y, None, None, None
        if why_no_common_grid(quantizer.method) is None:
            return y, *common_grid(quantizer)[:3]
        return y, _NoScale(quantizer), None, None


class PluginActProxy(ActQuantProxyFromInjector):
    """An activation proxy whose quantizer is `self.quantizer`, an ActivationQuantizer.

    Returns an IntQuantTensor where the method has a common grid and the layer wants one, else a tensor.
    """

    quantizer: ActivationQuantizer
    _observing = False  # inside calibration_mode
    _fresh = False  # no batch seen since calibration_mode was entered
    _pending = False  # calibration_mode was entered and not yet left
    _order: list[ActivationQuantizer] | None = None  # given while the order of execution is found (see `predict`)
    judged_axis = False  # the quantizer's channel axis is known from the graph (see `place`)
    _handled = 0  # identity of the exception being handled when it was entered

    # ------------------------------------------------------------ construction

    def init_tensor_quant(self) -> None:
        """Make the quantizer, once: Brevitas calls this again on load_state_dict and for each sharing layer."""
        self.is_quant_enabled = True
        layer = self.tracked_module_list[-1]
        if "quantizer" not in self._modules:
            method = resolve_method(self.quant_injector, layer)
            self.fused_activation_quant_proxy = _Fused(activation(self.quant_injector), self)
            self.quantizer = ActivationQuantizer(method)
        if isinstance(layer, QuantNonLinearActLayer) and layer.return_quant_tensor:
            require_common_grid(self.quantizer.method, self._label(layer))

    def _label(self, layer: nn.Module) -> str:
        if self.quantizer.name:
            return self.quantizer.label
        return f"{type(layer).__name__}(act_quant={type(self.quantizer.method).__name__}Act)"

    # ------------------------------------------------------------ what Brevitas asks

    @property
    def is_signed(self) -> bool:
        """Whether codes are signed, as resolved by calibration."""
        return self.quantizer.signed and not self.quantizer.method.uses_range

    @is_signed.setter
    def is_signed(self, value: object) -> None:
        pass  # Brevitas copies the injector's `signed` here, which the method already has

    @property
    def is_narrow_range(self) -> bool:
        """False: codes go down to -2^(n-1)."""
        return False

    @property
    def rounding_mode(self) -> str:
        """Half to even."""
        return "ROUND"

    @property
    def input_view_impl(self) -> nn.Module:
        """No groups."""
        return nn.Identity()

    def scale(self, force_eval: bool = True) -> Tensor | None:
        """() step of the common grid, delta / 2^m for DQA.

        Raises:
            UncalibratedQuantizer, UnsupportedCombination: there is no grid yet, or none at all.
        """
        return self._grid().scale if self.is_quant_enabled else None

    def zero_point(self, force_eval: bool = True) -> Tensor | None:
        """() in codes. Raises as `scale`."""
        return self._grid().zero_point if self.is_quant_enabled else None

    def bit_width(self, force_eval: bool = True) -> Tensor | None:
        """() of the common grid, n + m for DQA. Raises as `scale`."""
        return self._grid().bit_width if self.is_quant_enabled else None

    def _grid(self) -> CommonGrid:
        if not self.quantizer.calibrated:
            raise self._uncalibrated()
        return common_grid(self.quantizer)

    # ------------------------------------------------------------ calibration

    @property
    def observer_only(self) -> bool:
        """Brevitas sets this on every part of a proxy that has it, when calibration_mode is entered and left."""
        return self._observing

    @observer_only.setter
    def observer_only(self, value: bool) -> None:
        if value and not self._observing:
            self._fresh = self._pending = True
            self._handled = id(sys.exc_info()[1])
        self._observing = bool(value)

    def init_scale(self) -> None:
        """What calibration_mode calls when it is left: freeze.

        A quantizer that saw no data is left as it is, and raises when it is used. So is one whose calibration an
        exception cut short: freezing it would hide that its statistics are those of part of the data.
        """
        interrupted = id(sys.exc_info()[1]) != self._handled
        if self._pending and not self._fresh and not interrupted:
            self.quantizer.freeze()
        self._pending = False

    def _observe(self, x: Tensor, axis: int | None) -> Tensor:
        if self._fresh:
            self._start_over()
            self._fresh = False
            self._learn_site(axis)
        if self._order is not None:
            if self.quantizer not in self._order:
                self._order.append(self.quantizer)
            return x
        try:
            return self.quantizer(x)
        except ChannelMismatch as error:
            if self.quantizer.calibration.count == 0:
                raise
            raise ChannelMismatch(
                f"{error} Where one activation module stands behind several layers, as in bottleneck ResNets, give "
                "each a module of its own first: brevitas.graph.standardize.DuplicateSharedStatelessModule()"
                ".apply(torch.fx.symbolic_trace(model))."
            ) from error

    def _start_over(self) -> None:
        old = self.quantizer
        if old.state == "observe" and old.calibration.count == 0:
            return
        fresh = ActivationQuantizer(old.method, name=old.name, producer_axis=old.producer_axis, index=old.index)
        if old.ranked:
            fresh.set_extra_bits(old.extra_bits)
        self.quantizer = fresh.to(old.extra_bits.device).train(old.training)

    def _learn_site(self, axis: int | None) -> None:
        if not self.quantizer.name:
            self.quantizer.name = name_from_callers(self)
        if axis is not None and not self.judged_axis:
            self.quantizer.producer_axis = axis

    # ------------------------------------------------------------ forward

    def forward(self, x: Tensor | QuantTensor) -> Tensor | QuantTensor:
        """Activation function and quantizer.

        Args:
            x: (B, ...).

        Raises:
            UncalibratedQuantizer: it saw no data, and the model is not being trained.
            ExportFailed: the exporter has no handler for our quantizers.
        """
        value = x.value if isinstance(x, QuantTensor) else x
        y = self.fused_activation_quant_proxy.activation_impl(value)
        if not self.is_quant_enabled:
            return self.create_quant_tensor(y, x) if self.is_passthrough_act and isinstance(x, QuantTensor) else y
        if self._observing:
            return self._observe(y, channel_axis_of(value))
        if self.export_mode:
            if self.export_handler is None:
                raise ExportFailed(f"{self.quantizer.label}: this exporter of Brevitas has no handler for it.")
            y, *metadata = self.export_handler(y)
            if metadata[0] is None or self.skip_create_quant_tensor or not self._wanted():
                return y
            return self.create_quant_tensor((y, *metadata), x)
        if not isinstance(self.quantizer, ActivationQuantizer):
            return self.quantizer(y)  # a lean one, put here by dqa_plugins.export: plain tensors only
        self._check_started(y)
        y = self.quantizer(y)
        if self.skip_create_quant_tensor or isinstance(y, Proxy) or not self._wanted():
            return y
        grid = common_grid(self.quantizer)
        return IntQuantTensor(y, grid.scale, grid.zero_point, grid.bit_width, grid.signed, self.training)

    def _wanted(self) -> bool:
        """Whether a layer makes use of a QuantTensor: it returns it, or computes with it."""
        method = self.quantizer.method
        for layer in self.tracked_module_list:
            required = layer.return_quant_tensor
            if type(layer) is QuantIdentity and why_no_common_grid(method) is None:
                return True  # recurrent layers call the proxy of one for the scale of their bias; others unpack it
            if isinstance(layer, QuantWeightBiasInputOutputLayer) and layer.input_quant is self:
                # the scale of its bias and of its output follow from that of its input
                bias = layer.bias is not None and layer.bias_quant.is_quant_enabled
                required = (required and not layer.output_quant.is_quant_enabled) or (
                    bias and layer.bias_quant.requires_input_scale
                )
                if not required and why_no_common_grid(method) is None:
                    return True
            if required:
                require_common_grid(method, self.quantizer.label)
                return True
        return False

    def _check_started(self, x: Tensor) -> None:
        if self.quantizer.state != "observe":
            return
        self._learn_site(None)
        if not self.training or not torch.is_grad_enabled() or self.quantizer.calibration.count:
            raise self._uncalibrated()
        if self.quantizer.uses_channels and self.quantizer.method.channel_axis is None and started_without_axis(x):
            raise UnsupportedCombination(
                f"{self.quantizer.label}: training starts without calibration, so nothing tells whether a tensor of "
                f"shape {tuple(x.shape)} is (batch, tokens, channels) or (batch, channels, length). Give "
                "channel_axis=-1 or 1, or calibrate first."
            )
        self.quantizer.start_qat()

    def _uncalibrated(self) -> UncalibratedQuantizer:
        cut = self.quantizer.calibration.count
        event = f"calibration, which an error cut short after {cut} samples" if cut else "having seen data"
        return UncalibratedQuantizer(
            f"{self.quantizer.label} was run without {'a complete ' if cut else ''}{event}. Run calibration batches "
            "through the model inside brevitas.graph.calibrate.calibration_mode, or train it."
        )

    def split_quantizer(self, layer: nn.Module) -> tuple[nn.Module, nn.Module] | None:
        """Activation function and quantizer of a call of this proxy, or of the layer around it; None: it does more.

        `storage.prepare_stored` packs what is between the two.
        """
        plain = layer is self or (
            isinstance(layer, QuantNonLinearActLayer)
            and layer.act_quant is self
            and not layer.return_quant_tensor
            and not layer.input_quant.is_quant_enabled
        )
        if not plain or self._observing or self.export_mode or self.quantizer.state != "frozen":
            return None
        return self.fused_activation_quant_proxy.activation_impl, self.quantizer

    def __prepare_scriptable__(self) -> NoReturn:
        """Called by torch.jit.script.

        Raises:
            UnsupportedCombination: always; stock layers fail there too.
        """
        raise UnsupportedCombination(
            f"{self.quantizer.label}: torch.jit.script takes no layers of Brevitas; use torch.export."
        )

    # ------------------------------------------------------------ state_dict

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = f"{prefix}quantizer."
        if config.IGNORE_MISSING_KEYS and not any(key.startswith(own) for key in state_dict):
            # a float module's state_dict, loaded by a Brevitas rewriter: keep what is here
            state_dict.update({own + key: value for key, value in self.quantizer.state_dict().items()})
        elif not self.quantizer.name:  # the prefix of a rewriter begins at the layer: no name
            site = site_of(prefix.removesuffix("."))
            self.quantizer.name = "" if site == "input_quant" else site
        super()._load_from_state_dict(state_dict, prefix, *args)
