"""Hypothesis strategies: quantizers of every kind, and tensors that they were calibrated on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import hypothesis.strategies as st
import numpy as np
import torch
from torch import Tensor

from dqa_plugins import DQA, ActivationQuantizer, DenseSparse, Direct, Method, NoisyQuant, register_method
from dqa_plugins.errors import DQAWarning
from dqa_plugins.grid import Grid, QParams
from dqa_plugins.search import Kept

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
CODINGS = ("none", "shift_error", "joint", "auto")


@register_method
@dataclass(frozen=True, kw_only=True)
class Narrow(Method):
    """A user's method: as many steps below zero as above, a step of its own and an offset for every channel."""

    name: ClassVar[str] = "narrow"
    vectors: ClassVar[tuple[str, ...]] = ("offsets", "fineness")

    def decide(self, kept: Kept) -> dict[str, Tensor]:
        count = kept.channels
        return {"offsets": torch.linspace(-0.4, 0.3, count), "fineness": torch.linspace(1, 3, count)}

    def grid(self, qparams: QParams, signed: bool, vectors: Mapping[str, Tensor]) -> Grid:
        plain = super().grid(qparams, signed, {})
        if not vectors:
            return plain
        most = (vectors["fineness"] * 2 ** (self.bits - 1)).floor()
        return Grid(plain.step / vectors["fineness"], 1 - most, most, bias=vectors["offsets"] * plain.step)


@register_method
@dataclass(frozen=True, kw_only=True)
class Banded(Method):
    """A user's method: codes far from zero, a third of the range on either side in float."""

    name: ClassVar[str] = "banded"

    @property
    def uses_range(self) -> bool:
        return True

    def grid(self, qparams: QParams, signed: bool, vectors: Mapping[str, Tensor]) -> Grid:
        lower, upper = qparams.thresholds
        third = (upper - lower) / 3
        step = third / 2**self.bits
        keep = (lower + third, upper - third)
        return Grid(step, 1000, 1000 + 2**self.bits, torch.full_like(step, 1000.0), -lower - third, keep)


@st.composite
def methods(draw: st.DrawFn) -> Method:
    """Any method, any of the fields that decide how it is stored."""
    fields = {
        "bits": draw(st.integers(2, 8)),
        "signed": draw(st.sampled_from([None, True, False])),
        "granularity": draw(st.sampled_from(["tensor", "channel"])),
        "qparams": draw(st.sampled_from(["static", "dynamic"])),
    }
    kind = draw(st.sampled_from(["dqa", "dqa", "direct", "affine", "noise", "sparse", "narrow", "banded"]))
    if kind == "dqa":
        extra = draw(st.integers(0, fields["bits"]))
        return DQA(**fields, extra_bits=extra, ratio=draw(st.floats(0, 1)))
    if kind == "direct":
        return Direct(**fields)
    if kind == "affine":
        return Direct(**fields, symmetric=False)
    if kind == "noise":
        return NoisyQuant(**fields, amplitude=0.5)
    if kind in ("narrow", "banded"):
        return (Narrow if kind == "narrow" else Banded)(**fields)
    return DenseSparse(**fields, density=draw(st.sampled_from([0.0, 0.01, 0.3])))


def tensor(shape: tuple[int, ...], seed: int, kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """A reproducible activation: "normal", "relu", "sparse", "zeros", "steps" (many ties), "wide"."""
    noise = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    x = torch.from_numpy(noise) if noise.ndim else torch.tensor(noise)
    if kind == "relu":
        x = x.clamp(min=0)
    elif kind == "sparse":
        x = torch.where(x > 2, x, torch.zeros_like(x))
    elif kind == "zeros":
        x = torch.zeros_like(x)
    elif kind == "steps":
        x = (x * 8).round() / 16
    elif kind == "wide":
        x = x.double().pow(5).clamp(-60000, 60000).float()
    return x.to(dtype)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Shapes from one element to several chunks, two to five dimensions."""
    shape = draw(
        st.one_of(
            st.lists(st.integers(1, 7), min_size=2, max_size=5).map(tuple),
            st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(60, 90), st.integers(60, 70)),
        )
    )
    kind = draw(st.sampled_from(["normal", "relu", "sparse", "zeros", "steps", "wide"]))
    return tensor(shape, draw(st.integers(0, 1000)), kind, draw(st.sampled_from(DTYPES)))


@st.composite
def frozen(draw: st.DrawFn) -> tuple[ActivationQuantizer, Tensor]:
    """A frozen quantizer and a tensor for it, which need not be the one that it was calibrated on."""
    x = draw(tensors())
    method = draw(methods()).replace(channel_axis=draw(st.integers(1, x.ndim - 1)))
    negative = draw(st.booleans())
    if negative and draw(st.booleans()):
        method = method.replace(channel_axis=method.channel_axis - x.ndim)
    quantizer = quantizer_for(method, x)
    if method.has_important_channels and draw(st.booleans()):
        low, high = 1 - method.bits, method.bits
        size = quantizer.num_channels
        vector = draw(st.lists(st.integers(low, high), min_size=size, max_size=size))
        quantizer.set_extra_bits(torch.tensor(vector))
    scale = draw(st.sampled_from([1.0, 0.3, 2.0]))
    return quantizer, (x * scale).to(x.dtype)


def quantizer_for(method: Method, x: Tensor, name: str = "block.relu") -> ActivationQuantizer:
    """A quantizer that was calibrated on x and frozen."""
    quantizer = ActivationQuantizer(method, name=name)
    quantizer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DQAWarning)  # signed=False on purpose
        return quantizer.freeze()
