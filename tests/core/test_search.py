"""Searches against brute force: noise amplitude and mean, clip factor, the error of channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dqa_plugins import DQA, Direct, NoisyQuant
from dqa_plugins.errors import UnsupportedCombination
from dqa_plugins.grid import Grid
from dqa_plugins.search import AMPLITUDES, MEANS, Kept, channel_errors, clip_factor, draw_noise, noise_errors
from tests import reference
from tests.compare import assert_exact, assert_matches_reference, calibrated, to_numpy
from tests.strategies import CHARACTERS, values


def site(seed: int, character: str = "normal", samples: int = 4, channels: int = 3) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    x = values(generator, (samples, channels, 4, 4), character, 1)
    return torch.from_numpy(x * np.exp(generator.standard_normal((samples, 1, 1, 1)))).float()


def kept_scales(x: torch.Tensor, method, owner: np.ndarray) -> np.ndarray:
    """The scale each kept value is quantized with: its own sample's if dynamic."""
    signed = bool((x < 0).any()) if method.signed is None else method.signed
    maxima = x.abs().amax((1, 2, 3)).numpy()
    maxima = maxima[owner] if method.qparams == "dynamic" else np.full(len(owner), maxima.max())
    return maxima / np.float32(2 ** (method.bits - 1) if signed else 2**method.bits)


# ---------------------------------------------------------------- noise


def test_candidates_are_those_of_the_design():
    assert_exact(AMPLITUDES, np.arange(2001) / 1000)
    assert len(MEANS) == 400
    assert float(MEANS.min()) == -1.0
    assert float(MEANS.max()) == 0.995


@pytest.mark.parametrize("qparams", ["static", "dynamic"])
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(CHARACTERS),
    st.integers(2, 5),
    st.sampled_from([None, True]),
)
@settings(max_examples=10)
def test_noise_search_equals_brute_force(qparams, seed, character, bits, signed):
    """The error of the amplitude found is the least of 2001 candidates, evaluated one by one in float64."""
    x = site(seed, character)
    method = NoisyQuant(bits=bits, signed=signed, qparams=qparams, seed=seed % 7)
    q = calibrated(method, [x])
    unit = draw_noise(method.seed, "site", 3, "uniform").double().numpy()[:, None]
    kept, owner = reference.kept_values([x.numpy()], 1)
    scale = kept_scales(x, method, owner)
    errors = [
        reference.noise_error(kept, scale, unit * amplitude, bits, q.signed) for amplitude in np.arange(2001) / 1000
    ]
    found = reference.noise_error(kept, scale, q.noise.double().numpy()[:, None], bits, q.signed)
    tolerance = 1e-9 * max(errors) + 4e-7 * errors[0]  # the noise itself is kept in float32
    assert found <= min(errors) + tolerance, f"found {found}, least {min(errors)} at {np.argmin(errors)}"


