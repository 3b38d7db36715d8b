"""Per-sample statistics: quantiles, maxima, layouts, and how they turn into qparams."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dqa_plugins import DQA, DenseSparse, Direct, NoisyQuant, method_to_dict
from dqa_plugins.grid import QParams
from dqa_plugins.ranges import extents, grouped, lay_out, qparams_of, quantiles, statistic, valid
from tests import reference
from tests.compare import assert_exact, to_numpy
from tests.strategies import cases, methods

levels = st.lists(st.floats(0, 1), min_size=1, max_size=3)


@given(st.integers(1, 200), levels, st.integers(0, 2**32 - 1), st.booleans(), st.booleans())
def test_quantiles_interpolate_linearly_between_order_statistics(count, wanted, seed, double, ties):
    """Bit for bit against sorting, on every side of the middle and with repeated values."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((3, count)).astype(np.float64 if double else np.float32)
    x = np.round(x) if ties else x
    expected = np.stack([[reference.quantile(row, level) for level in wanted] for row in x])
    assert_exact(torch.stack(quantiles(torch.from_numpy(x), tuple(wanted)), -1), expected)


@pytest.mark.parametrize("level", [0.0, 0.005, 0.5, 0.9, 0.99, 0.999, 1.0])
def test_quantiles_agree_with_numpy(level):
    """numpy interpolates from the other end above one half: equal up to two units in the last place."""
    x = np.random.default_rng(0).standard_normal((4, 1000)).astype(np.float32)
    (found,) = quantiles(torch.from_numpy(x), (level,))
    np.testing.assert_allclose(found.numpy(), np.quantile(x, level, axis=1), rtol=3e-7)


def test_quantiles_of_a_single_value():
    x = torch.tensor([[3.5], [-2.0]])
    for found in quantiles(x, (0.0, 0.3, 1.0)):
        assert_exact(found, x[:, 0])


def test_quantile_of_the_extreme_levels_is_minimum_and_maximum():
    x = torch.randn(2, 3, 501)
    least, most = quantiles(x, (0.0, 1.0))
    assert_exact(least, x.amin(-1))
    assert_exact(most, x.amax(-1))


