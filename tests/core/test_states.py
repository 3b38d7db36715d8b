"""observe, frozen, qat: what moves in each state, and what the host's train() and eval() may not change."""

from __future__ import annotations

import copy

import pytest
import torch

from dqa_plugins import DQA, ActivationQuantizer, DenseSparse, Direct, NoisyQuant
from dqa_plugins.errors import UncalibratedQuantizer, UnsupportedCombination
from tests.compare import assert_exact, assert_matches_reference, calibrated, same_bits

METHODS = [Direct(bits=3), Direct(bits=3, symmetric=False), DQA(bits=3), NoisyQuant(bits=3), DenseSparse(bits=3)]
METHODS += [m.replace(qparams="dynamic") for m in METHODS] + [Direct(clip="mse"), DQA(granularity="channel")]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{type(m).__name__}-{m.qparams}-{m.clip}")


def data(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 5, 4, 4, generator=generator) * (1 + seed)


def snapshot(q: ActivationQuantizer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in q.state_dict().items()}


def assert_unchanged(q: ActivationQuantizer, before: dict[str, torch.Tensor]) -> None:
    for name, value in q.state_dict().items():
        assert same_bits(value, before[name]), name


@every_method
def test_the_initial_state_observes(method):
    q = ActivationQuantizer(method, name="site")
    assert q.state == "observe"
    assert not q.calibrated
    x = data()
    assert same_bits(q(x), x)
    assert q.calibrated
    assert q.calibration.count == 6


@every_method
def test_a_frozen_quantizer_does_not_move(method):
    """Neither in training mode nor in eval mode, whatever it is fed."""
    q = calibrated(method, [data()])
    before, expected = snapshot(q), q(data(1))
    for mode in (True, False):
        q.train(mode)
        q(data(7) * 100)
        assert_unchanged(q, before)
        assert same_bits(q(data(1)), expected)
    assert q.freeze() is q, "freezing twice is harmless"
    assert_unchanged(q, before)


@every_method
@pytest.mark.parametrize("state", ["observe", "frozen", "qat"])
def test_train_and_eval_never_change_the_state(method, state):
    q = calibrated(method, [data()], freeze=state == "frozen")
    if state == "qat":
        q.start_qat()
    for mode in (False, True, False):
        q.train(mode)
        assert q.state == state


def test_observing_goes_on_in_eval_mode():
    """Hosts calibrate in eval mode."""
    q = ActivationQuantizer(Direct(), name="site").eval()
    q(data())
    assert q.calibration.count == 6


@every_method
def test_freezing_without_data_raises_and_names_the_site(method):
    """Dynamic quantizers too: their sign and channels come from calibration."""
    q = ActivationQuantizer(method, name="blocks.0.relu1")
    with pytest.raises(UncalibratedQuantizer, match=r"'blocks\.0\.relu1'.*3 bits|'blocks\.0\.relu1'.*4 bits") as caught:
        q.freeze()
    assert isinstance(caught.value, RuntimeError)
    assert q.state == "observe"
    q(torch.empty(0, 5, 4, 4))
    with pytest.raises(UncalibratedQuantizer):
        q.freeze()


# ---------------------------------------------------------------- qat


@every_method
def test_qat_records_and_quantizes_while_training(method):
    q = ActivationQuantizer(method, name="site").start_qat().train()
    x = data()
    out = q(x)
    assert q.state == "qat"
    assert q.calibration.count == 6
    assert not torch.equal(out, x)
    assert same_bits(out, calibrated(method, [x])(x)) or method.reduction == "max", (
        "first batch: as if calibrated on it"
    )
    assert out.unique().numel() < x.unique().numel()


@every_method
def test_qat_in_eval_mode_quantizes_and_records_nothing(method):
    q = ActivationQuantizer(method, name="site").start_qat().train()
    q(data())
    q.eval()
    before = snapshot(q)
    out = q(data(1) * 10)
    assert_unchanged(q, before)
    assert same_bits(out, q.freeze()(data(1) * 10)), "frozen, it computes what it did"


def test_qat_in_eval_mode_without_data_raises():
    q = ActivationQuantizer(Direct(), name="site").start_qat().eval()
    with pytest.raises(UncalibratedQuantizer, match=r"'site'.*eval mode"):
        q(data())


def test_qat_moves_a_moving_average():
    """torch.ao's averaging constant: 1% of the way to each batch's statistic."""
    q = ActivationQuantizer(Direct(bits=4), name="site").start_qat().train()
    q(torch.tensor([[-1.0, 8.0]]))
    assert float(q.scale) == 1.0
    q(torch.tensor([[-1.0, 16.0], [0.0, 4.0]]))
    assert float(q.scale) == pytest.approx((8 + 0.01 * 8) / 8)


