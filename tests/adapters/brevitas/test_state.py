"""state_dict, deepcopy, Brevitas' weight algorithms and BREVITAS_JIT=1."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import brevitas.nn as qnn
import pytest
import torch
from brevitas.graph.calibrate import bias_correction_mode, quantization_status_manager
from brevitas.graph.gpfq import gpfq_mode
from brevitas.graph.gptq import gptq_mode
from torch import nn

from dqa_plugins import DQA, Direct, Method, iter_quantizers
from dqa_plugins.adapters.brevitas import DirectAct
from dqa_plugins.errors import StateMismatch
from tests.adapters.brevitas.nets import METHODS, SOURCES, calibrate, data, label, names, quant_net

X = data(2, 3, 8, 8)


@pytest.mark.parametrize("qparams", SOURCES)
@pytest.mark.parametrize("method", METHODS, ids=label)
def test_state_dict_into_a_fresh_model(method: Method, qparams: str, tmp_path: Path) -> None:
    method = method.replace(qparams=qparams)
    model = calibrate(quant_net(method), X)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    fresh = quant_net(method).eval()
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(fresh(X[0]), model(X[0]))
    assert names(fresh) == ["1", "3"]
    assert {q.state for _, q in iter_quantizers(fresh)} == {"frozen"}


def test_a_state_dict_survives_half_a_calibration_and_loads_twice() -> None:
    model = calibrate(quant_net(DQA()), X)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    other = calibrate(quant_net(DQA()), [x * 7 for x in X])
    for _ in range(2):
        other.load_state_dict(state)
        assert torch.equal(other(X[0]), model(X[0]))


def test_a_state_dict_of_another_method_is_refused_by_name() -> None:
    state = calibrate(quant_net(DQA()), X).state_dict()
    with pytest.raises(StateMismatch, match=r"'1'.*DQA.*Direct"):
        quant_net(Direct()).load_state_dict(state)


def test_missing_keys_are_reported_unless_brevitas_ignores_them() -> None:
    with pytest.raises(RuntimeError, match=r"quantizer.scale"):
        nn.Sequential(qnn.QuantReLU(act_quant=DirectAct)).load_state_dict({})


@pytest.mark.parametrize("method", METHODS, ids=label)
def test_deepcopy_is_independent(method: Method) -> None:
    model = calibrate(quant_net(method), X)
    expected = model(X[0]).detach()
    other = copy.deepcopy(model)
    assert torch.equal(other(X[0]), expected)
    calibrate(other, [x * 9 for x in X])
    assert not torch.equal(other(X[0]), expected)
    assert torch.equal(model(X[0]), expected)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X[0]), expected)
    uncalibrated = copy.deepcopy(quant_net(method))
    assert torch.equal(calibrate(uncalibrated, X)(X[0]), expected)


@pytest.mark.parametrize("method", METHODS, ids=label)
def test_disabled_quantization_is_float(method: Method) -> None:
    model = calibrate(quant_net(method), X)
    off = {"disable_act_quant": True, "disable_weight_quant": True, "disable_bias_quant": True}
    with torch.no_grad(), quantization_status_manager(model, is_training=False, **off):
        disabled = model(X[0])
    y = X[0]
    for layer in (model[0], model[2]):
        y = nn.functional.conv2d(y, layer.weight, layer.bias).relu()
    assert torch.allclose(disabled, nn.functional.linear(y.flatten(1), model[5].weight, model[5].bias), atol=1e-6)
    assert not torch.equal(model(X[0]), disabled)


@pytest.mark.parametrize("method", METHODS, ids=label)
def test_bias_correction(method: Method) -> None:
    model = calibrate(quant_net(method), X)
    state = {k: v.clone() for k, v in model.state_dict().items() if "quantizer" in k}
    bias = model[2].bias.detach().clone()
    with torch.no_grad(), bias_correction_mode(model):
        for x in X:
            model(x)
    assert not torch.equal(model[2].bias, bias)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if k in state)


@pytest.mark.parametrize("mode", [gpfq_mode, gptq_mode], ids=["gpfq", "gptq"])
@pytest.mark.parametrize(("method", "use_quant_activations"), [*((m, True) for m in METHODS), (DQA(), False)], ids=str)
def test_weight_algorithms(method: Method, use_quant_activations: bool, mode: Any) -> None:
    model = calibrate(quant_net(method), X)
    before = model[2].weight.detach().clone()
    state = {k: v.clone() for k, v in model.state_dict().items() if "quantizer" in k}
    with torch.no_grad(), mode(model, use_quant_activations=use_quant_activations) as algorithm:
        for _ in range(algorithm.num_layers):
            for x in X:
                algorithm.model(x)
            algorithm.update()
    assert not torch.equal(model[2].weight, before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if k in state)
    assert torch.isfinite(model(X[0])).all()


SCRIPT = """
import copy, sys, torch
from brevitas import config
from tests.adapters.brevitas.nets import METHODS, calibrate, data, quant_net
assert bool(config.JIT_ENABLED)
x = data(2, 3, 8, 8)
outputs = []
for method in METHODS:
    model = calibrate(quant_net(method), x)
    outputs.append(model(x[0]).detach())
    fresh = quant_net(method).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x[0]), model(x[0]))
    assert torch.equal(copy.deepcopy(model)(x[0]), model(x[0]))
    trained = quant_net(method).train()
    trained(x[0]).sum().backward()
    assert trained[0].weight.grad.abs().sum() > 0
torch.save(outputs, sys.argv[1])
"""


@pytest.mark.slow
def test_with_jit_the_numbers_are_the_same(tmp_path: Path) -> None:
    """Brevitas scripts its own quantizers; ours stay in Python.

    What 0.13.4 cannot do with a scripted model, ours or stock: load a state_dict into a deepcopy (it looks for
    `_zero_hw_sentinel.value` keys that it never wrote).
    """
    root = Path(__file__).parents[3]
    env = {**os.environ, "BREVITAS_JIT": "1", "PYTHONPATH": str(root)}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "out.pt")], env=env, cwd=root, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    for method, output in zip(METHODS, torch.load(tmp_path / "out.pt"), strict=True):
        expected = calibrate(quant_net(method), X)(X[0])
        assert torch.allclose(output, expected, atol=1e-6), method


def test_compile() -> None:
    """One graph, without a break."""
    layer = calibrate(quant_net(DQA()), X)[1]
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))
