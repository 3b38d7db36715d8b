"""Weights: NNCF's own numbers, with and without its hooks, and bias correction."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import nncf
import pytest
import torch
from nncf.common.quantization.structs import QuantizationScheme
from nncf.quantization.advanced_parameters import OverflowFix, QuantizationParameters
from nncf.torch.function_hook import get_hook_storage
from nncf.torch.quantization.layers import BaseQuantizer
from torch import Tensor, nn

from dqa_plugins.adapters.nncf import NNCFQuantizer, bake_weights, load, quantize, save
from dqa_plugins.errors import DQAWarning, ExportFailed
from tests.adapters.nncf.models import batches, build, config, outputs_of_modules, quantized
from tests.compare import assert_exact

WEIGHTS: list[dict[str, Any]] = [
    {"bits": 8},
    {"mode": "symmetric", "per_channel": False},
    {"mode": "asymmetric"},
    {"mode": "asymmetric", "per_channel": False},
]


def weight_quantizers(model: nn.Module) -> dict[str, BaseQuantizer]:
    hooks = get_hook_storage(model).named_hooks()
    return {name: module for name, module in hooks if isinstance(module, BaseQuantizer)}


def parameter_of(model: nn.Module, module: Any) -> Tensor:
    return model.get_parameter(module.weight_names[0]).detach()


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_weights_are_what_nncf_computes(weights: dict[str, Any]) -> None:
    """Our exportable form against NNCF's kernel, on the same module."""
    model = quantized("residual", weights=weights, bias_correction=False)
    found = weight_quantizers(model)
    assert len(found) == 3
    for name, module in found.items():
        weight = parameter_of(model, module)
        with torch.no_grad():
            assert_exact(module(weight), module.quantize(weight), name)
        assert len(module(weight).unique()) <= 256 * weight.shape[0]
        assert not torch.equal(module(weight), weight)


def test_per_channel_and_scheme_reach_nncf() -> None:
    shapes = {}
    for weights in WEIGHTS:
        module = next(iter(weight_quantizers(quantized("residual", weights=weights, bias_correction=False)).values()))
        shapes[str(weights)] = (type(module).__name__, tuple(module.scale_shape))
    assert list(shapes.values()) == [
        ("SymmetricWeight", (8, 1, 1, 1)),
        ("SymmetricWeight", (1,)),
        ("AsymmetricWeight", (8, 1, 1, 1)),
        ("AsymmetricWeight", (1,)),
    ]


def test_absent_weights_stay_float() -> None:
    model = quantized("residual")
    assert not weight_quantizers(model)
    assert torch.equal(model.conv1.weight, build("residual").conv1.weight)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("name", ["residual", "listed", "attention"])
def test_baking_changes_no_bit(name: str, weights: dict[str, Any]) -> None:
    model, x = quantized(name, weights=weights), batches(name, seed=3)[0]
    baked = bake_weights(model)
    assert weight_quantizers(model), "do_copy leaves the model alone"
    assert not weight_quantizers(baked)
    with torch.no_grad():
        assert_exact(baked(x), model(x), name)
    hooks = [m for _, m in get_hook_storage(baked).named_hooks()]
    assert hooks
    assert all(isinstance(m, NNCFQuantizer) for m in hooks)


@pytest.mark.parametrize("name", ["listed", "residual"])
def test_baking_a_stock_model(name: str) -> None:
    """Stock quantizers know no weight; NNCF's names lead nowhere in a ModuleList, only its graph does."""
    x = batches(name)[0]
    stock = nncf.quantize(build(name), nncf.Dataset(batches(name)), subset_size=4)
    with pytest.raises(ExportFailed, match=r"stock NNCF quantizer.*example_input"):
        bake_weights(stock)
    baked = bake_weights(stock, x)
    assert 0 < len(weight_quantizers(baked)) < len(weight_quantizers(stock)), "activations keep theirs"
    with torch.no_grad():
        assert_exact(baked(x), stock(x))


def test_baking_a_float_model_only_copies() -> None:
    model = build("residual")
    assert torch.equal(bake_weights(model).conv1.weight, model.conv1.weight)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


def test_tied_weights_are_baked_once_or_refused() -> None:
    x = batches("residual")[0]
    both = quantize(Tied().eval(), nncf.Dataset([x]), config(weights={}, bias_correction=False))
    with torch.no_grad():
        assert_exact(bake_weights(both)(x), both(x))
    entry = config(weights={}, bias_correction=False, ignored_scopes=["b"])
    with pytest.raises(ExportFailed, match=r"'a\.weight' is shared by 2 layers"):
        bake_weights(quantize(Tied().eval(), nncf.Dataset([x]), entry))


