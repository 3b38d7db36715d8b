"""The pure functions against integer arithmetic, bit for bit, with scales and thresholds given."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dqa_plugins import functional as F
from dqa_plugins.errors import ChannelAxisError, ChannelMismatch
from tests import reference
from tests.compare import assert_exact, same_bits, to_numpy
from tests.strategies import DTYPES

# adversarial values, element by element: hypothesis likes 0.5, 1.0, the largest float16, subnormals
elements = st.floats(-(2.0**15), 2.0**15, width=16)
activations = hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.just(4), st.integers(1, 5)), elements=elements)
scales = st.one_of(st.just(0.0), st.floats(2.0**-20, 2.0**10, width=32))
bits = st.integers(2, 8)
signs = st.booleans()
dtypes = st.sampled_from(DTYPES)


def extra_vectors(n: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1 - n, n), min_size=4, max_size=4)


@given(activations, scales, bits, signs, dtypes, st.booleans())
def test_direct_is_integer_arithmetic(array, scale, n, signed, dtype, clamp):
    """Codes and reconstruction of eq. 1, with and without the clamp, in every dtype."""
    x = torch.from_numpy(array).to(dtype)
    wide = to_numpy(x).astype(reference.compute_dtype(to_numpy(x)))
    codes = F.direct_quantize(x, torch.tensor(scale), n, signed=signed, clamp=clamp)
    expected = reference.direct_codes(wide, wide.dtype.type(scale), n, signed, clamp)
    if np.abs(expected).max() < 2**31:
        assert codes.dtype == (torch.int16 if clamp else torch.int32)
        assert_exact(codes.long(), expected, "codes")
    x_hat = F.direct_fake_quantize(x, torch.tensor(scale), n, signed=signed, clamp=clamp)
    assert_exact(x_hat, reference.direct(to_numpy(x), scale, n, signed, clamp), "x_hat")


def test_direct_literal_paper_top_code_needs_one_more_bit():
    """clamp=False keeps the paper's code 2^(n-1); ours stops at 2^(n-1) - 1."""
    x = torch.tensor([-1.0, -0.5, 0.5, 1.0])
    assert F.direct_quantize(x, torch.tensor(0.25), 3, clamp=False).tolist() == [-4, -2, 2, 4]
    assert F.direct_quantize(x, torch.tensor(0.25), 3).tolist() == [-4, -2, 2, 3]
    assert F.direct_fake_quantize(x, torch.tensor(0.25), 3, clamp=False).tolist() == [-1.0, -0.5, 0.5, 1.0]
    assert F.direct_fake_quantize(x, torch.tensor(0.25), 3).tolist() == [-1.0, -0.5, 0.5, 0.75]


def test_halves_go_to_even():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert F.direct_quantize(x, torch.tensor(1.0), 4).tolist() == [-2, -2, 0, 0, 2, 2]
    assert F.direct_fake_quantize(x, torch.tensor(1.0), 4).tolist() == [-2, -2, 0, 0, 2, 2]


def test_values_are_divided_by_the_scale_not_multiplied_by_its_inverse():
    """At a tie the two differ, in a few of many scales: every function that quantizes, along a sweep of scales."""
    scale = np.float32(1) / np.arange(1, 4000, dtype=np.float32)
    x = scale * np.float32(2.5)
    inverse = np.rint(x * (np.float32(1) / scale))
    assert (np.rint(x / scale) != inverse).sum() > 10, "the examples do not tell the two apart"
    values, steps, noise = torch.from_numpy(x)[None], torch.from_numpy(scale)[None], np.zeros((1, len(x)), np.float32)
    extra = np.zeros((1, len(x)), np.int64)
    row, wide = x[None], scale[None]
    assert_exact(F.direct_quantize(values, steps, 8).long(), reference.direct_codes(row, wide, 8, True))
    assert_exact(F.direct_fake_quantize(values, steps, 8), reference.direct(row, wide, 8, True))
    codes, _ = F.dqa_quantize(values, steps, torch.from_numpy(extra[0]), 8)
    assert_exact(codes.long(), reference.dqa_codes(row, wide, extra, 8, True)[0])
    found = F.dqa_fake_quantize(values, steps, torch.from_numpy(extra[0]), 8)
    assert_exact(found, reference.dqa(row, wide, extra, 8, True))
    found = F.noisyquant_fake_quantize(values, steps, torch.from_numpy(noise[0]), 8)
    assert_exact(found, reference.noisyquant(row, wide, noise, 8, True))
    upper = (scale * 255)[None].astype(np.float32)  # so that the step is the scale, nearly always
    ends = (torch.zeros(1), torch.from_numpy(upper))
    assert_exact(F.affine_fake_quantize(values, *ends, 8), reference.asymmetric(row, np.float32(0), upper, 8))
    assert_exact(F.dense_sparse_fake_quantize(values, *ends, 8), reference.dense_sparse(row, np.float32(0), upper, 8))


