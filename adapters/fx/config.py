"""A method in FX's own configuration: QConfig and QConfigMapping."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.ao.quantization import (
    FakeQuantize,
    MinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PlaceholderObserver,
    QConfig,
    QConfigMapping,
)

from dqa_plugins.errors import NotAMethod
from dqa_plugins.host.skip import check_skip
from dqa_plugins.method import Method
from dqa_plugins.methods import DQA, DenseSparse, Direct, NoisyQuant, check_method
from dqa_plugins.options import WeightScheme, check_weights
from dqa_plugins.prediction import QPP

from .observer import FXObserver

SKIP = "skip:"  # in front of a name among those of modules: one of `skip`


class PluginQConfigMapping(QConfigMapping):
    """A QConfigMapping that also knows which layers to leave float, by position or by name.

    Everything of QConfigMapping works on it: set_module_name, set_object_type, set_module_name_regex, ... What to skip
    is kept among the names of modules, so that `QConfigMapping.from_dict(mapping.to_dict())` skips the same.
    """

    def __init__(self, skip: Iterable[str] = ()) -> None:
        super().__init__()
        for name in check_skip(skip):
            self.set_module_name(SKIP + name, None)


def skipped(mapping: QConfigMapping) -> tuple[str, ...]:
    """The entries of `skip` in a mapping."""
    return tuple(name.removeprefix(SKIP) for name in mapping.module_name_qconfigs if name.startswith(SKIP))


class _FloatWeight(PlaceholderObserver):
    """Observes nothing; QAT's layers give an observer of weights a keyword that a placeholder does not take."""

    def __init__(self, factory_kwargs: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class _WeightRange(MinMaxObserver):
    """Eq. 16 of the QPP paper: s = (max - min) / (2^t - 1) over the whole tensor, w~ = round(w / s) * s.

    The zero point only moves the codes into t bits; as in MinMaxObserver the range is widened to hold zero. Every
    call sees the weight of that moment: in QAT a minimum of the past must not stay.
    """

    def forward(self, x_orig: torch.Tensor) -> torch.Tensor:
        self.reset_min_max_vals()
        return super().forward(x_orig)


def weight_constructor(weight_bits: int | None, weight_scheme: WeightScheme, channel_axis: int = 0) -> Any:
    """What FX calls to observe a weight.

    Args:
        weight_bits: 2 to 8; None leaves weights float.
        weight_scheme: "channel": symmetric, one scale per output channel, codes in +-(2^(b-1) - 1); "qpp": eq. 16 of
            the QPP paper, asymmetric, one scale per tensor.
        channel_axis: of the output channels in the weight.

    Raises:
        InvalidArgument: other values.
    """
    check_weights("get_qconfig", weight_bits, weight_scheme)
    if weight_bits is None:
        # NoopObserver(qint8) and weight=None both fail in prepare_fx (torch 2.13): a float32 placeholder passes
        return _FloatWeight.with_args(dtype=torch.float32)
    if weight_scheme == "qpp":
        half = 2 ** (weight_bits - 1)
        return FakeQuantize.with_args(
            observer=_WeightRange,
            quant_min=-half,
            quant_max=half - 1,
            dtype=torch.qint8,
            qscheme=torch.per_tensor_affine,
        )
    # FX's reference modules clamp to eight bits whatever quant_max says: with the range symmetric around zero no
    # narrower code can ever leave it
    limit = 2 ** (weight_bits - 1) - 1
    return FakeQuantize.with_args(
        observer=MovingAveragePerChannelMinMaxObserver,
        averaging_constant=1.0,  # the weight of this moment, also in QAT
        quant_min=-limit,
        quant_max=limit,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
        ch_axis=channel_axis,
    )


def _activation(method: Method) -> Any:
    return FXObserver.with_args(method=check_method(method, "get_qconfig"))


def get_qconfig(
    method: Method, *, weight_bits: int | None = 8, weight_scheme: WeightScheme = "channel", weight_axis: int = 0
) -> QConfig:
    """The method as a QConfig, for QConfigMapping's own set_module_name, set_object_type and so on.

    Args:
        method: Direct, DQA, NoisyQuant or DenseSparse.
        weight_bits, weight_scheme: see `weight_constructor`.
        weight_axis: axis of the output channels in the weight (1 for ConvTranspose).

    Raises:
        NotAMethod, InvalidArgument.
    """
    return QConfig(activation=_activation(method), weight=weight_constructor(weight_bits, weight_scheme, weight_axis))


def get_qconfig_mapping(
    method: Method | None,
    *,
    weight_bits: int | None = 8,
    weight_scheme: WeightScheme = "channel",
    skip: Iterable[str] = (),
) -> PluginQConfigMapping:
    """The method for a whole model, as a QConfigMapping for prepare_fx and prepare_qat_fx.

    Args:
        method: for every layer; None: float unless set for a layer.
        weight_bits, weight_scheme: see `weight_constructor`.
        skip: "first", "last" (the first and last layer with a weight), "ends" (both, where there are more than three
            such layers), or names of modules to leave float.

    Raises:
        NotAMethod, InvalidArgument.
    """
    mapping = PluginQConfigMapping(skip)
    if method is None:
        return mapping
    if isinstance(method, QConfig | QConfigMapping):
        raise NotAMethod(f"get_qconfig_mapping takes a method, such as DQA(bits=4); got a {type(method).__name__}.")
    mapping.set_global(get_qconfig(method, weight_bits=weight_bits, weight_scheme=weight_scheme))
    if weight_bits is not None and weight_scheme == "channel":
        for kind in (torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d):
            mapping.set_object_type(kind, get_qconfig(method, weight_bits=weight_bits, weight_axis=1))
    return mapping


# what docs/results/default_settings.json measured as the sensible default of each method
READY_MADE: dict[str, Method] = {
    "direct_qconfig": Direct(granularity="channel"),
    "dqa_qconfig": DQA(granularity="channel"),
    "noisyquant_qconfig": NoisyQuant(granularity="channel"),
    "dense_sparse_qconfig": DenseSparse(),
    "qpp_qconfig": DenseSparse(qparams=QPP()),
}


def ready_made(name: str) -> PluginQConfigMapping:
    """A fresh mapping each time, so that setting a layer in it changes nobody else's; the first and the last layer of
    networks with more than three stay float.

    Args:
        name: a key of `READY_MADE`.
    """
    return get_qconfig_mapping(READY_MADE[name], skip=("ends",))
