"""The config entry: what it means, and that nothing in it is ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dqa_plugins import DQA, DenseSparse, Direct, DQAError, NoisyQuant
from dqa_plugins.adapters.nncf import InvalidConfig
from dqa_plugins.adapters.nncf.config import Entry, Weights, parse
from dqa_plugins.errors import InvalidArgument, InvalidMethod, UnsupportedCombination
from tests.adapters.nncf.models import batches, build, config


def test_the_entry_of_the_documentation() -> None:
    entry = parse(
        {
            "compression": {
                "algorithm": "quantization",
                "activations": {"mode": "dqa", "bits": 4, "extra_bits": 3, "ratio": 0.4},
                "weights": {"bits": 8},
                "ignored_scopes": ["{re}.*fc.*"],
                "initializer": {"range": {"num_init_samples": 256}},
            }
        }
    )
    assert entry == Entry(
        method=DQA(bits=4, extra_bits=3, ratio=0.4),
        weights=Weights("symmetric", True),
        ignored=("{re}.*fc.*",),
        num_samples=256,
        bias_correction=True,
    )


@pytest.mark.parametrize(
    ("activations", "method"),
    [
        ({"mode": "direct", "bits": 8, "symmetric": False}, Direct(bits=8, symmetric=False)),
        ({"mode": "dqa"}, DQA()),
        ({"mode": "noisyquant", "seed": 3, "amplitude": 0.5}, NoisyQuant(seed=3, amplitude=0.5)),
        ({"mode": "dense_sparse", "density": 0.02, "qparams": "dynamic"}, DenseSparse(density=0.02, qparams="dynamic")),
    ],
)
def test_mode_and_fields_make_the_method(activations: dict[str, Any], method: Any) -> None:
    entry = parse(config(activations))
    assert entry.method == method
    assert entry.weights is None
    assert not entry.bias_correction
    assert entry.num_samples is None


def test_a_method_is_an_entry_of_its_own() -> None:
    assert parse(DenseSparse(bits=3)) == Entry(DenseSparse(bits=3))
    with pytest.raises(UnsupportedCombination, match="objective='output'"):
        parse(NoisyQuant(objective="output"))


def test_json_file(tmp_path: Path) -> None:
    path = tmp_path / "entry.json"
    path.write_text(json.dumps(config({"mode": "direct", "bits": 6}, skip=["first"])))
    assert parse(path) == parse(str(path)) == Entry(method=Direct(bits=6), skip=("first",))


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "no JSON"), ('{"compression": {}, "compression": {}}', "'compression' appears twice")],
)
def test_bad_json_file(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "entry.json"
    path.write_text(text)
    with pytest.raises(InvalidConfig, match=words):
        parse(path)


def test_missing_file_and_wrong_type(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        parse(tmp_path / "none.json")
    with pytest.raises(InvalidConfig, match="the path of a JSON file, or a method; got a int"):
        parse(3)


CASES: list[tuple[Any, list[str]]] = [
    ({}, ["'compression' is missing"]),
    ({"compression": [], "x": 1}, ["'x'", "allowed: compression"]),
    ({"compression": [{}]}, ["compression: an object"]),
    ({"compression": {"activations": {"mode": "dqa"}}}, ["'algorithm' is missing"]),
    ({"compression": {"algorithm": "quantization"}}, ["'activations' is missing"]),
    ({"compression": {"algorithm": "pruning", "activations": {"mode": "dqa"}}}, ["'pruning'", "'quantization'"]),
    ({**config(), "input_info": {}}, ["'input_info'", "the dataset"]),
    (config(activation={}), ["'activation'", "allowed: algorithm, activations"]),
    (config(preset="mixed"), ["'preset'", "weights: {mode"]),
    (config({"bits": 4}), ["'mode' is missing", "'dense_sparse'"]),
    (config({"mode": "dqq"}), ["'dqq'", "'direct', 'dqa'"]),
    (config({"mode": "symmetric"}), ["'symmetric'", "'mode': 'direct', 'symmetric': true"]),
    (config({"mode": "asymmetric"}), ["'symmetric': false"]),
    (config({"mode": "dqa", "bitz": 4}), ["'bitz'", "allowed: mode, bits"]),
    (config({"mode": "dqa", "per_channel": True}), ["'per_channel'", "granularity: 'channel'"]),
    (config({"mode": "direct", "extra_bits": 3}), ["'extra_bits' contradicts mode 'direct'", "field of dqa"]),
    (config({"mode": "dqa", "density": 0.1}), ["'density' contradicts mode 'dqa'", "dense_sparse"]),
    (config("dqa"), ["activations: an object", "'dqa'"]),
    (config(weights={"bits": 4}), ["weights.bits=4", "FX adapter"]),
    (config(weights={"bits": 8, "mode": "sym"}), ["weights.mode='sym'", "'asymmetric'"]),
    (config(weights={"per_channel": 1}), ["weights.per_channel=1"]),
    (config(weights={"scheme": "x"}), ["'scheme'", "allowed: bits, mode, per_channel"]),
    (config(ignored_scopes="fc"), ["ignored_scopes='fc'", "a list"]),
    (config(skip=[1]), ["skip=[1]"]),
    (config(target_scopes=["fc"], ignored_scopes=["fc"]), ["'fc'", "target_scopes", "choose one"]),
    (config(target_scopes=["fc"], skip=["fc"]), ["'fc'", "choose one"]),
    (config(initializer={"num_init_samples": 3}), ["'num_init_samples'", "initializer: {range"]),
    (config(initializer={"range": {"num_init_samples": 0}}), ["num_init_samples=0", "at least 1"]),
    (config(initializer={"range": {"num_init_samples": True}}), ["num_init_samples=True"]),
    (config(initializer={"range": {"type": "mean_min_max"}}), ["'type'", "allowed: num_init_samples"]),
    (config(bias_correction=True), ["bias_correction=true contradicts absent weights"]),
    (config(bias_correction="yes", weights={}), ["bias_correction='yes'"]),
    (config(scope_overrides={"weights": {}}), ["'weights'", "allowed: activations"]),
    (config(scope_overrides={"activations": ["a"]}), ["scope_overrides.activations"]),
    (config(scope_overrides={"activations": {"a": {"ratios": 1}}}), ["activations.a", "'ratios'"]),
]


@pytest.mark.parametrize(("source", "words"), CASES, ids=[words[0] for _, words in CASES])
def test_a_wrong_key_is_named(source: Any, words: list[str]) -> None:
    with pytest.raises(InvalidConfig) as raised:
        parse(source)
    assert isinstance(raised.value, ValueError)
    assert isinstance(raised.value, DQAError)
    for word in words:
        assert word in str(raised.value)


def test_a_wrong_value_of_a_field_is_the_methods_error() -> None:
    with pytest.raises(InvalidMethod, match=r"compression\.activations: DQA\(bits=99\)"):
        parse(config({"mode": "dqa", "bits": 99}))
    with pytest.raises(InvalidMethod, match=r"activations\.fc.*extra_bits"):
        parse(config(scope_overrides={"activations": {"fc": {"bits": 2, "extra_bits": 5}}}))


def test_objective_output_is_refused() -> None:
    with pytest.raises(UnsupportedCombination, match=r"objective='output'.*FX"):
        parse(config({"mode": "noisyquant", "objective": "output"}))
    with pytest.raises(UnsupportedCombination, match=r"activations\.a.*objective='output'"):
        parse(config(scope_overrides={"activations": {"a": {"mode": "noisyquant", "objective": "output"}}}))


def test_an_override_of_the_same_mode_keeps_the_other_fields() -> None:
    entry = parse(
        config(
            {"mode": "dqa", "bits": 4, "ratio": 0.2},
            scope_overrides={"activations": {"a": {"bits": 8}, "b": {"mode": "direct", "bits": 6}, "c": None}},
        )
    )
    assert entry.overrides == (("a", DQA(bits=8, ratio=0.2)), ("b", Direct(bits=6)), ("c", None))


def test_bias_correction_follows_the_weights() -> None:
    assert parse(config(weights={})).bias_correction
    assert not parse(config(weights={}, bias_correction=False)).bias_correction
    assert parse(config(weights={"mode": "asymmetric", "per_channel": False})).weights == Weights("asymmetric", False)


@pytest.mark.parametrize("bits", [4, 16, True, "8"])
def test_quantize_model_takes_weights_of_eight_bits(bits: object) -> None:
    from dqa_plugins.adapters.nncf import quantize_model

    with pytest.raises(InvalidArgument, match="8-bit weights"):
        quantize_model(build("residual"), DQA(), batches("residual"), weight_bits=bits)  # type: ignore[arg-type]
