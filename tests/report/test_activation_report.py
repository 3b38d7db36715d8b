"""activation_report against numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from dqa_plugins import DQA, QPP, ActivationQuantizer, DenseSparse, Direct, Method, NoisyQuant
from dqa_plugins.errors import UncalibratedQuantizer, UnsupportedCombination, UnsupportedInput
from dqa_plugins.report import ActivationReport, SiteReport, activation_report

# scale of two signed bits: 2 / 2 = 1, codes -2 to 1; x_hat = 0, 1, -2, 1
X = torch.tensor([[[0.4, 1.0], [-2.0, 2.0]]])
SIGNAL = 0.16 + 1 + 4 + 4
RANGE = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 70.0]])


def quantizer(method: Method, x: Tensor, name: str = "site") -> ActivationQuantizer:
    """Calibrated on x, and frozen."""
    found = ActivationQuantizer(method, name=name)
    found(x)
    return found.freeze()


def only(method: Method, x: Tensor, calibration: Tensor | None = None) -> SiteReport:
    """The report of a model that is one quantizer."""
    (site,) = activation_report(quantizer(method, x if calibration is None else calibration), [x]).sites
    assert (site.site, site.method) == ("site", type(method).__name__)
    return site


def decibels(signal: float, noise: float) -> object:
    return pytest.approx(10 * math.log10(signal / noise), rel=1e-6)


def test_direct() -> None:
    site = only(Direct(bits=2, signed=True), X)
    assert (site.elements, site.bits, site.density) == (4, 2.0, 0.0)
    assert site.sqnr == decibels(SIGNAL, 0.16 + 1)


def test_dqa_counts_the_shift_errors_of_important_channels() -> None:
    """Channel 1 errs more: four bits in steps of 1/4, so that 2 becomes 1.75."""
    site = only(DQA(bits=2, extra_bits=2, ratio=0.5, signed=True), X)
    assert site.bits == 3.0
    assert site.sqnr == decibels(SIGNAL, 0.16 + 0.0625)


def test_noisyquant_costs_nothing() -> None:
    """The noise belongs to the layer. A zero amplitude is Direct."""
    site = only(NoisyQuant(bits=2, amplitude=0.0, signed=True), X)
    assert (site.bits, site.density) == (2.0, 0.0)
    assert site.sqnr == decibels(SIGNAL, 0.16 + 1)


def test_dense_sparse_counts_value_and_position_of_each_outlier() -> None:
    """a = 0, b = the 0.75 quantile = 5.25, step 1.75; 6 and 70 stay: 32 bits and a position among 8, three bits."""
    site = only(DenseSparse(bits=2, density=0.25), RANGE)
    assert site.density == 0.25
    assert site.bits == 2 + 0.25 * (32 + 3)
    assert site.sqnr == decibels(4991, 0.75**2 + 0.25**2 + 0.5**2 + 0.5**2 + 0.25**2)


@pytest.mark.parametrize(
    ("method", "bits"),
    [
        (Direct(bits=2, signed=True, qparams="dynamic"), 2 + 32 / 4),
        (Direct(bits=2, signed=True, qparams="dynamic", scope="batch"), 2 + 32 / 8),
        (Direct(bits=2, signed=True, qparams="dynamic", granularity="channel"), 2 + 2 * 32 / 4),
        (Direct(bits=2, symmetric=False, qparams="dynamic"), 2 + 2 * 32 / 4),
        (DQA(bits=2, extra_bits=2, ratio=0.5, qparams="dynamic"), 3 + 32 / 4),
        (NoisyQuant(bits=2, qparams="dynamic"), 2 + 32 / 4),
        (Direct(bits=2, granularity="channel"), 2),
    ],
    ids=["scale", "batch", "channels", "range", "dqa", "noisyquant", "static"],
)
def test_parameters_of_each_sample_are_counted_at_32_bits(method: Method, bits: float) -> None:
    assert only(method, torch.cat([X, 2 * X])).bits == bits


def test_predicted_parameters_are_counted() -> None:
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    from dqa_plugins.adapters.fx import get_qconfig_mapping

    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(8, 3, 4, 4, generator=generator) for _ in range(4)]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    prepared = prepare_fx(model, get_qconfig_mapping(Direct(bits=4, qparams=QPP())), (batches[0],))
    for batch in batches:
        prepared(batch)
    report = activation_report(convert_fx(prepared), batches)
    values = {"input.0": 48, "1": 64, "2": 32}
    assert {site.site: site.bits for site in report.sites} == {k: pytest.approx(4 + 32 / v) for k, v in values.items()}


@pytest.mark.filterwarnings("ignore::dqa_plugins.errors.DQAWarning")  # values beyond the code range
def test_a_model_is_the_mean_over_its_values_not_its_sites() -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(4, 12, generator=generator)
    model = nn.Sequential(
        quantizer(Direct(bits=8), wide, "first"), nn.Linear(12, 4), quantizer(Direct(bits=4), wide[:, :4], "second")
    )
    report = activation_report(model, [wide, wide[:1]])
    assert [site.elements for site in report.sites] == [12, 4]
    assert report.bits_per_activation == (8 * 12 + 4 * 4) / 16
    assert report.as_dict()["bits_per_activation"] == 7.0
    assert str(report).splitlines()[-1] == "bits per activation: 7.000"
    assert "first" in str(report).splitlines()[1]


@pytest.mark.filterwarnings("ignore::dqa_plugins.errors.DQAWarning")  # values beyond the code range
def test_batches_add_up() -> None:
    """Two batches are one batch of both; samples of an empty batch do not count."""
    both = activation_report(quantizer(Direct(bits=2), X), [torch.cat([X, 2 * X])])
    apart = activation_report(quantizer(Direct(bits=2), X), [X, X[:0], (2 * X,)])
    (one,), (other,) = both.sites, apart.sites
    assert dataclasses.replace(one, histogram=None) == dataclasses.replace(other, histogram=None)
    assert one.histogram is not None
    assert other.histogram is not None
    assert sum(one.histogram.counts) == sum(other.histogram.counts) == 8, "its ends are those of the first batch"


def test_density_is_over_all_values_of_all_batches() -> None:
    method = DenseSparse(bits=2, density=0.25)
    (site,) = activation_report(quantizer(method, RANGE), [RANGE, torch.full((3, 8), 70.0)]).sites
    assert site.density == pytest.approx((2 + 24) / 32)
    assert site.bits == pytest.approx(2 + 26 / 32 * 35)


def test_nan_is_no_outlier_and_shows_in_the_error() -> None:
    x = RANGE.clone()
    x[0, 0] = math.nan
    site = only(DenseSparse(bits=2, density=0.25), x, calibration=RANGE)
    assert site.density == 0.25
    assert math.isnan(site.sqnr)


def test_nothing_lost_and_nothing_but_noise() -> None:
    exact = torch.tensor([[1.0, -2.0]])
    assert only(Direct(bits=2, signed=True), exact).sqnr == math.inf
    zeros = only(NoisyQuant(bits=2, amplitude=0.3, signed=True), torch.zeros(1, 4, 2), calibration=X.repeat(1, 2, 1))
    assert zeros.sqnr == -math.inf


def test_what_cannot_be_reported_says_so() -> None:
    observing = ActivationQuantizer(Direct(), name="layer1.relu")
    with pytest.raises(UncalibratedQuantizer, match=r"layer1\.relu.*observe"):
        activation_report(observing, [X])
    with pytest.raises(UnsupportedInput, match=r"For a single batch give \[batch\]"):
        activation_report(quantizer(Direct(), X), X)
    with pytest.raises(UnsupportedCombination, match="no quantizers"):
        activation_report(nn.Linear(2, 2), [X])
    empty = ActivationReport([])
    assert math.isnan(empty.bits_per_activation)
    assert "no quantized activation" in str(empty)


def test_no_hook_stays_behind() -> None:
    model = quantizer(Direct(), X)
    with pytest.raises(TypeError):
        activation_report(model, [(X, X, X)])
    assert not model._forward_hooks
