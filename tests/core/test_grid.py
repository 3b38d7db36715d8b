"""The normal form equals the page of the papers, bit for bit, and carries gradients, NaN and half precision right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dqa_plugins import DQA, ActivationQuantizer, DenseSparse, Direct, Method, NoisyQuant, register_method
from dqa_plugins.errors import InvalidMethod, NotAMethod, StateMismatch
from dqa_plugins.grid import Grid, QParams
from dqa_plugins.methods import METHODS
from tests.compare import assert_exact, by_the_papers, calibrated

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
FOUR = [
    Direct(bits=3),
    Direct(bits=3, symmetric=False),
    DQA(bits=3),
    DQA(bits=3, granularity="channel"),
    NoisyQuant(bits=3, amplitude=0.4),
    DenseSparse(bits=3, density=0.1),
    DenseSparse(bits=3, density=0.1, granularity="channel"),
]
ids = {"ids": lambda value: f"{type(value).__name__}-{value.qparams}-{value.granularity}-{value.uses_range}"}


def data(dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    """(4, 5, 6, 7) with ties, an all-zero channel and a constant sample."""
    x = torch.randn(4, 5, 6, 7, generator=torch.Generator().manual_seed(seed)) * scale
    x[:, :, :3] = torch.round(x[:, :, :3] * 4) / 4
    x[:, 2], x[3] = 0.0, 0.25 * scale
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", ["static", "dynamic"])
@pytest.mark.parametrize("method", FOUR, **ids)
def test_a_grid_equals_the_papers(method: Method, source: str, dtype: torch.dtype) -> None:
    """Empty ranges, float64, per-sample noise and all-zero channels included."""
    quantizer = calibrated(method.replace(qparams=source), [data(torch.float32)])
    for seed in (0, 1):
        x = data(dtype, seed, 1.7)
        assert_exact(quantizer(x), by_the_papers(quantizer, x))


@given(
    st.sampled_from(FOUR),
    st.sampled_from(["static", "dynamic"]),
    st.integers(2, 8),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_codes_and_values_are_the_two_halves(method: Method, source: str, bits: int, positive: bool, seed: int) -> None:
    """values(codes(x)) is the fake-quantized tensor wherever nothing is kept; codes are integers in range."""
    x = data(torch.float32, seed).abs() if positive else data(torch.float32, seed)
    quantizer = calibrated(method.replace(qparams=source, bits=bits), [x])
    grid = quantizer.grid(x)
    codes, outside = grid.codes(x), grid.outside(x)
    assert codes.dtype == torch.int32
    assert bool((codes >= torch.as_tensor(grid.low)).all())
    assert bool((codes <= torch.as_tensor(grid.high)).all())
    expected = quantizer(x)
    values = grid.values(codes)
    assert_exact(values if outside is None else torch.where(outside, x, values), expected)


def test_an_empty_range_gives_its_lower_end() -> None:
    a = torch.tensor([0.5, -1.25, 0.0])
    grid = Grid.affine(a, torch.tensor([0.5, -2.0, 0.0]), 4)
    assert_exact(grid.fake_quantize(torch.tensor([3.0, -7.0, 1.0])), a)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "method",
    [
        Direct(symmetric=False, qparams="dynamic"),
        DenseSparse(qparams="dynamic"),
        Direct(signed=True, qparams="dynamic"),
        DenseSparse(),
    ],
    **ids,
)
def test_what_is_not_finite_never_becomes_a_constant(method: Method, bad: float) -> None:
    """A NaN stays one; an Inf stays, or spoils the sample whose scale it makes. Other samples do not notice."""
    x = torch.rand(4, 3, 8, 8)
    quantizer = calibrated(method, [x])
    broken = x.clone()
    broken[1, 0, 0, 5] = bad
    y = quantizer(broken)
    assert not bool(torch.isfinite(y[1, 0, 0, 5]))
    assert_exact(y[[0, 2, 3]], quantizer(x)[[0, 2, 3]])
    if method.qparams == "static":
        assert int((~torch.isfinite(y)).sum()) == 1


@pytest.mark.parametrize(
    "method",
    [
        Direct(bits=2, symmetric=False),
        DenseSparse(bits=2, signed=True, density=0.0),
        NoisyQuant(bits=4, amplitude=1.0, signed=True),
    ],
    **ids,
)
def test_finite_float16_stays_finite(method: Method) -> None:
    x = torch.tensor([-45000.0, 65504.0, -30000.0, 100.0]).half().repeat(4, 1).view(4, 1, 2, 2)
    y = calibrated(method, [x])(x)
    assert bool(torch.isfinite(y).all()), y.flatten().tolist()


# ---------------------------------------------------------------- gradients


def expected_gradient(quantizer: ActivationQuantizer, x: Tensor) -> Tensor:
    """One inside the code range, zero outside; one everywhere for Dense+Sparse."""
    grid = quantizer.grid(x)
    if grid.keep is not None:
        return torch.ones_like(x)
    rounded, codes = grid._codes(x)
    return (rounded == codes).float()


@pytest.mark.parametrize("method", FOUR, **ids)
def test_gradients_in_every_way_that_torch_takes_them(method: Method) -> None:
    """Backward, torch.func.grad, vmap over it, forward mode, and checkpointing of both kinds."""
    quantizer = calibrated(method, [data(torch.float32)])
    x = data(torch.float32, 3, 2.0)
    expected = expected_gradient(quantizer, x)
    leaf = x.clone().requires_grad_()
    assert_exact(torch.autograd.grad(quantizer(leaf).sum(), leaf)[0], expected)
    for reentrant in (False, True):
        y = torch.utils.checkpoint.checkpoint(quantizer, leaf, use_reentrant=reentrant)
        assert_exact(torch.autograd.grad(y.sum(), leaf)[0] if not reentrant else _backward(y, leaf), expected)
    assert_exact(torch.func.grad(lambda v: quantizer(v).sum())(x), expected)
    value, tangent = torch.func.jvp(quantizer, (x,), (torch.full_like(x, 3.0),))
    assert_exact(tangent, 3 * expected)
    assert_exact(value, quantizer(x))


def _backward(y: Tensor, leaf: Tensor) -> Tensor:
    y.sum().backward()  # reentrant checkpointing knows no autograd.grad
    if leaf.grad is None:
        raise AssertionError("no gradient")
    return leaf.grad


# ---------------------------------------------------------------- methods of one's own


@pytest.fixture
def forget() -> object:
    """METHODS as it was, afterwards."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