@given(activations, st.data(), bits, signs, dtypes, st.booleans())
def test_dqa_is_integer_arithmetic(array, data, n, signed, dtype, clamp):
    """Codes, shift errors and reconstruction of algorithm 1 and 2; negative m is a coarser channel."""
    scale = data.draw(st.one_of(st.just(0.0), st.floats(2.0**-8, 2.0**10, width=32)))
    extra = data.draw(extra_vectors(n) if clamp else st.lists(st.integers(0, n), min_size=4, max_size=4))
    x, m = torch.from_numpy(array).to(dtype), torch.tensor(extra)
    wide = to_numpy(x).astype(reference.compute_dtype(to_numpy(x)))
    laid = np.asarray(extra).reshape(1, 4, 1)
    codes, errors = F.dqa_quantize(x, torch.tensor(scale), m, n, signed=signed, clamp=clamp)
    expected_codes, expected_errors = reference.dqa_codes(wide, scale, laid, n, signed, clamp)
    assert_exact(codes.long(), expected_codes, "codes")
    assert_exact(errors.long(), expected_errors, "shift errors")
    assert errors.dtype == torch.uint8
    if clamp:
        low, high = reference.code_range(n, signed)
        assert codes.min() >= low
        assert codes.max() <= high, "a stored code does not fit n bits"
        x_hat = F.dqa_fake_quantize(x, torch.tensor(scale), m, n, signed=signed)
        assert_exact(x_hat, reference.dqa(to_numpy(x), scale, laid, n, signed), "x_hat")


@given(activations, st.data(), bits, signs)
def test_shift_form_equals_fine_grid(array, data, n, signed):
    """code * 2^m + shift_error is the (n+m)-bit code: equation 3 loses nothing (integer arithmetic, exact)."""
    m = data.draw(st.integers(0, n))
    scale = data.draw(st.floats(2.0**-8, 2.0**10, width=32))
    codes, errors = F.dqa_quantize(torch.from_numpy(array), torch.tensor(scale), torch.full((4,), m), n, signed=signed)
    step = np.float32(scale) / np.float32(2**m)
    fine = np.clip(np.rint(array / step).astype(np.int64), *reference.code_range(n + m, signed))
    assert_exact(codes.long() * 2**m + errors.long(), fine, "code * 2^m + shift_error")
    assert errors.max() < 2**m
    if m == 0:
        assert_exact(codes, F.direct_quantize(torch.from_numpy(array), torch.tensor(scale), n, signed=signed))


def test_shift_rounds_towards_minus_infinity():
    """q = -5 with m = 2 is code -2 and shift error 3, never code -1 and error -1."""
    x = torch.tensor([[-5.0], [5.0], [-4.0], [-1.0]])
    codes, errors = F.dqa_quantize(x, torch.tensor(4.0), torch.tensor([2]), 4)
    assert codes.flatten().tolist() == [-2, 1, -1, -1]
    assert errors.flatten().tolist() == [3, 1, 0, 3]


@given(activations, scales, bits, signs, dtypes, st.lists(st.floats(-2, 2, width=32), min_size=4, max_size=4))
def test_noisyquant_is_integer_arithmetic(array, scale, n, signed, dtype, noise):
    x = torch.from_numpy(array).to(dtype)
    laid = np.asarray(noise, np.float32).reshape(1, 4, 1)
    x_hat = F.noisyquant_fake_quantize(x, torch.tensor(scale), torch.tensor(noise), n, signed=signed)
    assert_exact(x_hat, reference.noisyquant(to_numpy(x), scale, laid, n, signed), "x_hat")


thresholds = st.tuples(elements, elements).map(sorted)


