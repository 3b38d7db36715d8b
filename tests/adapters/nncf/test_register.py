"""register(): plain nncf.quantize with mode="dqa" and the others."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import nncf
import pytest
import torch
from nncf.common.quantization.structs import QuantizationScheme
from nncf.quantization.advanced_parameters import (
    AdvancedQuantizationParameters,
    OverflowFix,
    QuantizationParameters,
)
from nncf.quantization.range_estimator import RangeEstimatorParametersSet
from torch import nn

from dqa_plugins import DQA, DenseSparse, Direct, NoisyQuant, iter_quantizers
from dqa_plugins.adapters.nncf import quantize, register, unregister
from dqa_plugins.errors import FrameworkMismatch, InvalidMethod, MissingDependency, UnsupportedCombination
from tests.adapters.nncf.models import batches, build, config, site_list
from tests.compare import same_bits

POST_TRAINING = "nncf.quantization.algorithms.post_training.algorithm"


def plain(name: str = "residual", advanced: dict[str, Any] | None = None, **parameters: Any) -> nn.Module:
    """nncf.quantize, as a user of NNCF calls it."""
    activations = QuantizationParameters(**parameters)
    return nncf.quantize(
        build(name),
        nncf.Dataset(batches(name)),
        subset_size=4,
        advanced_parameters=AdvancedQuantizationParameters(
            activations_quantization_params=activations, **(advanced or {})
        ),
    )


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", ["residual", "concat", "tokens", "listed"])
def test_the_same_as_the_config_entry(name: str) -> None:
    """Same sites, same numbers, bias correction included."""
    ours = quantize(build(name), nncf.Dataset(batches(name)), config({"mode": "dqa", "bits": 3}, weights={}))
    theirs = plain(name, num_bits=3, mode="dqa")
    assert site_list(theirs) == site_list(ours)
    assert all(q.method == DQA(bits=3) for _, q in iter_quantizers(theirs))
    for key, tensor in ours.state_dict().items():
        assert same_bits(tensor, theirs.state_dict()[key]), key


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("parameters", "method"),
    [
        ({"mode": "direct", "num_bits": 8}, Direct(bits=8)),
        ({"mode": "dqa", "num_bits": 4, "per_channel": True}, DQA(bits=4, granularity="channel")),
        ({"mode": "noisyquant", "per_channel": False}, NoisyQuant()),
        ({"mode": "dense_sparse", "signedness_to_force": True}, DenseSparse(signed=True)),
        ({"mode": DQA(bits=5, ratio=0.1)}, DQA(bits=5, ratio=0.1)),
    ],
)
def test_parameters_become_the_method(parameters: dict[str, Any], method: Any) -> None:
    model = plain(**parameters, advanced={"disable_bias_correction": True})
    assert {q.method for _, q in iter_quantizers(model)} == {method}


@pytest.mark.usefixtures("registered")
def test_the_statistics_are_maxima() -> None:
    data = nncf.Dataset([torch.full((1, 3, 8, 8), float(v)) for v in (1, 7, 100)])
    parameters = AdvancedQuantizationParameters(
        activations_quantization_params=QuantizationParameters(num_bits=4, mode="direct")
    )
    model = nncf.quantize(build("residual"), data, subset_size=2, advanced_parameters=parameters)
    assert float(dict(iter_quantizers(model))["input.0"].scale) == 7 / 16, "subset_size counts dataset items"


@pytest.mark.usefixtures("registered")
def test_other_parameters_of_nncf_still_count() -> None:
    weights = QuantizationParameters(mode=QuantizationScheme.ASYMMETRIC)
    model = nncf.quantize(
        build("residual"),
        nncf.Dataset(batches("residual")),
        subset_size=4,
        ignored_scope=nncf.IgnoredScope(patterns=["fc/.*"]),
        advanced_parameters=AdvancedQuantizationParameters(
            quantize_outputs=True,
            overflow_fix=OverflowFix.DISABLE,
            activations_quantization_params=QuantizationParameters(mode="dqa"),
            weights_quantization_params=weights,
        ),
    )
    assert site_list(model) == ["input.0", "relu1", "bn2", "relu2"], "an ignored operation is float, its output too"
    kinds = {type(m).__name__ for _, m in nncf.torch.function_hook.get_hook_storage(model).named_hooks()}
    assert kinds == {"NNCFQuantizer", "AsymmetricWeight"}


@pytest.mark.usefixtures("registered")
def test_transformer_with_smooth_quant() -> None:
    """The steps before ours stay; the tensor that SmoothQuant scales keeps the name of its site."""
    model = nncf.quantize(
        build("tokens"),
        nncf.Dataset(batches("tokens")),
        subset_size=4,
        model_type=nncf.ModelType.TRANSFORMER,
        advanced_parameters=AdvancedQuantizationParameters(
            activations_quantization_params=QuantizationParameters(mode="dqa")
        ),
    )
    hooks = {type(m).__name__ for _, m in nncf.torch.function_hook.get_hook_storage(model).named_hooks()}
    assert "SQMultiply" in hooks
    assert set(site_list(model)) <= {"input.0", "norm", "fc1", "gelu.0", "fc2", "add.0", "mean.0"}
    assert model(batches("tokens")[0]).isfinite().all()


@pytest.mark.usefixtures("registered")
def test_stock_calls_are_untouched() -> None:
    model = nncf.quantize(build("residual"), nncf.Dataset(batches("residual")), subset_size=4)
    assert site_list(model) == []
    kinds = {type(m).__name__ for _, m in nncf.torch.function_hook.get_hook_storage(model).named_hooks()}
    assert kinds == {"SymmetricQuantizer"}


def test_opt_in_idempotent_and_undone() -> None:
    module = importlib.import_module(POST_TRAINING)
    stock = module.create_ptq_pipeline
    with pytest.raises(ValueError, match="incompatible"):
        plain(num_bits=4, mode="dqa")
    register()
    wrapped = module.create_ptq_pipeline
    register()
    assert module.create_ptq_pipeline is wrapped is not stock
    unregister()
    unregister()
    assert module.create_ptq_pipeline is stock


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("parameters", "advanced", "error", "words"),
    [
        ({"mode": "dqa", "num_bits": 16}, {}, InvalidMethod, "bits=16"),
        ({"mode": "dqa", "narrow_range": True}, {}, UnsupportedCombination, "narrow_range"),
        ({"mode": DQA(), "num_bits": 4}, {}, InvalidMethod, "bits is given twice"),
        ({"mode": NoisyQuant(objective="output")}, {}, UnsupportedCombination, "objective='output'"),
        (
            {"mode": "dqa"},
            {"activations_range_estimator_params": RangeEstimatorParametersSet.MEDIAN_MINMAX},
            UnsupportedCombination,
            "activations_range_estimator_params",
        ),
    ],
)
def test_what_cannot_be_is_said(parameters: Any, advanced: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        plain(**parameters, advanced=advanced)


def test_another_version_of_nncf_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nncf, "__version__", "3.9.1")
    with pytest.raises(FrameworkMismatch, match=r"nncf 3\.4\.0; found 3\.9\.1.*pip install"):
        register()


def test_a_changed_internal_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(POST_TRAINING)
    monkeypatch.setattr(module, "create_ptq_pipeline", lambda preset: None)
    with pytest.raises(FrameworkMismatch, match=r"create_ptq_pipeline takes \('preset',\)"):
        register()
    monkeypatch.delattr(module, "create_ptq_pipeline")
    with pytest.raises(FrameworkMismatch, match="create_ptq_pipeline is gone"):
        register()


def test_without_nncf_the_extra_is_named() -> None:
    code = "import sys; sys.modules['nncf'] = None\nimport dqa_plugins.adapters.nncf"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"{MissingDependency.__name__}: the NNCF adapter needs 'nncf'" in result.stderr
    assert "pip install -e '.[nncf]'" in result.stderr


def test_importing_patches_nothing() -> None:
    code = (
        f"import importlib; m = importlib.import_module('{POST_TRAINING}'); before = m.create_ptq_pipeline\n"
        "from nncf.torch.graph.operator_metatypes import QUANTIZE_NODE_TYPES as types; names = list(types)\n"
        "import dqa_plugins.adapters.nncf\n"
        "assert m.create_ptq_pipeline is before and types == names"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