def test_registering_refuses_duplicates_and_wrong_grids(forget: object) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Crooked(Method):
        name: ClassVar[str] = "crooked"

        def grid(self, qparams: QParams, signed: bool, vectors: object) -> Grid:
            scale = torch.as_tensor(qparams.scale)
            return Grid(scale * scale, 0, 3)

    with pytest.raises(InvalidMethod, match=r"Crooked\.grid: with three times the scale"):
        register_method(Crooked)
    with pytest.raises(NotAMethod, match="a class derived from Method"):
        register_method(int)  # type: ignore[type-var]
    with pytest.raises(InvalidMethod, match="'direct' is registered already: Direct"):
        register_method(Direct)


@pytest.mark.parametrize(
    ("name", "value"),
    [("scale", -1.0), ("scale", float("nan")), ("extra_bits", 9), ("extra_bits", -4)],
)
def test_a_state_that_no_calibration_gives_is_refused(name: str, value: float) -> None:
    """And nothing of the quantizer changes."""
    quantizer = calibrated(DQA(bits=4), [data(torch.float32)])
    x = data(torch.float32, 1)
    before, state = quantizer(x), quantizer.state_dict()
    state[name] = torch.full_like(state[name], value)
    with pytest.raises(StateMismatch, match=name):
        quantizer.load_state_dict(state)
    assert_exact(quantizer(x), before)


def test_a_factor_of_float64_leaves_float32_as_it_is() -> None:
    """Calibrated in float64, run in float32: the arithmetic is that of the tensor at hand."""
    x = data(torch.float64)
    for method in (Direct(clip="mse", qparams="dynamic", symmetric=False), DQA(clip="mse", qparams="dynamic")):
        quantizer = calibrated(method, [x])
        found = [p for p in quantizer.runtime_qparams(x.float()) if p is not None]
        assert {p.dtype for p in found} == {torch.float32}
        assert_exact(quantizer(x.float()), by_the_papers(quantizer, x.float()))


