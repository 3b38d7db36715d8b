"""Training through the quantizers: from a calibrated model, and from one that never was calibrated."""

from __future__ import annotations

from typing import Any

import brevitas.nn as qnn
import pytest
import torch
from torch import Tensor, nn

from dqa_plugins import DQA, DenseSparse, Direct, Method, NoisyQuant, iter_quantizers
from dqa_plugins.adapters.brevitas import DQAAct, get_act_quant, start_qat, substitute_layers
from dqa_plugins.errors import UncalibratedQuantizer, UnsupportedCombination
from tests.adapters.brevitas.nets import METHODS, calibrate, data, float_net, label, names, quant_net

X = data(2, 3, 8, 8)


@pytest.mark.parametrize("method", METHODS, ids=label)
def test_gradients_pass_a_calibrated_layer_and_its_scale_stays(method: Method) -> None:
    model = calibrate(quant_net(method), X).train()
    state = {k: v.clone() for k, v in model.state_dict().items() if "quantizer" in k}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [model[i].weight.detach().clone() for i in (0, 2)]
    model(X[0]).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(model[i].weight, w) for i, w in zip((0, 2), before, strict=True))
    assert {q.state for _, q in iter_quantizers(model)} == {"frozen"}
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if k in state)


@pytest.mark.parametrize("method", METHODS, ids=label)
def test_training_an_uncalibrated_model_is_qat(method: Method) -> None:
    model = quant_net(method).train()
    with pytest.raises(UncalibratedQuantizer, match=r"'1'"):
        model.eval()(X[0])
    model.train()(X[0]).sum().backward()
    assert {q.state for _, q in iter_quantizers(model)} == {"qat"}
    assert names(model) == ["1", "3"]
    model.eval()
    with torch.no_grad():
        first = model(X[0])
        assert torch.equal(model(X[0]), first), "eval mode observes nothing"
    quantizer = model[1].act_quant.quantizer
    seen = quantizer.calibration.count
    model.train()(X[1])
    assert quantizer.calibration.count == seen + len(X[1])


def test_return_quant_tensor_while_training() -> None:
    layer = qnn.QuantReLU(act_quant=DQAAct, bit_width=3, return_quant_tensor=True).train()
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    out = layer(x)
    assert out.training
    assert out.is_valid
    out.value.sum().backward()
    assert x.grad is not None
    low = x < 0.9 * x.detach().max()  # the top code of an unimportant channel ends below the maximum
    assert torch.equal(x.grad[low] != 0, x[low] > 0)  # straight through, behind the ReLU


def test_gradient_is_zero_outside_the_clip_range() -> None:
    model = calibrate(
        nn.Sequential(qnn.QuantIdentity(act_quant=get_act_quant(Direct(signed=True)))), [torch.ones(2, 8)]
    )
    x = torch.tensor([[0.5, -0.5, 3.0, -3.0]]).repeat(2, 2).requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.tensor([[1.0, 1.0, 0.0, 0.0]]).repeat(2, 2))


def test_start_qat_names_and_refuses_frozen_quantizers() -> None:
    model = start_qat(quant_net(NoisyQuant()))
    assert [(name, q.state) for name, q in iter_quantizers(model)] == [("1", "qat"), ("3", "qat")]
    with pytest.raises(UncalibratedQuantizer, match=r"'1'"):
        model.eval()(X[0])
    with pytest.raises(UnsupportedCombination, match=r"'1'.*frozen"):
        start_qat(calibrate(quant_net(DQA()), X))


def test_a_trained_model_can_be_calibrated_afterwards() -> None:
    model = quant_net(DQA()).train()
    model(X[0]).sum().backward()
    calibrate(model, X)
    assert {q.state for _, q in iter_quantizers(model)} == {"frozen"}
    assert torch.equal(model(X[0]), calibrate(quant_net(DQA()), X)(X[0]))


def test_qat_state_survives_a_state_dict() -> None:
    model = quant_net(DQA()).train()
    model(X[0])
    fresh = quant_net(DQA())
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(X[1]), model.eval()(X[1]))
    assert {q.state for _, q in iter_quantizers(fresh)} == {"qat"}


def test_tokens_or_length_is_asked_for_not_guessed() -> None:
    class Layer(nn.Module):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 8)
            self.act = qnn.QuantReLU(act_quant=DQAAct, **kwargs)

        def forward(self, x: Tensor) -> Any:
            return self.act(self.fc(x))

    x = torch.randn(2, 5, 6)
    with pytest.raises(UnsupportedCombination, match=r"'act'.*channel_axis=-1 or 1, or calibrate first"):
        Layer().train()(x)
    assert Layer(channel_axis=-1).train()(x).shape == (2, 5, 8)
    assert calibrate(Layer(), [x]).train()(x).shape == (2, 5, 8)


@pytest.mark.parametrize(
    ("method", "calibrated"),
    [
        (DQA(bits=2), True),
        pytest.param(Direct(bits=2), False, marks=pytest.mark.slow),
        pytest.param(Direct(bits=3), True, marks=pytest.mark.slow),
        pytest.param(DenseSparse(bits=2), True, marks=pytest.mark.slow),
    ],
    ids=lambda case: f"{case.name}{case.bits}" if isinstance(case, Method) else str(case),
)
def test_a_short_training_run_beats_ptq(method: Method, calibrated: bool) -> None:
    """ResNet-32 on the real digits: some twenty steps at 2 or 3 bits, measured on test images."""
    pytest.importorskip("sklearn", reason="the digits need scikit-learn")
    pytest.importorskip("safetensors", reason="the weights need safetensors")
    from examples.networks import load
    from examples.networks.digits import calibration_subset, load_split
    from examples.networks.scores import accuracy

    split = load_split()
    test = (split.test_images[:300], split.test_labels[:300])
    ptq = substitute_layers(load("resnet32")[0], {nn.ReLU: method})
    calibrate(ptq, calibration_subset(split, 128)[0].split(64))
    before = accuracy(ptq, *test)
    model = ptq if calibrated else substitute_layers(load("resnet32")[0], {nn.ReLU: method})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for chosen in torch.randperm(len(split.train_images), generator=generator).split(48):
        loss = nn.functional.cross_entropy(model(split.train_images[chosen]), split.train_labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = accuracy(model.eval(), *test)
    print(f"{method.name} {method.bits} bits: PTQ {before:.1f}, after one epoch {after:.1f}")  # pytest -s
    assert after > before + 5


def test_float_net_with_batch_norm_trains() -> None:
    model = substitute_layers(float_net(), {nn.ReLU: DQA(bits=3)}).train()
    model(data(4, 3, 8, 8)[0]).sum().backward()
    assert model.stem.weight.grad.abs().sum() > 0
