"""What a quantizer remembers: reductions, independence of batching, merging, and the budget of kept values."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dqa_plugins import DQA, ActivationQuantizer, DenseSparse, Direct, NoisyQuant
from dqa_plugins.calibration import KEPT_SAMPLES, KEPT_VALUES, CalibrationRecord
from tests import reference
from tests.compare import assert_exact, calibrated, same_bits, to_numpy
from tests.strategies import cases, methods

ignore_negative = pytest.mark.filterwarnings("ignore::dqa_plugins.errors.DQAWarning")


def data(samples: int, shape: tuple[int, ...] = (5, 4, 4), seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    widths = torch.rand((samples,) + (1,) * len(shape), generator=generator) * 4 + 0.1
    return torch.randn((samples, *shape), generator=generator) * widths


def record_of(method, batches, axis: int = 1) -> CalibrationRecord:
    return calibrated(method, batches, freeze=False, producer_axis=axis).calibration


def assert_same_record(left: CalibrationRecord, right: CalibrationRecord) -> None:
    for name, buffer in left.named_buffers():
        assert same_bits(buffer, right.get_buffer(name)), name


# ---------------------------------------------------------------- static reductions


@pytest.mark.parametrize(("reduce", "scale"), [("max", 4.0), ("mean", 2.5), (None, 4.0)])
def test_static_scale_reduces_the_maxima_of_samples(reduce, scale):
    """Per-sample maxima 1, 2, 3, 4: their maximum 4 or their mean 2.5, not the mean of batches."""
    x = torch.tensor([[1.0, 0.5], [2.0, 0.5], [3.0, 0.5], [4.0, 0.5]])
    q = calibrated(Direct(bits=4, reduce=reduce), [x[:3], x[3:]])
    assert float(q.scale) == scale / 16


@pytest.mark.parametrize(("reduce", "upper"), [("max", 40.0), ("mean", 25.0), (None, 25.0)])
def test_static_thresholds_are_means_by_default(reduce, upper):
    """Eq. 1 of the QPP paper for Dense+Sparse: per-sample quantiles, averaged."""
    grid = torch.arange(101, dtype=torch.float32) / 100
    x = torch.stack([grid * 10 * k for k in (1, 2, 3, 4)])
    q = calibrated(DenseSparse(density=0.5, reduce=reduce), [x])
    assert float(q.lower) == 0.0
    assert float(q.upper) == pytest.approx(upper / 2, rel=1e-6)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_static_reductions_agree_with_numpy(granularity):
    x = data(9)
    axes = (1, 2, 3) if granularity == "tensor" else (2, 3)
    maxima = np.abs(x.numpy()).max(axes)
    most = calibrated(Direct(granularity=granularity), [x]).scale
    assert_exact(most, np.asarray(maxima.max(0) / np.float32(8), np.float32))
    mean = calibrated(Direct(granularity=granularity, reduce="mean"), [x]).scale
    expected = (maxima.astype(np.float64).sum(0) / 9).astype(np.float32) / np.float32(8)
    assert_exact(mean, np.asarray(expected, np.float32))


def test_asymmetric_static_range_is_the_lowest_and_the_highest():
    x = torch.tensor([[-1.0, 2.0], [-3.0, 1.0]])
    q = calibrated(Direct(symmetric=False), [x])
    assert (float(q.lower), float(q.upper)) == (-3.0, 2.0)
    q = calibrated(Direct(symmetric=False, reduce="mean"), [x])
    assert (float(q.lower), float(q.upper)) == (-2.0, 1.5)


# ---------------------------------------------------------------- batching


@ignore_negative
@given(cases(), methods, st.data())
@settings(max_examples=60)
def test_calibration_does_not_depend_on_how_samples_are_batched(case, method, draw):
    """One big batch, single samples, or any cut in between: the same record, parameters and output, bit for bit."""
    assume(case.x.dtype != torch.float64)  # below
    samples = torch.cat(case.batches)
    cuts = draw.draw(st.lists(st.integers(1, len(samples)), max_size=3).map(sorted))
    parts = [part for part in torch.tensor_split(samples, cuts) if len(part)]
    axis = case.channel_axis
    assert_same_record(record_of(method, [samples], axis), record_of(method, parts, axis))
    whole, other = (calibrated(method, batches, producer_axis=axis) for batches in ([samples], parts))
    for name, buffer in whole.named_buffers():
        assert same_bits(buffer, other.get_buffer(name)), name
    assert same_bits(whole(case.x), other(case.x))


def test_the_mean_of_float64_statistics_is_independent_of_batching_to_rounding():
    """Sums of float64 depend on their order in the last bit (those of float32 statistics do not: 29 bits to spare)."""
    x = data(50).double()
    method = Direct(reduce="mean")
    whole, single = calibrated(method, [x]), calibrated(method, x.split(1))
    torch.testing.assert_close(whole.scale, single.scale, rtol=4e-16, atol=0)


# ---------------------------------------------------------------- merging


@ignore_negative
@given(cases(), methods, st.integers(0, 3))
@settings(max_examples=60)
def test_merged_records_are_the_record_of_the_whole(case, method, cut):
    """Statistics and kept values of two parts, merged, are those of all samples in order."""
    assume(case.x.dtype != torch.float64)
    samples = torch.cat(case.batches)
    parts = [samples[:cut], samples[cut:]]
    axis = case.channel_axis
    first, second = (record_of(method, [part] if len(part) else [], axis) for part in parts)
    first.merge(second)
    assert_same_record(first, record_of(method, [samples], axis))


@pytest.mark.parametrize("cut", [0, 10, 40, 64, 90, 100])
def test_merging_fills_the_budget_once(cut):
    """100 samples in two parts: 64 are kept, the first ones."""
    x, method = data(100), DQA()
    first, second = (record_of(method, [p] if len(p) else []) for p in (x[:cut], x[cut:]))
    first.merge(second)
    assert_same_record(first, record_of(method, [x]))
    assert first.counts.tolist() == [100, KEPT_SAMPLES]


def test_merging_with_an_empty_record_changes_nothing():
    record = record_of(Direct(), [data(3)])
    before = copy.deepcopy(record)
    record.merge(CalibrationRecord())
    assert_same_record(record, before)


# ---------------------------------------------------------------- kept values


def test_the_budget_is_64_samples_and_2_to_the_18_values():
    assert (KEPT_SAMPLES, KEPT_VALUES) == (64, 2**18)


@pytest.mark.parametrize(
    ("method", "shape", "axis"),
    [
        (Direct(), (3, 50, 50), 1),
        (Direct(), (7,), 1),
        (DQA(), (3, 50, 50), 1),
        (DQA(), (7,), 1),
        (DQA(), (40, 24), -1),
        (NoisyQuant(amplitude=0.0), (5000,), 1),
        (DQA(), (5000, 3), 1),
    ],
)
def test_kept_values_are_evenly_strided_and_within_the_budget(method, shape, axis):
    """The first samples, all channels of a position together, positions evenly strided: against the reference."""
    x = data(70, shape)
    record = record_of(method, x.split(16), axis)
    by_channel = isinstance(method, DQA | NoisyQuant)
    expected, owner = reference.kept_values([to_numpy(x)], axis if by_channel else None)
    assert_exact(record.kept, expected, "kept values")
    assert_exact(record.kept_sample, owner, "their samples")
    assert record.kept.numel() <= KEPT_VALUES
    assert int(record.counts[1]) <= KEPT_SAMPLES
    assert len(record.kept_statistic) == int(record.counts[1])


def test_kept_values_do_not_depend_on_the_size_of_batches():
    x = data(70, (8, 30, 30))
    whole = record_of(DQA(), [x])
    for size in (1, 7, 64, 69):
        assert_same_record(whole, record_of(DQA(), x.split(size)))


def test_kept_statistics_are_those_of_the_whole_sample():
    """Dynamic searches use the scale of the sample, although only some of its values are kept."""
    x = data(3, (2, 80, 80))
    record = record_of(DQA(qparams="dynamic"), [x])
    assert record.kept.shape[1] < 3 * 80 * 80
    assert_exact(record.kept_statistic[:, 0, 0], x.abs().amax((1, 2, 3)))


def test_calibration_data_are_forgotten_when_frozen():
    q = calibrated(DQA(), [data(5)])
    assert q.calibration.count == 0
    assert all(b.numel() == 0 for n, b in q.calibration.named_buffers() if n not in ("counts", "minimum"))


def test_observing_keeps_no_reference_to_the_input():
    """A batch that is changed in place afterwards must not change the record."""
    for method in (Direct(), DQA(), DenseSparse()):
        x = data(1, (3,))
        record = record_of(method, [x])
        before = copy.deepcopy(record)
        x.fill_(1e6)
        assert_same_record(record, before)


def test_an_empty_batch_is_no_sample():
    q = ActivationQuantizer(Direct(), name="site")
    q(torch.empty(0, 5, 4, 4))
    assert q.calibration.count == 0
    q(data(2))
    q(torch.empty(0, 5, 4, 4))
    assert q.calibration.count == 2
    assert q.freeze()(torch.empty(0, 5, 4, 4)).shape == (0, 5, 4, 4)