def test_bias_correction_can_be_switched() -> None:
    original = build("residual")
    corrected = quantized("residual", weights={})
    left = quantized("residual", weights={}, bias_correction=False)
    assert torch.equal(left.fc.bias, original.fc.bias)
    assert not torch.equal(corrected.fc.bias, original.fc.bias)
    for name, parameter in left.named_parameters():
        if name in dict(original.named_parameters()):
            assert torch.equal(parameter, original.get_parameter(name)), name


def test_bias_correction_restores_the_mean_of_a_layer() -> None:
    """What it is for: the mean error of a layer's output with quantized weights, exact for a 1x1 convolution."""
    data = batches("twice", 6)
    expected = torch.stack(outputs_of_modules(build("twice"), ["a"], data)["a"]).mean((0, 1, 3, 4))
    error = []
    for correct in (True, False):
        entry = config(weights={"per_channel": False}, bias_correction=correct)
        entry["compression"]["scope_overrides"] = {"activations": {"{re}.*": None}}
        model = quantize(build("twice"), nncf.Dataset(data), entry)
        with torch.no_grad():
            found = torch.stack([torch.nn.functional.conv2d(x, *_layer(model)) for x in data]).mean((0, 1, 3, 4))
        error.append(float((found - expected).abs().max()))
    assert error[0] < 1e-6 < 1e-4 < error[1]


def _layer(model: nn.Module) -> tuple[Tensor, Tensor]:
    baked: Any = bake_weights(model)
    return baked.a.weight, baked.a.bias


class TwoTables(nn.Module):
    """Two embeddings side by side, which NNCF quantizes with one scale. (B, 5) int64 -> (B, 5, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds, self.out = nn.Embedding(20, 8), nn.Embedding(20, 8), nn.Linear(16, 6)
        self.kinds.weight.data.mul_(5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.cat([self.words(ids), self.kinds(ids)], -1))


@pytest.mark.parametrize("mode", ["symmetric", "asymmetric"])
def test_weights_with_one_scale_share_their_quantizer(mode: str, tmp_path: Path) -> None:
    data = [torch.randint(0, 20, (2, 5)) for _ in range(4)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        float_model = TwoTables().eval()
    stock = nncf.quantize(
        float_model,
        nncf.Dataset(data),
        subset_size=4,
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            weights_quantization_params=QuantizationParameters(num_bits=8, mode=QuantizationScheme(mode)),
            overflow_fix=OverflowFix.DISABLE,
        ),
    )
    model = quantize(float_model, nncf.Dataset(data), config(weights={"mode": mode}))
    assert _points(model) == _points(stock)
    assert len(_points(model)) == (2 if mode == "symmetric" else 1)
    with torch.no_grad():
        assert_exact(bake_weights(model)(data[0]), model(data[0]))
        loaded = load(TwoTables(), save(model, tmp_path))
        assert_exact(loaded(data[0]), model(data[0]))
        assert_exact(bake_weights(loaded)(data[0]), model(data[0]))


def _points(model: nn.Module) -> list[str]:
    """Points of the quantizer of embeddings' weights with the most of them."""
    found: dict[int, list[str]] = {}
    for name, module in get_hook_storage(model).named_hooks(remove_duplicate=False):
        if isinstance(module, BaseQuantizer) and name.startswith("pre_hooks") and "embedding" in name:
            found.setdefault(id(module), []).append(name)
    return max(found.values(), key=len)


def test_predicted_parameters_go_without_bias_correction_and_say_so() -> None:
    """It runs parts of the model, which have no features to predict from; augmentation stays."""
    predicted, data = {"mode": "dense_sparse", "qparams": {"mode": "extended"}}, nncf.Dataset(batches("residual", 12))
    with pytest.warns(DQAWarning, match=r"bias correction is left out.*bias_correction to false"):
        model = quantize(build("residual"), data, config(predicted, weights={}))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        plain = quantize(build("residual"), data, config(predicted, weights={}, bias_correction=False))
    assert not [w for w in found if "bias correction" in str(w.message)]
    x = batches("residual")[0]
    assert_exact(model(x), plain(x))
    assert torch.equal(model.fc.bias, build("residual").fc.bias)