@pytest.mark.parametrize("character", ["normal", "ties", "heavy", "sparse"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_interval_sums_equal_brute_force_for_every_candidate(bits, character):
    """The whole error curve, not only its minimum: relative to the largest, within 1e-9."""
    rows = site(bits, character).movedim(1, 0).flatten(1)
    unit = torch.tensor([-0.7, 0.3, 0.99], dtype=torch.float64)
    shifts = unit[:, None] * AMPLITUDES[::20]
    scale = rows.abs().max() / 2 ** (bits - 1)
    low, high = reference.code_range(bits, True)
    found = noise_errors(rows, scale, unit, 0.0, AMPLITUDES[::20], low, high).numpy()
    expected = [
        reference.noise_error(rows.numpy(), np.float32(scale), s[:, None], bits, True) for s in shifts.T.numpy()
    ]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 * max(*expected, 1e-30))


def test_mean_search_equals_brute_force():
    """mean=None searches 400 candidates before the amplitude, as the authors' script does."""
    x = site(1, "relu") + 0.013
    q = calibrated(NoisyQuant(bits=3, mean=None, amplitude=0.0), [x])
    kept, owner = reference.kept_values([x.numpy()], 1)
    scale = kept_scales(x, q.method, owner)
    candidates = np.arange(-200, 200) / 200
    errors = [reference.noise_error(kept, scale, np.full((3, 1), c), 3, q.signed) for c in candidates]
    assert float(q.noise[0]) == pytest.approx(candidates[int(np.argmin(errors))], abs=1e-7)
    assert float(q.noise[0]) != 0.0, "the example does not ask for a mean"
    assert (q.noise == q.noise[0]).all(), "amplitude 0: every channel has the mean"


def test_a_given_amplitude_skips_the_search():
    x = site(2)
    q = calibrated(NoisyQuant(amplitude=0.25, seed=3), [x])
    assert_exact(q.noise, draw_noise(3, "site", 3, "uniform") * 0.25)
    assert calibrated(NoisyQuant(amplitude=0.0), [x]).noise.abs().max() == 0


def test_no_noise_where_none_helps():
    """Values on the grid have no error to win: the first candidate, 0, stays."""
    x = torch.tensor([[-4.0, -1.0, 2.0, 3.0]]).reshape(1, 2, 2)
    assert calibrated(NoisyQuant(bits=3), [x]).noise.abs().max() == 0
    assert calibrated(NoisyQuant(bits=3), [torch.zeros(2, 3, 4)]).noise.abs().max() == 0


def test_the_draw_depends_on_seed_and_site_and_on_nothing_else():
    first = draw_noise(0, "layer1.relu", 64, "uniform")
    torch.manual_seed(99)
    assert torch.equal(first, draw_noise(0, "layer1.relu", 64, "uniform"))
    assert not torch.equal(first, draw_noise(1, "layer1.relu", 64, "uniform"))
    assert not torch.equal(first, draw_noise(0, "layer2.relu", 64, "uniform"))
    assert first.unique().numel() == 64, "one value per channel"
    assert first.abs().max() <= 1
    state = torch.get_rng_state()
    draw_noise(0, "layer1.relu", 64, "uniform")
    assert torch.equal(state, torch.get_rng_state()), "the global generator moved"


def test_the_draw_is_uniform_or_gaussian():
    uniform, gaussian = (draw_noise(0, "x", 200_000, kind).double() for kind in ("uniform", "gaussian"))
    assert float(uniform.mean()) == pytest.approx(0, abs=0.01)
    assert float(uniform.var()) == pytest.approx(1 / 3, rel=0.01)
    assert float(gaussian.mean()) == pytest.approx(-1, abs=0.02)
    assert float(gaussian.var()) == pytest.approx(4, rel=0.02)


def test_the_first_draw_is_pinned():
    """The same site gets the same noise in every framework, process and release."""
    drawn = draw_noise(0, "site", 3, "uniform")
    assert_exact(drawn, torch.tensor([0.8460326194763184, 0.6304575204849243, -0.27065253257751465]))


# ---------------------------------------------------------------- objective="output"


def test_output_objective_minimises_the_error_of_the_next_layer():
    """Against brute force over all amplitudes with the layer's weight in float64."""
    x, weight = (
        site(5, "normal", samples=8, channels=6)[..., 0, 0],
        torch.randn(4, 6, generator=torch.Generator().manual_seed(1)),
    )
    method = NoisyQuant(bits=3, objective="output", seed=2)
    q = calibrated(method, [x], freeze=False)
    q.freeze(weight)
    unit = draw_noise(2, "site", 6, "uniform").double()
    scale = x.double().abs().max() / 4

    def error(noise: torch.Tensor) -> float:
        codes = (x.double() / scale + noise).round().clamp(-4, 3)
        return float((((codes - noise) * scale - x.double()) @ weight.double().T).square().sum())

    least = min(error(unit * a) for a in AMPLITUDES)
    assert error(q.noise.double()) == pytest.approx(least, rel=1e-6)
    plain = calibrated(NoisyQuant(bits=3, seed=2), [x])
    assert error(plain.noise.double()) > least * 1.0001, "both objectives agree: the example shows nothing"


def test_output_objective_without_a_layer_raises():
    q = calibrated(NoisyQuant(objective="output"), [site(1)], freeze=False)
    with pytest.raises(UnsupportedCombination, match=r"'site'.*objective='output'"):
        q.freeze()


def test_a_linear_along_another_axis_leaves_the_search_on_the_activation(caplog):
    q = calibrated(NoisyQuant(objective="output"), [site(1)], freeze=False)
    q.freeze(torch.zeros(2, 7))
    assert "'site'" in caplog.text
    assert "7 inputs, the kept values 3 rows" in caplog.text
    plain = calibrated(NoisyQuant(), [site(1)])
    assert torch.equal(q.noise, plain.noise)


# ---------------------------------------------------------------- clip


@pytest.mark.parametrize("qparams", ["static", "dynamic"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("bits", [2, 4])
def test_clip_factor_equals_brute_force(bits, granularity, qparams):
    """The least squared error over 1/100 .. 100/100 of the maximum, per tensor or per channel."""
    x = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(bits))
    method = Direct(bits=bits, clip="mse", granularity=granularity, qparams=qparams)
    q = calibrated(method, [x])
    axes = (2, 3) if granularity == "channel" else (1, 2, 3)
    maxima = x.abs().amax(axes, keepdim=True)
    maxima = maxima if qparams == "dynamic" else maxima.amax(0, keepdim=True)
    errors = []
    for step in range(1, 101):
        scale = (maxima * np.float32(step / 100) / 2 ** (bits - 1)).numpy()
        x_hat = reference.direct(x.numpy(), scale, bits, True).astype(np.float64)
        squared = (x_hat - x.numpy()) ** 2
        errors.append(squared.sum((0, 2, 3)) if granularity == "channel" else [squared.sum()])
    best = np.asarray(errors).argmin(0) + 1
    assert_exact(q.factor, (best / 100).astype(np.float32))
    assert (best < 100).any(), "clipping never helps: the example shows nothing"
    assert_matches_reference(q, [x], site(bits, "heavy"))


def test_a_clip_search_that_gains_nothing_keeps_the_maximum():
    x = torch.tensor([[-8.0, 7.0, 1.0, -3.0]])
    assert calibrated(Direct(bits=4, clip="mse"), [x]).factor.tolist() == [1.0]


def test_noisyquant_searches_in_its_own_number_of_steps():
    x = site(3, "heavy", samples=6)
    factor = float(calibrated(NoisyQuant(bits=3, clip="mse", clip_steps=1000, amplitude=0.0), [x]).factor)
    assert factor * 1000 == pytest.approx(round(factor * 1000), abs=1e-3)
    assert factor * 100 != pytest.approx(round(factor * 100), abs=1e-3), "a step of 1/100 would do"


# ---------------------------------------------------------------- channels


@pytest.mark.parametrize("qparams", ["static", "dynamic"])
def test_channel_errors_rank_the_important_channels(qparams):
    """The mean squared error of Direct on the kept values of each channel, highest first."""
    x = site(4, "normal", samples=6, channels=8) * torch.linspace(0.1, 3, 8).reshape(1, 8, 1, 1)
    q = calibrated(DQA(bits=3, ratio=0.5, qparams=qparams), [x])
    kept, owner = reference.kept_values([x.numpy()], 1)
    scale = np.broadcast_to(kept_scales(x, q.method, owner), kept.shape)
    error = ((reference.direct(kept, scale, 3, True).astype(np.float64) - kept) ** 2).mean(1)
    assert sorted(np.argsort(-error)[:4].tolist()) == q.extra_bits.nonzero().flatten().tolist()


def test_channel_errors_are_mean_squares():
    rows = torch.tensor([[0.25, 0.5], [1.0, 1.0]])
    found = channel_errors(Kept(rows, Grid(torch.tensor(1.0), -8, 7), channels=2, site=""))
    assert_exact(found, torch.tensor([(0.0625 + 0.25) / 2, 0.0], dtype=torch.float64))


def test_equal_channels_are_chosen_from_the_front():
    x = torch.linspace(-1, 1, 16).repeat(1, 5, 1)
    q = calibrated(DQA(bits=4, ratio=0.4), [x])
    assert q.extra_bits.tolist() == [3, 3, 0, 0, 0]
    assert to_numpy(q.extra_bits).dtype == np.int64


def test_the_larger_clip_factor_wins_a_tie() -> None:
    """Rows that every factor quantizes exactly: the range stays that of the maximum."""
    rows = torch.zeros(2, 5)
    for groups in (1, 2):
        assert clip_factor(rows, lambda factor: Grid(factor, -8, 7), 10, groups=groups).tolist() == [1.0] * groups