@every_method
def test_qat_gradients_flow(method):
    q = ActivationQuantizer(method, name="site").start_qat().train()
    x = data().requires_grad_()
    q(x).sum().backward()
    assert x.grad.abs().sum() > 0


@every_method
def test_qat_after_calibration_starts_from_it(method):
    """A calibrated quantizer that enters training can be run in eval mode, or frozen, at once."""
    x = data()
    expected = calibrated(method, [x])(data(1))
    q = calibrated(method, [x], freeze=False).start_qat().eval()
    assert same_bits(q(data(1)), expected)
    q = calibrated(method, [x], freeze=False).start_qat().freeze()
    assert same_bits(q(data(1)), expected)


@every_method
def test_qat_with_an_empty_batch_first(method):
    """An empty batch holds no sample: nothing to decide from, nothing to quantize."""
    q = ActivationQuantizer(method, name="site").start_qat().train()
    assert q(torch.empty(0, 5, 4, 4)).shape == (0, 5, 4, 4)
    q(data())


def test_a_frozen_quantizer_cannot_enter_qat():
    with pytest.raises(UnsupportedCombination, match=r"'site'.*frozen"):
        calibrated(Direct(), [data()]).start_qat()


def test_output_objective_cannot_enter_qat():
    with pytest.raises(UnsupportedCombination, match=r"'site'.*objective='output'"):
        ActivationQuantizer(NoisyQuant(objective="output"), name="site").start_qat()


def test_chosen_extra_bits_survive_qat():
    q = ActivationQuantizer(DQA(bits=4), name="site")
    chosen = torch.tensor([4, 0, -1, 2, 0])
    q.set_extra_bits(chosen)
    q.start_qat().train()
    x = data()
    out = q(x)
    assert torch.equal(q.extra_bits, chosen)
    q.freeze()
    assert torch.equal(q.extra_bits, chosen)
    assert same_bits(q(x), out)


# ---------------------------------------------------------------- dtype and copies


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casting_the_model_leaves_qparams_alone(method, dtype):
    """.half() or .to(dtype), in every state, also from a parent module: same parameters, same numbers."""
    for state in ("observe", "frozen"):
        q = calibrated(method, [data()], freeze=state == "frozen")
        before = snapshot(q)
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), q)
        model.to(dtype)
        assert model[0].weight.dtype == dtype
        assert_unchanged(q, before)
        model.half()
        assert_unchanged(q, before)
        if state == "frozen":
            assert_matches_reference(q, [data()], data(1))
            assert_matches_reference(q, [data()], data(1).half())
            assert q(data(1).to(dtype)).dtype == dtype


def test_qparams_of_half_precision_data_are_float32():
    q = calibrated(Direct(), [data().half()])
    assert q.scale.dtype == torch.float32
    assert_exact(q.scale, data().half().float().abs().max() / 8)
    assert calibrated(Direct(), [data().double()]).scale.dtype == torch.float64


@every_method
@pytest.mark.parametrize("state", ["observe", "frozen", "qat"])
def test_a_copy_is_equal_and_independent(method, state):
    q = calibrated(method, [data()], freeze=state == "frozen")
    if state == "qat":
        q.start_qat().train()(data(2))
    other = copy.deepcopy(q)
    assert other.state == state
    assert other.name == "site"
    assert_unchanged(other, snapshot(q))
    if state == "frozen":
        assert same_bits(other(data(1)), q(data(1)))
    else:
        before = snapshot(q)
        other(data(3))
        assert_unchanged(q, before)


def test_the_repr_of_a_frozen_quantizer_says_what_was_decided():
    x = torch.linspace(-1, 1, 8 * 4).reshape(1, 4, 8)
    assert "signed=True, step=0.121..0.25\n" in repr(calibrated(Direct(bits=3, granularity="channel"), [x]))
    ranked = calibrated(DQA(bits=4, extra_bits=2, ratio=0.5), [x.abs()])
    assert "signed=False, step=0.01562..0.0625, extra_bits>0 on 2 of 4 channels" in repr(ranked)
    assert "step" not in repr(ranked.to("meta"))
    assert repr(calibrated(Direct(qparams="dynamic"), [x])).splitlines()[1].endswith("signed=True")
    assert "signed" not in repr(ActivationQuantizer(Direct(signed=None))).rpartition("state=")[2]