@pytest.mark.slow
def test_quantile_of_more_than_two_to_the_24_values():
    """torch.quantile refuses 2^24 + 1 values; ours is exact, next to numpy's partition (about 0.5 GB)."""
    count = 2**24 + 17
    x = torch.randn(count, generator=torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(x, 0.995)
    position = 0.995 * (count - 1)
    low = int(position)
    ordered = np.partition(x.numpy(), (low, low + 1))
    expected = ordered[low] + (ordered[low + 1] - ordered[low]) * np.float32(position - low)
    assert float(quantiles(x.unsqueeze(0), (0.995,))[0]) == float(expected)


@given(cases(), methods)
def test_statistic_is_that_of_each_sample_alone(case, method):
    """Qparams of every sample against a loop over samples and groups, for every method, dtype and layout."""
    fields, axis = method_to_dict(method), case.channel_axis
    signed = bool((case.x < 0).any()) if method.signed is None else method.signed
    qparams = qparams_of(method, extents(case.x, method, signed, axis), signed)
    for index, sample in enumerate(to_numpy(case.x)):
        expected = reference.sample_statistic(sample, fields, signed, axis)
        if len(expected) == 2:
            assert_exact(qparams.lower[index], expected[0], "a")
            assert_exact(qparams.upper[index], expected[1], "b")
            assert qparams.scale is None
        else:
            scale = expected[0] / expected.dtype.type(reference.divisor(fields, signed))
            assert_exact(qparams.scale[index], scale, "scale")
            assert qparams.lower is None


@given(cases(), methods)
def test_statistic_resolved_later_equals_the_one_of_calibration(case, method):
    """With signed None, what serves both outcomes gives the same qparams as the statistic of the outcome."""
    axis = case.channel_axis
    signed = bool((case.x < 0).any()) if method.signed is None else method.signed
    early = qparams_of(method, statistic(case.x, method, axis).unbind(1), signed)
    late = qparams_of(method, extents(case.x, method, signed, axis), signed)
    for first, second in zip(early, late, strict=True):
        if first is not None:
            assert_exact(first, second)


def test_scale_divisors():
    """2^(n-1) signed, 2^n unsigned, 2^(n-1) - 1 in the authors' script of NoisyQuant."""
    assert [Direct(bits=n).steps(True) for n in (2, 4, 8)] == [2, 8, 128]
    assert [DQA(bits=n).steps(False) for n in (2, 4, 8)] == [4, 16, 256]
    assert NoisyQuant(bits=6).steps(True) == 32
    assert NoisyQuant.official(bits=6).steps(True) == 31


def test_dense_sparse_thresholds_of_signed_and_unsigned_tensors():
    """Signed: half the density on each side. Unsigned: a = 0, b the (1 - density) quantile, zeros included."""
    x = torch.arange(101, dtype=torch.float32).reshape(1, 101)
    method = DenseSparse(density=0.1, qparams="dynamic")
    unsigned = qparams_of(method, extents(x, method, None, 1), False)
    assert (float(unsigned.lower), float(unsigned.upper)) == (0.0, 90.0)
    signed = qparams_of(method, extents(x - 50, method, None, 1), True)
    assert (float(signed.lower), float(signed.upper)) == (-45.0, 45.0)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("density", [0.01, 0.05, 0.2])
def test_density_of_dynamic_dense_sparse(signed, density):
    """The share strictly outside the dynamic thresholds is the density, to one element on each side."""
    x = torch.randn(4, 8, 25, 25, generator=torch.Generator().manual_seed(3))
    x = x if signed else x.relu() + 0.01
    method = DenseSparse(density=density, qparams="dynamic")
    thresholds = qparams_of(method, extents(x, method, signed, 1), signed)
    a, b = (lay_out(t, x, 1, per_sample=True) for t in (thresholds.lower, thresholds.upper))
    outside = ((x < a) | (x > b)).flatten(1)
    assert (outside.sum(1) - density * outside.shape[1]).abs().max() <= (2 if signed else 1)


def test_an_unsigned_scale_looks_at_positive_values_only():
    x = torch.tensor([[-9.0, 1.0, 2.0]])
    method = Direct(signed=False)
    assert float(extents(x, method, False, 1)[0]) == 2.0
    assert float(extents(x, Direct(signed=True), True, 1)[0]) == 9.0
    assert float(extents(-x.abs(), method, False, 1)[0]) == 0.0, (
        "no positive value: a scale of zero, not a negative one"
    )


@given(cases())
def test_grouped_gives_each_channel_its_own_values(case):
    x, axis = case.x, case.channel_axis
    whole = grouped(x, "tensor", axis)
    assert whole.shape == (len(x), 1, x[0].numel())
    channels = grouped(x, "channel", axis)
    assert channels.shape == (len(x), x.shape[axis], x[0].numel() // x.shape[axis])
    for index in range(x.shape[axis]):
        expected = x.movedim(axis, 1)[:, index].reshape(len(x), -1).to(channels.dtype)
        assert_exact(channels[:, index], expected)


@given(cases(), st.booleans())
def test_lay_out_broadcasts_along_channels_and_samples(case, per_channel):
    x, axis = case.x, case.channel_axis
    groups = x.shape[axis] if per_channel else 1
    parameter = torch.arange(len(x) * groups, dtype=torch.float32).reshape(len(x), groups)
    laid = lay_out(parameter, x, axis, per_sample=True).expand(x.shape)
    moved = laid.movedim(axis, 1)
    assert_exact(moved.reshape(len(x), x.shape[axis], -1)[..., 0], parameter.expand(len(x), x.shape[axis]))
    static = lay_out(parameter[0], x, axis, per_sample=False)
    assert static.shape[0] == 1
    assert static.expand(x.shape).shape == x.shape


def test_predictions_are_made_valid() -> None:
    """A scale above zero, b above a: a prediction may be anything."""
    scale = valid(QParams(torch.tensor([-1.0, 0.0, 2.0]))).scale
    assert scale is not None
    assert (scale > 0).all()
    assert float(scale[2]) == 2.0
    lower, upper = valid(QParams(None, torch.tensor([-1.0, 3.0, 0.0]), torch.tensor([1.0, 2.0, 0.0]))).thresholds
    assert lower.tolist() == [-1.0, 3.0, 0.0]
    assert float(upper[0]) == 1.0
    assert (upper > lower).all()
