"""What cases are made of: tensors of every shape, dtype, character and layout, methods, and quantizers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from dqa_plugins import QPP, ActivationQuantizer, DenseSparse, Direct, Method
from tests import strategies

from .registry import LABEL

FLOATS = ("float32", "float16", "bfloat16", "float64")
OTHER_DTYPES = (
    "int8 uint8 int16 uint16 int32 int64 uint64 bool complex32 complex64 complex128 float8_e4m3fn float8_e5m2 "
    "float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"
).split()
CHARACTERS = "normal relu negative ties zeros constant zero_channel sparse outlier heavy tiny denormal huge".split()
DENSE_LAYOUTS = (
    "plain permuted sliced offset expanded neg_view imaginary parameter subclass channels_last flipped".split()
)
OTHER_LAYOUTS = "coo csr csc bsr mkldnn nested jagged meta".split()


class Subclass(torch.Tensor):
    """A user's own kind of tensor."""


class Spec(NamedTuple):
    """A tensor in words.

    character: see `values`. layout: see `laid_out`. bad: "", or what one value in twenty is replaced by.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    character: str = "normal"
    layout: str = "plain"
    bad: str = ""
    seed: int = 0

    def make(self) -> Tensor:
        """The tensor."""
        return laid_out(self.dense(), self.layout)

    def dense(self) -> Tensor:
        """Its values, contiguous."""
        generator = np.random.default_rng(self.seed)
        x = values(generator, self.shape, self.character)
        if self.bad:
            chosen = generator.random(self.shape) < 0.05
            if chosen.size:
                chosen.flat[0] = True
            x = np.where(chosen, float(self.bad), x)
        dtype = getattr(torch, self.dtype)
        if not dtype.is_floating_point and not dtype.is_complex:
            x = np.nan_to_num(x).clip(0, 1)
        found = torch.from_numpy(np.array(x))
        if dtype in (torch.float16, torch.bfloat16):
            found = found.clamp(-60_000, 60_000) if not self.bad else found
        if self.layout == "expanded" and found.ndim > 2:
            found = found[:, :, :1].expand(found.shape)
        return found.to(dtype).contiguous()


def values(generator: np.random.Generator, shape: tuple[int, ...], character: str) -> np.ndarray:
    """float64 values, below 1e38 in magnitude."""
    x = generator.standard_normal(shape)
    if len(shape) > 1 and character not in ("constant", "ties", "huge"):
        x = x * np.exp(generator.standard_normal((shape[0],) + (1,) * (len(shape) - 1)))
    changed = {
        "relu": lambda: np.maximum(x, 0),
        "negative": lambda: -np.abs(x) - 0.1,
        "ties": lambda: np.rint(x * 8) / 2,
        "zeros": lambda: np.zeros(shape),
        "constant": lambda: np.full(shape, generator.choice([0.7, -3.0, 1.0])),
        "sparse": lambda: np.where(generator.random(shape) < 0.95, 0.0, x),
        "outlier": lambda: np.where(generator.random(shape) < 0.02, x * 1e4, x),
        "heavy": lambda: x**5,
        "tiny": lambda: x * 1e-30,
        "denormal": lambda: x * 1e-42,
        "huge": lambda: np.tanh(x) * 1e38,
    }
    x = changed.get(character, lambda: x)()
    if character == "zero_channel" and len(shape) > 1 and shape[1]:
        x[:, 0] = 0
    return x


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of x, contiguous, in a layout of memory.

    Raises:
        RuntimeError: torch cannot make it so.
    """
    if layout == "permuted" and x.ndim > 1:
        order = [*range(1, x.ndim), 0]
        return x.permute(order).contiguous().permute([x.ndim - 1, *range(x.ndim - 1)])
    if layout == "sliced" and x.ndim > 1:
        wide = x.new_zeros((*x.shape[:-1], 2 * x.shape[-1]))
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "offset":
        return torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape)
    if layout == "expanded" and x.ndim > 2:
        return x[:, :, :1].expand(x.shape)
    if layout == "neg_view":
        return torch._neg_view(-x)
    if layout == "imaginary" and x.dtype in (torch.float32, torch.float64):
        return torch.complex(torch.zeros_like(x), -x).conj().imag
    if layout == "parameter":
        return nn.Parameter(x.clone())
    if layout == "subclass":
        return x.as_subclass(Subclass)
    if layout == "channels_last" and x.ndim in (4, 5):
        return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    if layout == "flipped" and x.ndim > 1:
        return x.flip(-1).flip(-1)
    makers = {
        "coo": lambda: x.to_sparse(),
        "csr": lambda: x.flatten(1).to_sparse_csr(),
        "csc": lambda: x.flatten(1).to_sparse_csc(),
        "bsr": lambda: x.flatten(1).to_sparse_bsr((1, 1)),
        "mkldnn": lambda: x.to_mkldnn(),
        "nested": lambda: torch.nested.nested_tensor([*x]),
        "jagged": lambda: torch.nested.nested_tensor([*x], layout=torch.jagged),
        "meta": lambda: x.to("meta"),
    }
    return makers.get(layout, lambda: x)()