@given(activations, thresholds, bits, dtypes)
def test_asymmetric_direct_is_integer_arithmetic(array, ends, n, dtype):
    """Eq. 12 of the QPP paper, values outside [a, b] clamped; a where a = b."""
    x = torch.from_numpy(array).to(dtype)
    x_hat = F.affine_fake_quantize(x, torch.tensor(ends[0]), torch.tensor(ends[1]), n)
    assert_exact(x_hat, reference.asymmetric(to_numpy(x), *ends, n), "x_hat")


@given(activations, thresholds, bits, dtypes)
def test_dense_sparse_is_integer_arithmetic_and_outliers_keep_their_bits(array, ends, n, dtype):
    """Eq. 11 with a clamp inside [a, b]; strictly outside x itself, bit for bit."""
    x = torch.from_numpy(array).to(dtype)
    x_hat = F.dense_sparse_fake_quantize(x, torch.tensor(ends[0]), torch.tensor(ends[1]), n)
    assert_exact(x_hat, reference.dense_sparse(to_numpy(x), *ends, n), "x_hat")
    outside = (x.double() < ends[0]) | (x.double() > ends[1])
    assert same_bits(x_hat[outside], x[outside])


@pytest.mark.parametrize("ends", [(1.0, 1.0), (2.0, 1.0), (0.0, 0.0), (-1.0, -3.0)])
def test_dense_sparse_without_a_range(ends):
    """b <= a: values equal to a give a, all else is an outlier: nothing changes."""
    x = torch.tensor([[-3.0, -1.0, -0.0, 0.0, 1.0, 1.5, 2.0, 7.0]])
    a, b = torch.tensor(ends[0]), torch.tensor(ends[1])
    assert_exact(F.dense_sparse_fake_quantize(x, a, b, 4), x)
    codes, outliers = F.dense_sparse_quantize(x, a, b, 4)
    assert_exact(F.dense_sparse_dequantize(codes, outliers, x[outliers], a, b, 4), x)
    assert bool(outliers[x != ends[0]].all())


@given(activations, st.data(), bits, signs)
def test_quantize_then_dequantize_is_fake_quantize(array, data, n, signed):
    """For all four methods, in the dtype of the scale."""
    x = torch.from_numpy(array)
    scale = torch.tensor(data.draw(st.floats(2.0**-8, 2.0**10, width=32)))
    codes = F.direct_quantize(x, scale, n, signed=signed)
    assert_exact(F.direct_dequantize(codes, scale), F.direct_fake_quantize(x, scale, n, signed=signed), "direct")
    extra = torch.tensor(data.draw(extra_vectors(n)))
    parts = F.dqa_quantize(x, scale, extra, n, signed=signed)
    expected = F.dqa_fake_quantize(x, scale, extra, n, signed=signed)
    assert_exact(F.dqa_dequantize(*parts, scale, extra), expected, "dqa")
    noise = torch.tensor(data.draw(st.lists(st.floats(-2, 2, width=32), min_size=4, max_size=4)))
    codes = F.noisyquant_quantize(x, scale, noise, n, signed=signed)
    expected = F.noisyquant_fake_quantize(x, scale, noise, n, signed=signed)
    assert_exact(F.noisyquant_dequantize(codes, scale, noise), expected, "noisyquant")
    a, b = (torch.tensor(t) for t in data.draw(thresholds))
    codes, outliers = F.dense_sparse_quantize(x, a, b, n)
    expected = F.dense_sparse_fake_quantize(x, a, b, n)
    assert_exact(F.dense_sparse_dequantize(codes, outliers, x[outliers], a, b, n), expected, "dense_sparse")
    step, zero = F.affine_qparams(a, b, n)
    if step > 0:
        codes = F.direct_quantize(x, step, n, zero_point=zero)
        expected = F.affine_fake_quantize(x, a, b, n)
        assert_exact(F.direct_dequantize(codes, step, zero_point=zero), expected, "asymmetric direct")


