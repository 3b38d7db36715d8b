"""Predicted qparams in a network: fallbacks, sites, state, batches, errors."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dqa_plugins import (
    DQA,
    QPP,
    ActivationQuantizer,
    DenseSparse,
    Direct,
    DQAError,
    DQAWarning,
    Method,
    NoisyQuant,
    iter_quantizers,
    method_from_dict,
    method_to_dict,
)
from dqa_plugins.errors import InvalidMethod, StateMismatch, UncalibratedQuantizer, UnsupportedCombination
from dqa_plugins.metrics import density, failure_rate, prediction_error
from dqa_plugins.qpp import Forwards, connect, fit, link, qpp_report
from dqa_plugins.qpp.augment import change
from dqa_plugins.qpp.session import end
from dqa_plugins.report import activation_report
from tests.qpp.connected import calibrate_connected

METHODS: dict[str, Method] = {
    "direct": Direct(),
    "asymmetric": Direct(symmetric=False, granularity="channel"),
    "mse": Direct(clip="mse"),
    "dqa": DQA(bits=3),
    "noisyquant": NoisyQuant(bits=4, amplitude=0.3),
    "dense_sparse": DenseSparse(density=0.05),
}


class Net(nn.Module):
    """Three conv-ReLU pairs with a quantizer behind each."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        torch.manual_seed(1)
        for k in range(3):
            setattr(self, f"conv{k}", nn.Conv2d(3 if k == 0 else 4, 4, 3, padding=1))
            setattr(self, f"relu{k}", ActivationQuantizer(method, name=f"relu{k}", index=k))

    def forward(self, x: Tensor) -> Tensor:
        for k in range(3):
            x = getattr(self, f"relu{k}")(getattr(self, f"conv{k}")(x).relu())
        return x


def inputs(count: int = 48, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 3, 12, 12, generator=generator)
    return x * (0.3 + 2 * torch.rand(count, 1, 1, 1, generator=generator))


def calibrate(method: Method, x: Tensor | None = None, *, size: int = 16) -> Net:
    model = Net(method).eval()
    quantizers = [quantizer for _, quantizer in iter_quantizers(model)]
    calibrate_connected(model, quantizers, (inputs() if x is None else x).split(size))
    return model


