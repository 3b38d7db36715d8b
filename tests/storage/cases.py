"""Hypothesis strategies: quantizers of every kind, and tensors that they were calibrated on."""

from __future__ import annotations

import warnings

import hypothesis.strategies as st
import numpy as np
import torch
from torch import Tensor

from dqa_plugins import DQA, ActivationQuantizer, DenseSparse, Direct, NoisyQuant
from dqa_plugins.errors import DQAWarning
from dqa_plugins.methods import Method

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
CODINGS = ("none", "shift_error", "joint", "auto")


@st.composite
def methods(draw: st.DrawFn) -> Method:
    """Any method, any of the fields that decide how it is stored."""
    fields = {
        "bits": draw(st.integers(2, 8)),
        "signed": draw(st.sampled_from([None, True, False])),
        "granularity": draw(st.sampled_from(["tensor", "channel"])),
        "qparams": draw(st.sampled_from(["static", "dynamic"])),
    }
    kind = draw(st.sampled_from(["dqa", "dqa", "direct", "affine", "noise", "sparse"]))
    if kind == "dqa":
        extra = draw(st.integers(0, fields["bits"]))
        return DQA(**fields, extra_bits=extra, ratio=draw(st.floats(0, 1)))
    if kind == "direct":
        return Direct(**fields)
    if kind == "affine":
        return Direct(**fields, symmetric=False)
    if kind == "noise":
        return NoisyQuant(**fields, amplitude=0.5)
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
    if isinstance(method, DQA) and draw(st.booleans()):
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