seeds = st.integers(0, 2**32 - 1)
samples = st.integers(1, 4)


@st.composite
def sample_shapes(draw: st.DrawFn, most: int = 5) -> tuple[int, ...]:
    """The shape of one sample: one to four dimensions, of size one and more."""
    return tuple(draw(st.lists(st.integers(1, most), min_size=1, max_size=4)))


@st.composite
def specs(draw: st.DrawFn, *, bad: bool = False, dtypes: tuple[str, ...] = FLOATS) -> Spec:
    """A dense tensor of any shape with a batch axis."""
    shape = (draw(samples), *draw(sample_shapes()))
    mischief = draw(st.sampled_from(["nan", "inf", "-inf"])) if bad else ""
    layout = draw(st.sampled_from(DENSE_LAYOUTS))
    return Spec(shape, draw(st.sampled_from(dtypes)), draw(st.sampled_from(CHARACTERS)), layout, mischief, draw(seeds))


predicted = st.builds(
    lambda method, mode: method.replace(qparams=QPP(mode=mode, augment=False)),
    st.sampled_from([DenseSparse(), Direct(), Direct(symmetric=False), DenseSparse(granularity="channel")]),
    st.sampled_from(["extended", "paper"]),
)
methods: st.SearchStrategy[Method] = strategies.methods
all_methods: st.SearchStrategy[Method] = st.one_of(methods, methods, methods, predicted)


def quantizer_of(method: Method, *batches: Tensor, axis: int = 1, freeze: bool = True) -> ActivationQuantizer:
    """A quantizer called LABEL that saw the batches."""
    quantizer = ActivationQuantizer(method, name=LABEL, producer_axis=axis)
    for batch in batches:
        quantizer(batch)
    return quantizer.freeze() if freeze else quantizer


def same(left: Any, right: Any, what: str = "") -> None:
    """Equal in shape, dtype and every value (NaN equals NaN); else an AssertionError that says what differs."""
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        assert left == right, f"{what}: {left!r} against {right!r}"
        return
    assert left.shape == right.shape, f"{what}: shape {tuple(left.shape)} against {tuple(right.shape)}"
    assert left.dtype == right.dtype, f"{what}: {left.dtype} against {right.dtype}"
    left, right = left.detach(), right.detach()
    wrong = ~((left == right) | (left.isnan() & right.isnan())) if left.is_floating_point() else left != right
    if bool(wrong.any()):
        pairs = list(zip(left[wrong][:3].tolist(), right[wrong][:3].tolist(), strict=True))
        raise AssertionError(f"{what}: {int(wrong.sum())} of {left.numel()} values differ, first {pairs}")


def axis_of(number: int, dimensions: int) -> int:
    """A channel axis of a tensor with a batch: one of 1..dimensions - 1, or its negative."""
    axes = [*range(1, dimensions), *range(1 - dimensions, 0)]
    return axes[number % len(axes)] if axes else 1