@pytest.mark.parametrize("mode", ["paper", "extended"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_predictions_follow_each_sample(method: Method, mode: str) -> None:
    """Closer to the sample's own parameters than static ones, on samples that calibration did not see."""
    model = calibrate(method.replace(qparams=QPP(mode=mode)))
    report = qpp_report(model, [inputs(32, seed=5)])
    for layer in report.layers:
        assert not layer.reason
        assert float(layer.errors["predicted"].mean()) < 0.7 * float(layer.errors["static"].mean())
        assert float(layer.errors["dynamic"].abs().max()) == 0


def test_the_extended_mode_is_closer_than_the_papers() -> None:
    found = {}
    for mode in ("paper", "extended"):
        model = calibrate(DenseSparse(density=0.05, qparams=QPP(mode=mode)))
        report = qpp_report(model, [inputs(64, seed=5)])
        found[mode] = sum(float(layer.errors["predicted"].mean()) for layer in report.layers)
    assert found["extended"] < found["paper"]


@pytest.mark.parametrize("mode", ["paper", "extended"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_sample_does_not_depend_on_its_batch(method: Method, mode: str) -> None:
    """Bit-equal predictions from identical tensors, in one batch or several."""
    model = calibrate(method.replace(qparams=QPP(mode=mode)))
    tensors = [torch.rand(6, 4, 12, 12, generator=torch.Generator().manual_seed(k)) for k in range(3)]

    def run(rows: slice) -> list[Tensor]:
        found = []
        session = Forwards().start(())
        for (_, quantizer), x in zip(iter_quantizers(model), tensors, strict=True):
            quantizer(x[rows])
            assert quantizer.predictor is not None
            found.append(quantizer.predictor.predict(quantizer, x[rows]))
        end(session)
        return found

    whole, parts = run(slice(None)), [run(slice(k, k + 1)) for k in range(6)]
    for k, prediction in enumerate(whole):
        assert torch.equal(prediction, torch.cat([part[k] for part in parts]))


def test_calibration_does_not_depend_on_its_batches() -> None:
    one, other = (calibrate(DenseSparse(qparams=QPP()), size=size) for size in (16, 12))
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        if a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["paper", "extended"])
@pytest.mark.parametrize("sites", [None, ("input",), ("input", "relu1"), ("relu1",)])
def test_sites(mode: str, sites: tuple[str, ...] | None) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = calibrate(DenseSparse(qparams=QPP(mode=mode, sites=sites)))
    read = [quantizer.predictor.site for _, quantizer in iter_quantizers(model) if quantizer.predictor]
    expected = {
        None: ["relu0"] * 3,
        ("input",): ["input.0"] * 3,
        ("input", "relu1"): ["input.0", "relu1", "relu1"],
        ("relu1",): ["", "relu1", "relu1"],
    }
    assert read == expected[sites]
    said = [str(w.message) for w in caught if issubclass(w.category, DQAWarning)]
    assert len(said) == (sites == ("relu1",))
    assert all("'relu0'" in text and "no site" in text for text in said)
    assert model(inputs(3, seed=2)).shape == (3, 4, 12, 12)


def test_an_unknown_site_is_refused_by_name() -> None:
    with pytest.raises(InvalidMethod, match=r"'layer9' is no quantized site.*'input', 'relu0'"):
        connect([ActivationQuantizer(Direct(qparams=QPP(sites=("layer9",))), name="relu0")])


def test_a_module_stands_for_the_last_site_in_it() -> None:
    method = Direct(qparams=QPP(sites=("layer1",)))
    quantizers = [
        ActivationQuantizer(method, name=n) for n in ("stem", "layer1.0.relu", "layer1.1.relu", "layer2.relu")
    ]
    connect(quantizers)
    assert [q.predictor.site for q in quantizers if q.predictor] == ["", "", "layer1.1.relu", "layer1.1.relu"]


@pytest.mark.parametrize("mode", ["paper", "extended"])
@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (inputs(4), "too few"),
        (inputs(1).expand(32, -1, -1, -1), "constant"),
    ],
)
def test_fallback_is_static_and_names_the_layers(mode: str, x: Tensor, reason: str) -> None:
    method = DenseSparse(qparams=QPP(mode=mode, sites=("input",), augment=False))
    with pytest.warns(DQAWarning, match=f"'relu0', 'relu1', 'relu2'.*{reason}"):
        model = calibrate(method, x)
    static = Net(method.replace(qparams="static")).eval()
    with torch.no_grad():
        static(x)
    for _, quantizer in iter_quantizers(static):
        quantizer.freeze()
    probe = inputs(5, seed=3)
    torch.testing.assert_close(model(probe), static(probe))


def test_linearly_dependent_features_fall_back() -> None:
    """Every tensor two-valued: three quantiles and the maximum coincide."""
    x = (inputs(32) > 0.5).float() * torch.linspace(0.5, 2, 32).reshape(-1, 1, 1, 1)
    with pytest.warns(DQAWarning, match="linearly dependent"):
        calibrate(Direct(qparams=QPP(mode="paper", sites=("input",))), x)


@pytest.mark.parametrize("mode", ["paper", "extended"])
def test_radial_basis_functions_are_of_the_extended_mode(mode: str) -> None:
    """Exposures from 1 to 1 / 30, under biases that set a floor: log thresholds bend."""
    x = inputs(64) * torch.logspace(0, -1.5, 8).repeat(8).reshape(-1, 1, 1, 1)
    model = calibrate(DenseSparse(density=0.05, qparams=QPP(mode=mode, sites=("input",))), x)
    assert any(len(q.predictor.centres) for _, q in iter_quantizers(model) if q.predictor) == (mode == "extended")
    few = calibrate(DenseSparse(density=0.05, qparams=QPP(mode=mode, sites=("input",))), x[:24])
    assert not any(len(q.predictor.centres) for _, q in iter_quantizers(few) if q.predictor)


def test_few_samples_use_mean_and_maximum_only() -> None:
    model = calibrate(DenseSparse(qparams=QPP(sites=("input",), augment=False)), inputs(20))
    for _, quantizer in iter_quantizers(model):
        assert quantizer.predictor is not None
        used = quantizer.predictor.weight.abs().sum(1).nonzero().flatten().tolist()
        assert set(used) <= {3, 4}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_state_dict_into_a_fresh_model(method: Method) -> None:
    plain = calibrate(method.replace(qparams=QPP()))
    twin = Net(plain.relu0.method).eval()
    twin.load_state_dict(plain.state_dict())
    with pytest.raises(UncalibratedQuantizer, match=r"dqa_plugins\.qpp\.link"):
        twin(inputs(4, seed=9))
    assert torch.equal(link(twin)(inputs(4, seed=9)), plain(inputs(4, seed=9)))
    method = method.replace(qparams=QPP(sites=("input", "relu1")))
    model = calibrate(method)
    fresh = Net(method).eval()
    fresh.load_state_dict(torch.load(_saved(model.state_dict()), weights_only=True))
    x = inputs(4, seed=9)
    expected = model(x)
    with pytest.raises(UncalibratedQuantizer, match=r"dqa_plugins\.qpp\.link"):
        fresh(x)
    assert torch.equal(link(fresh)(x), expected)


def _saved(state: dict[str, Any]) -> Any:
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


def test_a_calibrating_model_goes_on_after_a_round_trip() -> None:
    """The rows of the samples are part of the state."""
    method = DenseSparse(qparams=QPP(augment=False))
    one, other = Net(method).eval(), Net(method).eval()
    for model in (one, other):
        forwards = connect([quantizer for _, quantizer in iter_quantizers(model)])
        assert forwards is not None
        forwards.attach(model)
    with torch.no_grad():
        one(inputs())
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for model in (one, other):
        fit(model)
        for _, quantizer in iter_quantizers(model):
            quantizer.freeze()
        link(model)
    assert torch.equal(one(inputs(3, seed=4)), other(inputs(3, seed=4)))


def test_deepcopies_are_independent() -> None:
    model = calibrate(DenseSparse(qparams=QPP(sites=("input",))))
    twin, x = copy.deepcopy(model), inputs(4, seed=9)
    expected = model(x)
    twin(inputs(2, seed=1))
    assert torch.equal(twin(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    quantizer = ActivationQuantizer(DenseSparse(qparams=QPP()), name="a")
    x = inputs().to(dtype)
    quantizer(x)
    fit(quantizer)
    y = quantizer.freeze()(x)
    assert y.dtype == dtype
    assert torch.isfinite(y).all()
    assert 0 < float((y - x).abs().max()) < 1.0


def test_alone_a_quantizer_is_its_own_site() -> None:
    quantizer = ActivationQuantizer(Direct(qparams=QPP()), name="a")
    quantizer(inputs())
    dynamic = ActivationQuantizer(Direct(qparams="dynamic"), name="a")
    dynamic(inputs())
    x = inputs(4, seed=8)
    fit(quantizer)
    assert torch.equal(quantizer.freeze()(x), dynamic.freeze()(x))


@pytest.mark.parametrize("mode", ["paper", "extended"])
def test_freezing_an_unfitted_quantizer_makes_it_static(mode: str) -> None:
    """Freezing one quantizer fits nothing; one warning says what it means."""
    quantizer = ActivationQuantizer(DenseSparse(qparams=QPP(mode=mode)), name="a")
    quantizer(inputs())
    static = ActivationQuantizer(DenseSparse(), name="a")
    static(inputs())
    x = inputs(4, seed=8)
    with pytest.warns(DQAWarning, match=r"'a'.*frozen before dqa_plugins\.qpp\.fit"):
        quantizer.freeze()
    torch.testing.assert_close(quantizer(x), static.freeze()(x))


def test_zero_and_huge_samples_stay_finite() -> None:
    for mode in ("paper", "extended"):
        model = calibrate(DenseSparse(qparams=QPP(mode=mode)))
        with torch.no_grad():
            assert torch.isfinite(model(torch.zeros(1, 3, 12, 12))).all()
            assert torch.isfinite(model(inputs(1) * 1e6)).all()


def test_augmentation_is_of_the_sample_not_of_the_batch() -> None:
    x = inputs(6)
    whole = change((x,), 10)[0]
    assert torch.equal(whole[2:4], change((x[2:4],), 12)[0])
    assert not torch.equal(whole, change((x,), 10, seed=1)[0])
    assert float(whole.min()) >= 0
    tokens = torch.arange(4)
    assert change((tokens,), 0)[0] is tokens


def test_augmentation_turns_half_of_the_samples_negative() -> None:
    x = torch.linspace(0.0, 1.0, 144).reshape(1, 1, 12, 12).expand(40, -1, -1, -1)
    changed = change((x,), 0)[0].flatten(1)
    rising = changed[:, 72:].mean(1) > changed[:, :72].mean(1)
    assert 10 < int(rising.sum()) < 30


def test_augmentation_can_be_replaced() -> None:
    calls = []

    def darker(batch: tuple[Any, ...], first_sample: int) -> tuple[Any, ...]:
        calls.append(first_sample)
        return (batch[0] * 0.5,)

    method = DenseSparse(qparams=QPP(augment=darker))
    model = calibrate(method)
    assert calls == [0, 16, 32]
    static = model.relu0.predictor.static
    other = calibrate(DenseSparse(qparams=QPP(augment=False)))
    assert torch.equal(static, other.relu0.predictor.static), "augmented samples must not move static parameters"
    assert not torch.equal(model.relu1.predictor.weight, other.relu1.predictor.weight)
    assert method_from_dict(method_to_dict(method)) == method


@pytest.mark.parametrize(
    "fields",
    [
        {"mode": "best"},
        {"sites": "input"},
        {"sites": ()},
        {"sites": (3,)},
        {"intercept": 1},
        {"augment": "yes"},
        {"seed": -1},
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(InvalidMethod, match=name):
        QPP(**fields)


@pytest.mark.parametrize("value", ["predicted", "qpp", QPP, None, 3])
def test_bad_sources_are_named(value: Any) -> None:
    with pytest.raises(InvalidMethod, match="qparams"):
        Direct(qparams=value)


def test_unknown_fields_of_a_dict_are_named() -> None:
    with pytest.raises(InvalidMethod, match="modus"):
        method_from_dict({"method": "dqa", "qparams": {"modus": "paper"}})


def test_training_is_refused() -> None:
    with pytest.raises(UnsupportedCombination, match="QPP is fitted once"):
        ActivationQuantizer(Direct(qparams=QPP()), name="a").start_qat()


def test_a_state_of_another_source_is_refused() -> None:
    quantizer = ActivationQuantizer(Direct(), name="a")
    quantizer(inputs())
    state = quantizer.freeze().state_dict()
    with pytest.raises((StateMismatch, RuntimeError)):
        ActivationQuantizer(Direct(qparams=QPP()), name="a").load_state_dict(state)


def test_no_data_raises() -> None:
    with pytest.raises(UncalibratedQuantizer, match="'a'"):
        ActivationQuantizer(Direct(qparams=QPP()), name="a").freeze()


def test_report_without_predictions_raises() -> None:
    with pytest.raises(UnsupportedCombination, match="QPP"):
        qpp_report(nn.ReLU(), [])


def test_report(tmp_path: Any) -> None:
    model = calibrate(DenseSparse(density=0.05, qparams=QPP()))
    report = qpp_report(model, inputs(32, seed=5).split(8))
    text, values = str(report), report.as_dict()
    assert "FR(0.5)" in text
    assert "relu2" in text
    assert values["dynamic_fr05"] <= values["predicted_fr05"] <= values["static_fr05"]
    assert [layer.small for layer in report.layers] == [False] * 3
    densities = torch.cat([layer.densities["static"] for layer in report.layers])
    assert values["static_fr1"] == pytest.approx(failure_rate(densities, 0.05, 0.05))
    report.plot(tmp_path / "report.png", "a network")
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_metrics() -> None:
    x = torch.tensor([[-2.0, -1.0, 0.0, 1.0, 2.0]])
    assert density(x, torch.tensor(-1.0), torch.tensor(1.0)).tolist() == [0.4]
    assert failure_rate(torch.tensor([0.004, 0.005, 0.01, 0.015, 0.016]), 0.01, 0.005) == pytest.approx(0.4)
    assert failure_rate(torch.empty(0)) != failure_rate(torch.empty(0))
    error = prediction_error(torch.tensor([[1.1, 2.0], [0.5, 4.0]]), torch.tensor([[1.0, 2.0], [0.0, 4.0]]))
    torch.testing.assert_close(error, torch.tensor([0.05, 0.0625], dtype=torch.float64), atol=1e-6, rtol=0)


def test_a_site_that_uses_its_own_statistic_is_not_called_static() -> None:
    """Too few samples to fit: relu1 and relu2 fall back, the site relu0 takes its statistic from the tensor at hand."""
    method = DenseSparse(qparams=QPP(augment=False))
    with pytest.warns(DQAWarning, match=r"static parameters at 'relu1', 'relu2': 4 calibration samples"):
        model = calibrate(method, inputs(4))
    first = dict(iter_quantizers(model))["relu0"]
    assert first.predictor.reason == ""
    x = torch.rand(3, 4, 12, 12) * torch.tensor([1.0, 5.0, 50.0]).reshape(-1, 1, 1, 1)
    own = ActivationQuantizer(method.replace(qparams="dynamic"), name="relu0")
    own(x)
    assert torch.equal(first(x), own.freeze()(x))


@pytest.mark.parametrize(("batches", "error"), [(torch.rand(3, 3, 12, 12), "UnsupportedInput"), ([], "Uncalibrated")])
def test_reports_refuse_what_is_no_list_of_batches(batches: Any, error: str) -> None:
    model = calibrate(DenseSparse(qparams=QPP(augment=False, sites=("input",))), inputs(16))
    for report in (qpp_report, activation_report):
        with pytest.raises(DQAError, match=rf"{report.__name__}") as raised:
            report(model, batches)
        assert type(raised.value).__name__.startswith(error)
    with pytest.raises(UnsupportedCombination, match="no quantizers"):
        activation_report(torch.nn.ReLU(), [torch.ones(1)])
