"""Hypothesis strategies: activations of every layout, dtype and character, and every method.

Values come from a seeded generator rather than element by element: fast, and shrinking still finds the smallest shape
and the simplest character.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from dqa_plugins import DQA, DenseSparse, Direct, NoisyQuant

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
CHARACTERS = ["normal", "relu", "heavy", "ties", "sparse", "zero_channel", "zeros", "constant", "tiny", "large"]


def sample_data(seed: int = 0, shape: tuple[int, ...] = (6, 5, 4, 4)) -> torch.Tensor:
    """Normal values, with a width of its own for each sample."""
    generator = torch.Generator().manual_seed(seed)
    widths = torch.rand((shape[0],) + (1,) * (len(shape) - 1), generator=generator) * 4 + 0.1
    return torch.randn(shape, generator=generator) * widths


class Case(NamedTuple):
    """Calibration batches and one more batch of the same site."""

    batches: list[Tensor]
    x: Tensor
    channel_axis: int


def values(generator: np.random.Generator, shape: tuple[int, ...], character: str, axis: int) -> np.ndarray:
    """float64 values of a certain character."""
    x = generator.standard_normal(shape)
    if character == "relu":
        x = np.maximum(x, 0)
    elif character == "heavy":
        x = x**5
    elif character == "ties":  # many quotients end in exactly one half
        x = np.rint(x * 8) / 2
    elif character == "sparse":
        x = np.where(generator.random(shape) < 0.995, 0.0, x)
    elif character == "zero_channel" and len(shape) > 1:
        np.moveaxis(x, axis, 0)[0] = 0
    elif character == "zeros":
        x = np.zeros(shape)
    elif character == "constant":
        x = np.full(shape, 0.7)
    elif character == "tiny":
        x = x * 1e-6
    elif character == "large":
        x = x * 1e3
    return x


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], int]:
    """(shape of one sample, channel axis counted with the batch, negative ones too)."""
    channels, other = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    shape, axis = draw(
        st.sampled_from(
            [
                ((channels,), 1),
                ((channels,), -1),
                ((other, channels), -1),
                ((other, channels), 2),
                ((channels, other), 1),
                ((channels, other, 3), 1),
                ((other, 3, channels), -1),
                ((other, channels, 3), -2),
                ((2, channels, other, 2), 2),
            ]
        )
    )
    return shape, axis


@st.composite
def cases(
    draw: st.DrawFn,
    dtypes: list[torch.dtype] = DTYPES,
    characters: list[str] = CHARACTERS,
) -> Case:
    shape, axis = draw(layouts())
    dtype, character = draw(st.sampled_from(dtypes)), draw(st.sampled_from(characters))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))

    def batch(size: int) -> Tensor:
        # each sample has a width of its own, so that a scale of the batch is not that of the sample
        array = values(generator, (size, *shape), character, axis)
        widths = np.exp(generator.standard_normal((size,) + (1,) * len(shape)))
        array = array if character in ("ties", "constant") else array * widths
        return torch.from_numpy(array.clip(-20_000, 20_000)).to(dtype)  # float16 ends at 65504

    batches = [batch(size) for size in sizes]
    return Case(batches, batch(draw(st.integers(1, 3))) * draw(st.sampled_from([1.0, 1.0, 3.0])), axis)


clips = st.sampled_from(["max", "max", 0.9, 0.999, 0.5, "mse"])


@st.composite
def common_fields(draw: st.DrawFn, clip: st.SearchStrategy[Any] = clips) -> dict[str, Any]:
    return {
        "bits": draw(st.integers(2, 8)),
        "signed": draw(st.sampled_from([None, True, False])),
        "granularity": draw(st.sampled_from(["tensor", "channel"])),
        "qparams": draw(st.sampled_from(["static", "dynamic"])),
        "clip": draw(clip),
        "reduce": draw(st.sampled_from([None, "max", "mean"])),
    }


@st.composite
def direct_methods(draw: st.DrawFn) -> Direct:
    fields = draw(common_fields())
    symmetric = draw(st.booleans())
    if symmetric and fields["qparams"] == "dynamic" and fields["clip"] == "max":
        fields["scope"] = draw(st.sampled_from(["sample", "batch"]))
    return Direct(**fields, symmetric=symmetric)


@st.composite
def dqa_methods(draw: st.DrawFn) -> DQA:
    fields = draw(common_fields())
    extra = draw(st.one_of(st.none(), st.integers(0, fields["bits"])))
    return DQA(**fields, extra_bits=extra, ratio=draw(st.sampled_from([0.0, 0.4, 0.5, 1.0])))


@st.composite
def noisyquant_methods(draw: st.DrawFn) -> NoisyQuant:
    fields = draw(common_fields())
    amplitude = draw(st.sampled_from([None, 0.0, 0.5, 1.3]))
    full_range = fields["signed"] is not True or draw(st.booleans())
    noise = draw(st.sampled_from(["uniform", "gaussian"]))
    mean = draw(st.sampled_from([0.0, None, 0.25]))
    seed = draw(st.integers(0, 99))
    return NoisyQuant(**fields, seed=seed, amplitude=amplitude, full_range=full_range, noise=noise, mean=mean)


@st.composite
def dense_sparse_methods(draw: st.DrawFn) -> DenseSparse:
    fields = draw(common_fields(clip=st.just("max")))
    return DenseSparse(**fields, density=draw(st.sampled_from([0.01, 0.0, 0.1, 0.3, 0.5])))


methods = st.one_of(direct_methods(), dqa_methods(), noisyquant_methods(), dense_sparse_methods())