@pytest.mark.parametrize("axis", [1, 2, 3, -1, -2, -3])
def test_per_channel_vectors_lie_along_the_channel_axis(axis):
    """The same numbers as with the channels moved to axis 1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 4, 4, generator=generator)
    extra, noise, scale = torch.tensor([0, 1, 2, 3]), torch.tensor([0.1, -0.5, 0.9, 0.0]), torch.tensor(0.25)
    moved = x.movedim(axis, 1)
    for function, vector in ((F.dqa_fake_quantize, extra), (F.noisyquant_fake_quantize, noise)):
        there = function(x, scale, vector, 4, channel_axis=axis)
        assert_exact(there, function(moved, scale, vector, 4).movedim(1, axis), function.__name__)


@pytest.mark.parametrize("axis", [0, 4, -4, -5])
def test_a_channel_axis_that_does_not_exist_is_named(axis):
    with pytest.raises(ChannelAxisError, match=f"axis {axis} .*\\(2, 4, 4, 4\\)"):
        F.dqa_fake_quantize(
            torch.zeros(2, 4, 4, 4), torch.tensor(1.0), torch.zeros(4, dtype=torch.int64), 4, channel_axis=axis
        )


def test_a_vector_of_the_wrong_length_is_named():
    with pytest.raises(ChannelMismatch, match=r"\(3,\).*4 channels"):
        F.dqa_quantize(torch.zeros(2, 4), torch.tensor(1.0), torch.zeros(3, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match=r"\(5,\).*4 channels"):
        F.noisyquant_fake_quantize(torch.zeros(2, 4), torch.tensor(1.0), torch.zeros(5), 4)


def test_folding_the_noise_into_the_bias_is_an_identity():
    """W (Q(x+N) - N) + B = W Q(x+N) + (B - W N), with and without a bias (float64)."""
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(5, 8, generator=generator).double(), torch.randn(3, 8, generator=generator).double()
    bias, noise = torch.randn(3, generator=generator).double(), torch.rand(8, generator=generator).double() - 0.5
    scale = torch.tensor(0.1, dtype=torch.float64)
    kept = F.direct_dequantize(F.noisyquant_quantize(x, scale, noise, 4), scale)
    for b in (bias, None):
        plain = torch.nn.functional.linear(F.noisyquant_fake_quantize(x, scale, noise, 4), weight, b)
        folded = torch.nn.functional.linear(kept, weight, F.noisyquant_fold_bias(weight, b, noise * scale))
        torch.testing.assert_close(folded, plain, rtol=0, atol=1e-14)
        assert (folded - torch.nn.functional.linear(kept, weight, b)).abs().max() > 1e-3, "nothing was folded"


def test_uniform_noise_makes_the_error_variance_delta_squared_by_twelve():
    """N ~ U(-delta/2, delta/2) without clipping: for every x the error has variance delta^2/12, Direct's has not."""
    delta = torch.tensor(0.125, dtype=torch.float64)
    draws = 200_000
    noise = torch.rand(draws, generator=torch.Generator().manual_seed(2), dtype=torch.float64) - 0.5
    for value in (0.0, 0.03, 0.0625, 0.1, -0.3):
        x = torch.full((1, draws), value, dtype=torch.float64)
        error = F.noisyquant_fake_quantize(x, delta, noise, 8) - x
        # the standard error of the variance of a uniform variable is variance * sqrt(0.8 / draws) = 0.2%
        assert float(error.var()) == pytest.approx(float(delta) ** 2 / 12, rel=0.01), value
        assert abs(float(error.mean())) < 4 * float(delta) / (12 * draws) ** 0.5, value
    assert float((F.direct_fake_quantize(torch.zeros(1, 9), delta.float(), 8)).var()) == 0.0


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_scale_of_zero_gives_zeros(zero):
    x = torch.zeros(2, 3)
    scale = torch.tensor(zero)
    assert_exact(F.direct_fake_quantize(x, scale, 4), x)
    assert_exact(F.dqa_fake_quantize(x, scale, torch.tensor([0, 2, 1]), 4), x)
    assert_exact(F.noisyquant_fake_quantize(x, scale, torch.ones(3), 4), x)
    assert_exact(F.affine_fake_quantize(x, scale, scale, 4), x)
    assert_exact(F.dense_sparse_fake_quantize(x, scale, scale, 4), x)


# ---------------------------------------------------------------- gradients


