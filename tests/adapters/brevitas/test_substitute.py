"""substitute_layers, and Brevitas' own layerwise_quantize, quantize and rewriters."""

from __future__ import annotations

import copy
from typing import Any

import brevitas.nn as qnn
import pytest
import torch
from brevitas import config
from brevitas.graph.base import ModuleToModuleByClass, ModuleToModuleByName
from brevitas.graph.quantize import (
    COMPUTE_LAYER_MAP,
    LAYERWISE_COMPUTE_LAYER_MAP,
    QUANT_ACT_MAP,
    QUANT_IDENTITY_MAP,
    layerwise_quantize,
    preprocess_for_quantize,
    quantize,
)
from torch import nn

from dqa_plugins import DQA, ActivationQuantizer, DenseSparse, Direct, NoisyQuant, iter_quantizers
from dqa_plugins.adapters.brevitas import DirectAct, DQAAct, get_act_quant, substitute_layers
from dqa_plugins.errors import DQAWarning, InvalidArgument, NotAMethod, UnsupportedCombination
from tests.adapters.brevitas.nets import METHODS, bare, calibrate, data, float_net, names

X = data(2, 3, 10, 10)


def methods(model: nn.Module) -> dict[str, Any]:
    return {name: quantizer.method for name, quantizer in iter_quantizers(model)}


def test_by_class_and_by_name() -> None:
    model = float_net()
    same = substitute_layers(model, {nn.ReLU: DQA(bits=4), "block.relu2": Direct(bits=6), "act": None})
    assert same is model
    assert type(model.block.relu1) is qnn.QuantReLU
    assert type(model.act) is nn.ReLU
    assert methods(model) == {"block.relu1": DQA(bits=4), "block.relu2": Direct(bits=6)}
    calibrate(model, X)
    assert names(model) == ["block.relu1", "block.relu2"]
    assert all(type(q) is ActivationQuantizer and q.state == "frozen" for _, q in iter_quantizers(model))


def test_substituted_layers_equal_bare_quantizers_in_place() -> None:
    """Each site is fed what the float layer would have given it while calibrating, and quantizes as a bare one."""
    reference, model = float_net(), float_net()
    layers = dict(zip(("act", "block.relu1", "block.relu2", "pool"), METHODS, strict=True))
    substitute_layers(model, layers)
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    for name, seen in inputs.items():
        reference.get_submodule(name).register_forward_hook(lambda m, x, y, seen=seen: seen.append(y.clone()))
    with torch.no_grad():
        for x in X:
            reference(x)
    calibrate(model, X)
    for name, method in layers.items():
        quantizer = dict(iter_quantizers(model))[name]
        expected = bare(method, inputs[name], name)
        assert torch.equal(quantizer(inputs[name][0]), expected(inputs[name][0])), name


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (nn.ReLU6(), qnn.QuantHardTanh),
        (nn.Hardtanh(-2.0, 3.0), qnn.QuantHardTanh),
        (nn.Sigmoid(), qnn.QuantSigmoid),
        (nn.Tanh(), qnn.QuantTanh),
        (nn.Hardswish(), qnn.QuantHardSwish),
        (nn.Identity(), qnn.QuantIdentity),
        (nn.GELU("tanh"), None),
        (nn.LeakyReLU(0.3), None),
        (nn.AvgPool2d(2), None),
    ],
    ids=lambda case: type(case).__name__ if isinstance(case, nn.Module) else "",
)
def test_every_activation_keeps_its_function(old: nn.Module, new: type[nn.Module] | None) -> None:
    x = [batch * 4 for batch in data(2, 8, 6, 6)]
    model = substitute_layers(nn.Sequential(copy.deepcopy(old)).eval(), {type(old): DQA(bits=8)})
    assert new is None or type(model[0]) is new
    assert not model[0].training
    calibrate(model, x)
    expected = bare(DQA(bits=8), [old(batch) for batch in x], "0")
    assert torch.equal(model(x[0]), expected(old(x[0])))


def test_a_shared_module_stays_shared_and_a_root_is_returned() -> None:
    relu = nn.ReLU()
    model = substitute_layers(nn.Sequential(relu, nn.Sequential(relu)), {nn.ReLU: Direct()})
    assert model[0] is model[1][0]
    assert names(model) == ["0"]
    assert type(substitute_layers(nn.ReLU(), {nn.ReLU: Direct()})) is qnn.QuantReLU


def test_brevitas_layers_can_be_substituted_too() -> None:
    stock = nn.Sequential(
        qnn.QuantReLU(bit_width=8, return_quant_tensor=True),
        qnn.QuantHardTanh(min_val=-1.0, max_val=1.5),
        qnn.QuantSigmoid(),
    )
    model = substitute_layers(stock, {"0": DQA(bits=3), qnn.QuantHardTanh: Direct(bits=5)})
    x = data(2, 8, 4)
    calibrate(model, x)
    assert methods(model) == {"0": DQA(bits=3), "1": Direct(bits=5)}
    assert model[0].return_quant_tensor
    quantized = substitute_layers(nn.Sequential(qnn.QuantHardTanh(min_val=-1.0, max_val=1.5)), {"0": Direct(bits=8)})
    clipped = [nn.functional.hardtanh(batch, -1.0, 1.5) for batch in x]
    assert torch.equal(calibrate(quantized, x)(x[0]), bare(Direct(bits=8), clipped, "0")(clipped[0]))


