"""Which channels DQA calls important, how many, and what their extra bits bring."""

from __future__ import annotations

import itertools

import pytest
import torch

from dqa_plugins import DQA, ActivationQuantizer, Direct
from tests.compare import assert_matches_reference, calibrated, same_bits
from tests.strategies import sample_data


def test_extra_bits_default_to_the_channels_with_the_largest_error():
    """round(ratio * C) channels, those that Direct hurts most; m on them, 0 elsewhere."""
    x = sample_data(1, (8, 10, 4, 4)) * torch.linspace(0.01, 3, 10).reshape(1, 10, 1, 1)
    q = calibrated(DQA(bits=3, ratio=0.4), [x])
    errors = (calibrated(Direct(bits=3), [x])(x) - x).double().square().mean((0, 2, 3))
    worst = sorted(errors.argsort(descending=True)[:4].tolist())
    assert q.extra_bits.nonzero().flatten().tolist() == worst
    assert set(q.extra_bits.tolist()) == {0, 3}


@pytest.mark.parametrize(
    ("ratio", "channels", "important"), [(0.0, 5, 0), (0.4, 5, 2), (0.5, 5, 2), (0.5, 7, 4), (1.0, 5, 5)]
)
def test_the_number_of_important_channels_is_rounded_half_to_even(ratio, channels, important):
    q = calibrated(DQA(bits=4, extra_bits=2, ratio=ratio), [sample_data(1, (4, channels, 3, 3))])
    assert int((q.extra_bits == 2).sum()) == important
    assert int((q.extra_bits == 0).sum()) == channels - important


def test_dqa_without_extra_bits_is_direct():
    x, y = sample_data(1), sample_data(2)
    direct = calibrated(Direct(), [x])(y)
    assert same_bits(calibrated(DQA(extra_bits=0), [x])(y), direct)
    assert same_bits(calibrated(DQA(ratio=0.0), [x])(y), direct)
    assert not torch.equal(calibrated(DQA(), [x])(y), direct)


@pytest.mark.parametrize("when", ["before", "after", "frozen"])
def test_chosen_extra_bits_are_kept(when):
    """A ranking or an allocation set before calibration, after it or when frozen is what is used."""
    chosen, x = torch.tensor([-2, 4, 0, -1, 1]), sample_data(1)
    q = ActivationQuantizer(DQA(bits=4), name="site")
    if when == "before":
        q.set_extra_bits(chosen)
    q(x)
    if when == "after":
        q.set_extra_bits(chosen)
    q.freeze()
    if when == "frozen":
        q.set_extra_bits(chosen)
    assert torch.equal(q.extra_bits, chosen)
    assert_matches_reference(q, [x], sample_data(2))


def test_the_error_shrinks_with_every_extra_bit():
    """Eq. 4: each extra bit halves the step, so the error of an important channel is divided by about four."""
    x = torch.rand(8, 2, 32, 32, generator=torch.Generator().manual_seed(5)) * 2 - 1
    q = calibrated(DQA(bits=4, extra_bits=4), [x])
    errors = []
    for m in range(5):
        q.set_extra_bits(torch.tensor([m, m]))
        inside = x.abs() < 0.5 * x.abs().max()  # away from the clamp, whose place moves with m
        errors.append(float((q(x) - x)[inside].square().mean()))
    ratios = [a / b for a, b in itertools.pairwise(errors)]
    assert all(3.5 < r < 4.5 for r in ratios), ratios
