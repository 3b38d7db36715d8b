"""The kernel against `Grid.fake_quantize` in aten operations and against `functional`: equal to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dqa_plugins import DQA, QPP, ActivationQuantizer, DenseSparse, Direct, Method, NoisyQuant, functional
from dqa_plugins.grid import Grid
from dqa_plugins.kernels import eager
from tests.kernels.plain import assert_same, plain
from tests.own_method.narrowed import Narrowed

SPECIAL = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, -1e-44, 3e38, -3e38, 0.25, 0.75)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@st.composite
def tensors(draw: Any) -> Tensor:
    """(B, ...) of one to five axes, some with sizes of zero, in several orders of memory, with gaps, of every dtype."""
    shape = draw(st.lists(st.integers(0 if draw(st.integers(0, 9)) == 0 else 1, 9), min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(shape, generator=generator) * 3
    if x.numel():
        for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=8)):
            x.view(-1)[int(torch.randint(x.numel(), (), generator=generator))] = value
    axes = draw(st.permutations(range(x.ndim)))
    x = x.permute(*axes).contiguous().permute(*[axes.index(d) for d in range(x.ndim)])
    if draw(st.booleans()):
        x = x.repeat_interleave(2, -1)[..., ::2]
    return x.to(draw(st.sampled_from(DTYPES)))


@st.composite
def cases(draw: Any) -> tuple[Tensor, Grid]:
    x = draw(tensors())
    shape = [1] * x.ndim
    axes = draw(st.sampled_from(["tensor", "sample", "channel", "both"]))
    if axes in ("sample", "both"):
        shape[0] = x.shape[0]
    if axes in ("channel", "both") and x.ndim > 1:
        axis = draw(st.integers(1, x.ndim - 1))
        shape[axis] = x.shape[axis]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    bits = draw(st.integers(2, 8))
    step = torch.where(uniform(0, 1) < 0.1, 0.0, uniform(0.01, 0.8))
    lower = uniform(-2, 0.5)
    upper = torch.where(uniform(0, 1) < 0.2, lower - 1, lower + uniform(0, 4))  # some ranges are empty
    width = torch.round(uniform(1, 2**bits))
    made = {
        "direct": lambda: Grid(step, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1),
        "dqa": lambda: Grid(step, -width, width - 1),
        "noisyquant": lambda: Grid(step, 0, 2**bits - 1, bias=uniform(-1, 1) * step),
        "asymmetric": lambda: Grid.affine(lower, upper, bits),
        "dense_sparse": lambda: Grid.affine(lower, upper, bits, keep=True),
        "scalar": lambda: Grid(torch.tensor(0.3), 0, 2**bits - 1),
    }
    return x, made[draw(st.sampled_from(sorted(made)))]()


@given(cases())
def test_equal_to_aten_operations(case: tuple[Tensor, Grid]) -> None:
    x, grid = case
    assert (grid.table(x) is not None) or not x.numel()
    assert_same(grid.fake_quantize(x), plain(lambda: grid.fake_quantize(x)))


@given(cases())
def test_gradients_are_equal(case: tuple[Tensor, Grid]) -> None:
    """Straight through where the clamp leaves the code alone, everywhere where values are kept."""
    x, grid = case

    def gradient() -> Tensor:
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        (grid.fake_quantize(leaf) * 3).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    assert torch.equal(gradient(), plain(gradient))


@pytest.mark.parametrize("bits", [2, 8])
def test_equal_to_the_papers_functions(bits: int) -> None:
    x, scale = torch.randn(4, 6, 5, 5) * 3, torch.rand(4, 1, 1, 1) + 0.1
    found = Grid(scale, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).fake_quantize(x)
    assert_same(found, functional.direct_fake_quantize(x, scale, bits))
    lower, upper = -scale, scale * 2
    found = Grid.affine(lower, upper, bits, keep=True).fake_quantize(x)
    assert_same(found, functional.dense_sparse_fake_quantize(x, lower, upper, bits))


def test_rows_longer_than_a_block_and_short_rows_of_channels() -> None:
    """Every path of the layout: long rows in several threads, channels last joined to longer rows, an odd number."""
    threads = torch.get_num_threads()
    try:
        for shape, turned in (
            ((2, 3, 300, 301), True),
            ((2, 3, 300, 301), False),
            ((3, 64, 16, 16), True),
            ((1, 2**19), False),
        ):
            x = torch.randn(shape).to(memory_format=torch.channels_last) if turned else torch.randn(shape)
            step = torch.rand(shape[0], shape[1] if len(shape) == 4 else 1, *[1] * (len(shape) - 2)) + 0.01
            for grid in (Grid(step, -8, 7), Grid.affine(-step, step, 4, keep=True)):
                expected = plain(lambda g=grid, v=x: g.fake_quantize(v))  # type: ignore[misc]
                for count in (1, 3):
                    torch.set_num_threads(count)
                    assert_same(grid.fake_quantize(x), expected)
    finally:
        torch.set_num_threads(threads)


METHODS: list[Method] = [
    *(kind(granularity=g, qparams=q, clip=clip) for kind in (Direct, DQA, NoisyQuant) for g in ("tensor", "channel")
      for q, clip in (("static", "max"), ("dynamic", 0.9), ("dynamic", "mse"))),
    *(DenseSparse(granularity=g, qparams=q, signed=s) for g in ("tensor", "channel") for q in ("static", "dynamic")
      for s in (None, False)),
    Direct(symmetric=False, qparams="dynamic"), Direct(qparams="dynamic", scope="batch"),
    NoisyQuant(signed=True, full_range=False, qparams="dynamic"), Narrowed(), Narrowed(qparams="dynamic"),
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_quantizers_are_equal(method: Method) -> None:
    """Calibration, freezing and quantization, whole: with kernels and without, in every layout."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(3, 6, 5, 4, generator=generator) * 2 for _ in range(3)]
    if method.signed is False:
        batches = [batch.relu() for batch in batches]
    made = []
    for run in (lambda f: f(), plain):

        def quantizer() -> ActivationQuantizer:
            found = ActivationQuantizer(method, name="site", index=0)
            for batch in batches:
                found(batch)
            return found.freeze()

        made.append(run(quantizer))
    by_kernel, by_aten = made
    for name, buffer in by_aten.state_dict().items():
        assert torch.equal(by_kernel.state_dict()[name], buffer), name
    x = torch.randn(4, 6, 5, 4, generator=generator) * 2
    x[1] = 0.0
    x[2, 0, 0, 0] = float("nan")
    x[3, 1] = float("inf")
    for value in (x[:2], x, x.to(memory_format=torch.channels_last), x.half(), x[:, :, ::2], x.double()):
        assert_same(by_kernel(value), plain(lambda v=value: by_aten(v)))  # type: ignore[misc]