@pytest.mark.parametrize("step", [0.3, 0.7])
def test_codes_are_quotients(step: float) -> None:
    """x / step: times the inverse of the step is a code off where the quotient is a tie, or close to one."""
    width = torch.tensor(step)
    x = (torch.arange(-4000, 4000) + 0.5) * width
    wanted = torch.from_numpy(np.rint(x.numpy() / width.numpy())).int()
    assert torch.equal(Grid(width, -(2**15), 2**15).codes(x), wanted)
    assert not torch.equal(torch.round(x * (1 / width)).int(), wanted)  # the values tell the two apart


def test_what_a_grid_tells_of_itself() -> None:
    """Codes of kept values, the width of a code, constants to write down: by hand."""
    two = torch.tensor(2.0)
    x = torch.tensor([-9.0, -1.0, 0.0, 3.0, 9.0])
    kept = Grid(two, -3, 3, keep=(torch.tensor(-4.0), torch.tensor(4.0)))
    assert kept.codes(x).tolist() == [0, 0, 0, 2, 0]  # -0.5 and 1.5 go to even
    assert kept.fake_quantize(x).tolist() == [-9.0, 0.0, 0.0, 4.0, 9.0]
    assert [Grid(two, low, high).width() for low, high in ((0, 1), (0, 15), (-8, 7), (0, 16))] == [1, 4, 4, 5]
    assert Grid(two, torch.tensor([-8, -2]), torch.tensor([7, 1])).bits() == 3.0
    biased = Grid(two, -3, 3, bias=torch.tensor([0.0, 0.5])).constants()
    assert biased.bias is not None
    assert biased.divisor is not None
    assert Grid(two, -3, 3, bias=torch.zeros(2)).constants().bias is None
    assert float(Grid(torch.tensor(0.0), -3, 3).constants().divisor) == float("inf")


def test_the_distance_to_where_a_result_jumps() -> None:
    """In steps: to a rounding tie, to an end of what is kept, and to a tie of the zero point."""
    two = torch.tensor(2.0)
    x = torch.tensor([0.0, 0.9, 1.0, 1.5, 2.0])
    torch.testing.assert_close(Grid(two, -3, 3).tie_distance(x), torch.tensor([0.5, 0.05, 0.0, 0.25, 0.5]))
    shifted = Grid(two, -3, 3, bias=torch.tensor(1.0)).tie_distance(x)
    torch.testing.assert_close(shifted, torch.tensor([0.0, 0.45, 0.5, 0.25, 0.0]))
    kept = Grid(two, -3, 3, keep=(torch.tensor(-2.0), torch.tensor(1.6))).tie_distance(x)
    torch.testing.assert_close(kept, torch.tensor([0.5, 0.05, 0.0, 0.05, 0.2]))
    exact = Grid(two, -3, 3, exact_zero=torch.tensor(0.6)).tie_distance(x)
    torch.testing.assert_close(exact, torch.tensor([0.1, 0.05, 0.0, 0.1, 0.1]))


@pytest.mark.parametrize("method", [Direct(), DQA(), NoisyQuant()], ids=lambda m: m.name)
def test_a_grid_is_proportional_to_its_scale(method: Method) -> None:
    """What quantizers rest on: they keep the grid of scale 1."""
    vectors = {"extra_bits": torch.tensor([0, 3]), "noise": torch.tensor([0.5, -1.5])}
    one, three = (
        method.grid(QParams(torch.tensor(s)), True, {n: vectors[n] for n in method.vectors}) for s in (1.0, 3.0)
    )
    scaled = one.scaled(torch.tensor(3.0))
    for name in ("step", "low", "high", "bias"):
        wanted, found = getattr(scaled, name), getattr(three, name)
        assert (wanted is None) == (found is None)
        assert wanted is None or torch.equal(torch.as_tensor(found), torch.as_tensor(wanted)), name
    if method.name == "noisyquant":
        assert three.bias.tolist() == [1.5, -4.5]