@pytest.mark.parametrize(
    ("layers", "error", "words"),
    [
        ({"block.relu3": DQA()}, InvalidArgument, "no module 'block.relu3'"),
        ({"relu1": DQA()}, InvalidArgument, "did you mean 'block.relu1'"),
        ({nn.ReLU: DQA}, NotAMethod, "ReLU.*did you mean DQA"),
        ({nn.ReLU: 4}, NotAMethod, "got 4"),
        ({4: DQA()}, InvalidArgument, "neither a module class nor a qualified name"),
        ({"block.conv1": DQA()}, UnsupportedCombination, "'block.conv1' is a Conv2d.*output_quant"),
        ({"block": DQA()}, UnsupportedCombination, "'block' is a Block"),
        (
            {nn.ReLU: NoisyQuant(objective="output")},
            UnsupportedCombination,
            "'act' .NoisyQuant.*objective='activation'",
        ),
    ],
)
def test_a_wrong_entry_is_named_and_changes_nothing(layers: Any, error: type[Exception], words: str) -> None:
    model = float_net()
    with pytest.raises(error, match=words):
        substitute_layers(model, layers)
    assert type(model.act) is type(model.block.relu2) is nn.ReLU


def test_a_class_that_matches_nothing_warns() -> None:
    with pytest.warns(DQAWarning, match=r"no GELU"):
        substitute_layers(float_net(), {nn.ReLU: DQA(), nn.GELU: DQA()})
    with (
        pytest.warns(DQAWarning, match=r"no GELU"),
        pytest.raises(InvalidArgument, match="nothing in the model"),
    ):
        substitute_layers(float_net(), {nn.GELU: DQA()})


# ---------------------------------------------------------------- Brevitas' own functions


def test_layerwise_quantize() -> None:
    layers = dict(LAYERWISE_COMPUTE_LAYER_MAP)
    layers[nn.ReLU] = (
        qnn.QuantReLU,
        {"act_quant": DQAAct, "bit_width": 4, "extra_bits": lambda module, name: 1 if name == "block.relu2" else 2},
    )
    model = calibrate(layerwise_quantize(float_net(), layers, name_blacklist=["act"]), X)
    assert methods(model) == {"block.relu1": DQA(bits=4, extra_bits=2), "block.relu2": DQA(bits=4, extra_bits=1)}
    assert not config.IGNORE_MISSING_KEYS


def _quantized(act: Any, identity: Any, compute: Any = COMPUTE_LAYER_MAP, **kwargs: Any) -> nn.Module:
    acts = dict(QUANT_ACT_MAP)
    acts[nn.ReLU] = (qnn.QuantReLU, {"act_quant": act, "return_quant_tensor": True, **kwargs})
    graph = preprocess_for_quantize(float_net())
    return calibrate(quantize(graph, identity, compute_layer_map=compute, quant_act_map=acts), X)


IDENTITIES = {
    "stock": QUANT_IDENTITY_MAP,
    "ours": {
        sign: (qnn.QuantIdentity, {"act_quant": DirectAct, "bit_width": 8, "return_quant_tensor": True, "signed": s})
        for sign, s in (("signed", True), ("unsigned", False))
    },
}


@pytest.mark.parametrize("identity", IDENTITIES)
def test_graph_quantize_with_a_residual(identity: str) -> None:
    """Both inputs of the add are requantized by one shared QuantIdentity, ours among them."""
    model = _quantized(get_act_quant(DQA(bits=6)), IDENTITIES[identity])
    found = methods(model)
    assert {"act", "block.relu1", "block.relu2"} <= set(found)
    assert found["block.relu1"] == DQA(bits=6)
    assert ("add_quant" in found) == (identity == "ours")
    exact, approximate = float_net()(X[0]).detach(), model(X[0]).detach()
    assert float((approximate - exact).norm() / exact.norm()) < 0.05


def test_graph_quantize_with_a_method_without_integer_grid() -> None:
    with pytest.raises(UnsupportedCombination, match=r"Dense\+Sparse keeps outliers in float"):
        _quantized(get_act_quant(DenseSparse()), QUANT_IDENTITY_MAP)
    plain = {
        kind: entry and (entry[0], {**entry[1], "bias_quant": None, "return_quant_tensor": False})
        for kind, entry in COMPUTE_LAYER_MAP.items()
    }
    model = _quantized(get_act_quant(DenseSparse(bits=6)), QUANT_IDENTITY_MAP, plain, return_quant_tensor=False)
    exact = float_net()(X[0])
    assert float((model(X[0]) - exact).norm() / exact.norm()) < 0.05


def test_rewriters_with_ignored_missing_keys() -> None:
    ignored, config.IGNORE_MISSING_KEYS = config.IGNORE_MISSING_KEYS, True
    try:
        model = ModuleToModuleByClass(nn.ReLU, qnn.QuantReLU, act_quant=DQAAct, bit_width=3).apply(float_net())
        named = ModuleToModuleByName("act", qnn.QuantReLU, act_quant=DQAAct, bit_width=3).apply(float_net())
    finally:
        config.IGNORE_MISSING_KEYS = ignored
    assert names(calibrate(model, X)) == ["act", "block.relu1", "block.relu2"]
    assert names(calibrate(named, X)) == ["act"]