def gradient(function, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    function(x).sum().backward()
    return x.grad


def test_gradients_are_straight_through_inside_and_zero_outside():
    """Direct and NoisyQuant: codes -8..7 at a step of 0.125, so [-1, 0.875] is inside (up to rounding)."""
    x = torch.tensor([[-3.0, -1.05, -1.0, -0.3, 0.0, 0.4, 0.875, 0.95, 3.0]])
    inside = torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]])
    scale = torch.tensor(0.125)
    assert_exact(gradient(lambda t: F.direct_fake_quantize(t, scale, 4), x), inside, "direct")
    noise = torch.zeros(9)
    assert_exact(gradient(lambda t: F.noisyquant_fake_quantize(t, scale, noise, 4), x), inside, "noisyquant")
    unsigned = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0]])
    assert_exact(gradient(lambda t: F.direct_fake_quantize(t, scale, 4, signed=False), x), unsigned, "unsigned")


def test_gradient_of_dqa_uses_the_range_of_each_channel():
    """0.95 is above the top code of a plain channel (0.875 + half a step), but inside with three extra bits."""
    x = torch.tensor([[0.95, 0.95], [0.999, 0.999], [-2.0, -2.0]])
    grad = gradient(lambda t: F.dqa_fake_quantize(t, torch.tensor(0.125), torch.tensor([0, 3]), 4), x)
    assert_exact(grad, torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]))


def test_gradient_of_asymmetric_direct_is_zero_outside_a_b():
    x = torch.tensor([[-1.0, 0.0, 0.5, 1.0, 1.5, 2.0]])
    grad = gradient(lambda t: F.affine_fake_quantize(t, torch.tensor(0.0), torch.tensor(1.5), 4), x)
    assert_exact(grad, torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0, 0.0]]))


def test_gradient_of_dense_sparse_is_one_everywhere():
    x = torch.tensor([[-9.0, -1.0, 0.2, 0.0, 1.5, 9.0]])
    for ends in ((-1.0, 1.0), (0.0, 0.0)):
        ends = [torch.tensor(e) for e in ends]
        assert_exact(gradient(lambda t, e=ends: F.dense_sparse_fake_quantize(t, *e, 4), x), torch.ones(1, 6))


def test_parameters_get_no_gradient():
    """Scale, noise and thresholds are detached, also where they ask for a gradient."""
    x = torch.randn(2, 4, requires_grad=True)
    scale, noise = torch.tensor(0.1, requires_grad=True), torch.zeros(4, requires_grad=True)
    a, b = torch.tensor(-1.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    out = F.direct_fake_quantize(x, scale, 4) + F.noisyquant_fake_quantize(x, scale, noise, 4)
    out = out + F.affine_fake_quantize(x, a, b, 4) + F.dense_sparse_fake_quantize(x, a, b, 4)
    out = out + F.dqa_fake_quantize(x, scale, torch.tensor([0, 1, 2, 3]), 4)
    out.sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in (scale, noise, a, b))
    no_x = F.direct_fake_quantize(x.detach(), scale, 4)
    assert not no_x.requires_grad, "a scale alone makes the result differentiable"


def test_the_input_is_never_changed():
    x = torch.randn(3, 4)
    before = x.clone()
    scale, ends = torch.tensor(0.3), (torch.tensor(-0.5), torch.tensor(0.5))
    F.direct_fake_quantize(x, scale, 4)
    F.dqa_fake_quantize(x, scale, torch.tensor([0, 1, 2, 3]), 4)
    F.noisyquant_fake_quantize(x, scale, torch.ones(4), 4)
    F.dense_sparse_fake_quantize(x, *ends, 4).add_(1)
    F.dense_sparse_fake_quantize(x, torch.tensor(0.0), torch.tensor(0.0), 4).add_(1)
    assert same_bits(x, before)


@given(st.integers(-16, 16), st.sampled_from([torch.float32, torch.float64]))
def test_powers_of_two_are_exact(exponent, dtype):
    assert float(F.power_of_two(torch.tensor(exponent), dtype)) == 2.0**exponent


def test_outliers_have_no_code() -> None:
    codes, outliers = F.dense_sparse_quantize(
        torch.tensor([[-1.0, 0.0, 1.0, 2.0, 3.0, 9.0]]), torch.tensor(0.0), torch.tensor(3.0), 2
    )
    assert outliers.tolist() == [[True, False, False, False, False, True]]
    assert codes.tolist() == [[0, 0, 1, 2, 3, 0]]