@pytest.mark.parametrize(
    "method", [Direct(qparams=QPP()), DenseSparse(qparams=QPP()), DenseSparse(qparams=QPP(mode="paper"))], ids=str
)
def test_given_predictions_are_made_valid_as_in_the_plain_path(method: Method) -> None:
    generator = torch.Generator().manual_seed(0)
    quantizer = ActivationQuantizer(method, name="site")
    quantizer(torch.randn(4, 6, 5, 4, generator=generator))
    with pytest.warns(UserWarning, match="frozen before"):
        quantizer.freeze()
    x = torch.randn(6, 6, 5, 4, generator=generator)
    sides = 2 if method.uses_range else 1
    prediction = torch.tensor([1.0, 0.0, -1.0, 1e-35, float("nan"), 1e30]).reshape(6, 1, 1).repeat(1, sides, 1)
    prediction[:, 0] *= 0.5
    found, expected = quantizer(x, prediction), plain(lambda: quantizer(x, prediction))
    assert_same(found, expected)


def test_written_and_replaced_buffers_are_seen() -> None:
    """What a frozen quantizer keeps for the kernel is made again when its parameters change in any way."""
    x = torch.randn(4, 6, 5)
    quantizer = ActivationQuantizer(DQA(), name="site")
    quantizer(x)
    quantizer.freeze()
    before = quantizer(x)
    other = ActivationQuantizer(DQA(), name="site")
    other(3 * x)
    other.freeze()

    def check() -> None:
        assert_same(quantizer(x), plain(lambda: quantizer(x)))

    quantizer.scale.mul_(2)
    assert not torch.equal(quantizer(x), before)
    check()
    quantizer.set_extra_bits(torch.tensor([0, 1, 2, 3, 0, 1]))
    check()
    quantizer.load_state_dict(other.state_dict())
    check()
    quantizer(x[:, :, 0])
    check()
    with torch.inference_mode():
        quantizer.scale = torch.full((), 0.5)
    check()
    assert eager.usable(x)
