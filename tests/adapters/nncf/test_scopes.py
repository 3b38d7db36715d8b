"""ignored_scopes, target_scopes, skip and scope_overrides: what they leave float, and what they name when wrong."""

from __future__ import annotations

from typing import Any

import nncf
import pytest
from nncf.torch.function_hook import get_hook_storage
from torch import nn

from dqa_plugins import DQA, DenseSparse, Direct, NoisyQuant, iter_quantizers
from dqa_plugins.adapters.nncf import InvalidConfig, NNCFQuantizer, quantize
from tests.adapters.nncf.models import batches, build, config, quantized, site_list

ALL = ["input.0", "relu1", "bn2", "relu2", "mean.0"]


def quantized_weights(model: nn.Module) -> list[str]:
    """Names of the operations whose weight NNCF quantizes."""
    hooks = get_hook_storage(model).named_hooks()
    return sorted(name.split(".")[1].split("/")[0] for name, m in hooks if not isinstance(m, NNCFQuantizer))


@pytest.mark.parametrize(
    ("entry", "sites", "weights"),
    [
        ({}, ALL, ["conv1", "conv2", "fc"]),
        ({"ignored_scopes": ["fc/linear/0"]}, ALL[:4], ["conv1", "conv2"]),
        ({"ignored_scopes": ["fc"]}, ALL[:4], ["conv1", "conv2"]),
        ({"ignored_scopes": ["{re}.*fc.*"]}, ALL[:4], ["conv1", "conv2"]),
        ({"ignored_scopes": ["{re}conv\\d", "fc"]}, ["relu1", "bn2", "relu2"], []),
        ({"target_scopes": ["conv2"]}, ["relu1"], ["conv2"]),
        ({"target_scopes": ["conv1", "{re}fc"]}, ["input.0", "mean.0"], ["conv1", "fc"]),
        ({"skip": ["first"]}, ALL[1:], ["conv2", "fc"]),
        ({"skip": ["last"]}, ALL[:4], ["conv1", "conv2"]),
        ({"skip": ["first", "last", "conv2"]}, ["relu1", "bn2", "relu2"], []),
        ({"scope_overrides": {"activations": {"bn2": None}}}, ["input.0", "relu1", "relu2", "mean.0"], None),
    ],
)
def test_scopes(entry: dict[str, Any], sites: list[str], weights: list[str] | None) -> None:
    model = quantized("residual", weights={"bits": 8}, bias_correction=False, **entry)
    assert site_list(model) == sites
    assert quantized_weights(model) == (weights if weights is not None else ["conv1", "conv2", "fc"])


def test_a_module_in_a_list_is_found_by_its_path() -> None:
    """NNCF calls it 'conv/conv2d/1'; its path is what the user sees in the model."""
    assert site_list(quantized("listed", ignored_scopes=["down.1"])) == ["input.0", "down.1.relu"]
    assert site_list(quantized("listed", ignored_scopes=["{re}down\\.[12]"])) == ["input.0"]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"ignored_scopes": ["fc/linear/1"]}, ["ignored_scopes", "'fc/linear/1'", "fc/linear/0"]),
        ({"ignored_scopes": ["fc", "{re}nothing"]}, ["ignored_scopes", "'{re}nothing'"]),
        ({"target_scopes": ["con"]}, ["target_scopes", "'con'", "conv"]),
        ({"skip": ["layer9"]}, ["skip", "'layer9'"]),
        ({"ignored_scopes": ["{re}("]}, ["'{re}('", "no regular expression"]),
        ({"scope_overrides": {"activations": {"relu3": None}}}, ["scope_overrides.activations", "'relu3'", "relu2"]),
        (
            {"scope_overrides": {"activations": {"{re}relu": {"bits": 8}, "{re}.*1": {"bits": 6}}}},
            ["'{re}relu'", "'{re}.*1'", "'relu1'", "disagree"],
        ),
    ],
)
def test_a_scope_that_matches_nothing_is_named(entry: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InvalidConfig) as raised:
        quantized("residual", **entry)
    for word in words:
        assert word in str(raised.value)


def test_one_model_mixes_methods_bits_and_float() -> None:
    model = quantized(
        "residual",
        {"mode": "dqa", "bits": 3, "ratio": 0.5},
        scope_overrides={
            "activations": {
                "input.0": {"mode": "direct", "bits": 8},
                "{re}relu": {"mode": "dense_sparse", "bits": 5, "qparams": "dynamic"},
                "relu2": {"mode": "noisyquant", "bits": 6, "granularity": "channel"},
                "mean.0": None,
            }
        },
    )
    assert {n: q.method for n, q in iter_quantizers(model)} == {
        "input.0": Direct(bits=8),
        "relu1": DenseSparse(bits=5, qparams="dynamic"),
        "bn2": DQA(bits=3, ratio=0.5),
        "relu2": NoisyQuant(bits=6, granularity="channel"),
    }
    assert model(batches("residual")[0]).isfinite().all()


def test_a_method_of_its_own_leaves_a_shared_scale() -> None:
    model = quantized(
        "concat", {"mode": "direct"}, scope_overrides={"activations": {"right": {"mode": "direct", "bits": 8}}}
    )
    assert {n: q.method.bits for n, q in iter_quantizers(model)} == {"input.0": 4, "relu.0": 4, "right": 8}


def test_everything_ignored_is_the_float_model(caplog: pytest.LogCaptureFixture) -> None:
    model = quantize(build("residual"), nncf.Dataset(batches("residual")), config(ignored_scopes=["{re}.*"]))
    x = batches("residual")[0]
    assert site_list(model) == []
    assert model(x).equal(build("residual")(x))
    assert "no activation to quantize" in caplog.text
