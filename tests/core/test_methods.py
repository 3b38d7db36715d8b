"""The method dataclasses: defaults of the contract, validation with field and value, JSON round trip."""

from __future__ import annotations

import dataclasses
import json
import pickle

import pytest
from hypothesis import given

from dqa_plugins import DQA, DenseSparse, Direct, Method, NoisyQuant, method_from_dict, method_to_dict
from dqa_plugins.errors import InvalidMethod, NotAMethod
from tests.strategies import methods

KINDS = [Direct, DQA, NoisyQuant, DenseSparse]
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_common_fields_and_defaults(kind):
    method = kind()
    common = (method.bits, method.signed, method.granularity, method.qparams, method.clip, method.channel_axis)
    assert common == (4, None, "tensor", "static", "max", None)


def test_fields_of_each_method():
    assert (DQA().extra_bits, DQA().ratio) == (None, 0.4)
    assert DenseSparse().density == 0.01
    assert (NoisyQuant().seed, NoisyQuant().amplitude) == (0, None)
    assert Direct().symmetric is True


@pytest.mark.parametrize(("bits", "extra"), [(2, 2), (3, 3), (4, 3), (8, 3)])
def test_extra_bits_default_to_three_or_the_bits(bits, extra):
    assert DQA(bits=bits).extra == extra
    assert DQA(bits=bits, extra_bits=0).extra == 0


@pytest.mark.parametrize(
    ("kind", "reduce"), [(Direct, "max"), (DQA, "max"), (NoisyQuant, "max"), (DenseSparse, "mean")]
)
def test_static_reduction_by_default(kind, reduce):
    assert kind().reduction == reduce
    assert kind(reduce="max").reduction == "max"
    assert kind(reduce="mean").reduction == "mean"


@every_kind
def test_methods_are_frozen_keyword_only_and_comparable(kind):
    method = kind(bits=5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.bits = 3
    with pytest.raises(TypeError):
        kind(5)
    assert method == kind(bits=5)
    assert hash(method) == hash(kind(bits=5))
    assert method != kind(bits=4)
    assert {method: 1}[kind(bits=5)] == 1
    assert "bits=5" in repr(method)
    assert pickle.loads(pickle.dumps(method)) == method


BAD = [
    ("bits", [1, 9, 0, -4, 4.0, "4", None, True]),
    ("signed", ["yes", 0, 1]),
    ("granularity", ["channels", None, 1]),
    ("qparams", ["predicted", None, 0]),
    ("clip", ["min", 0.0, 1.0, -0.5, 2.0, None, True, float("nan")]),
    ("channel_axis", [0, 1.0, "1", True, 99]),
    ("reduce", ["sum", 0]),
    ("scope", ["layer", None]),
]


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, vs in BAD for v in vs])
@every_kind
def test_bad_common_fields_name_the_field_and_the_value(kind, field, value):
    with pytest.raises(InvalidMethod) as caught:
        kind(**{field: value})
    text = str(caught.value)
    assert kind.__name__ in text
    assert field in text
    assert repr(value) in text
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("kind", "fields", "text"),
    [
        (DQA, {"extra_bits": 4, "bits": 3}, "extra_bits=4.*n = bits = 3"),
        (DQA, {"extra_bits": -1}, "extra_bits=-1"),
        (DQA, {"extra_bits": 1.0}, r"extra_bits=1\.0"),
        (DQA, {"ratio": 1.1}, r"ratio=1\.1"),
        (DQA, {"ratio": -0.1}, r"ratio=-0\.1"),
        (DQA, {"ratio": "40%"}, "ratio='40%'"),
        (DenseSparse, {"density": -0.01}, r"density=-0\.01"),
        (DenseSparse, {"density": 0.6}, r"density=0\.6"),
        (DenseSparse, {"density": None}, "density=None"),
        (DenseSparse, {"clip": 0.99}, r"clip=0\.99"),
        (DenseSparse, {"clip": "mse"}, "clip='mse'"),
        (DenseSparse, {"scope": "batch", "qparams": "dynamic"}, "scope='batch'"),
        (NoisyQuant, {"seed": -1}, "seed=-1"),
        (NoisyQuant, {"seed": 1.5}, r"seed=1\.5"),
        (NoisyQuant, {"amplitude": -0.5}, r"amplitude=-0\.5"),
        (NoisyQuant, {"amplitude": float("nan")}, "amplitude=nan"),
        (NoisyQuant, {"mean": float("inf")}, "mean=inf"),
        (NoisyQuant, {"objective": "loss"}, "objective='loss'"),
        (NoisyQuant, {"noise": "laplace"}, "noise='laplace'"),
        (NoisyQuant, {"full_range": False}, "full_range=False.*signed=True"),
        (NoisyQuant, {"clip_steps": 1}, "clip_steps=1"),
        (Direct, {"symmetric": None}, "symmetric=None"),
        (Direct, {"symmetric": False, "scope": "batch", "qparams": "dynamic"}, "symmetric=False"),
        (Direct, {"scope": "batch"}, "scope='batch'.*qparams='static'"),
        (Direct, {"scope": "batch", "qparams": "dynamic", "clip": 0.9}, r"scope='batch'.*clip=0\.9"),
    ],
)
def test_bad_fields_of_a_method_name_the_field_and_the_value(kind, fields, text):
    with pytest.raises(InvalidMethod, match=f"{kind.__name__}.*{text}"):
        kind(**fields)


def test_every_supported_width_is_accepted():
    for kind in KINDS:
        assert [kind(bits=n).bits for n in range(2, 9)] == list(range(2, 9))


@every_kind
def test_the_papers_settings(kind):
    """Signed, per tensor, from the tensor at hand, one scale per sample, clamped."""
    method = kind.paper(bits=3)
    assert isinstance(method, kind)
    assert (method.bits, method.granularity, method.qparams, method.scope) == (3, "tensor", "dynamic", "sample")
    if kind is not DenseSparse:
        assert method.signed is True
    assert kind.paper(bits=3, signed=False).signed is False


def test_the_paper_of_dqa_and_of_qpp():
    assert (DQA.paper().bits, DQA.paper().extra_bits, DQA.paper().ratio) == (3, 3, 0.4)
    assert DQA.paper(bits=2).extra_bits == 2, "m is at most n"
    assert DQA.paper(bits=5).extra_bits == 3
    assert DenseSparse.paper().density == 0.01


def test_the_official_noisyquant():
    """fast_quant.py: 6 bits, clip / (2^(n-1) - 1), 1000 clip steps on the output error, mean and amplitude searched."""
    method = NoisyQuant.official()
    assert (method.bits, method.signed, method.full_range) == (6, True, False)
    assert (method.clip, method.clip_steps, method.objective) == ("mse", 1000, "output")
    assert (method.mean, method.amplitude, method.noise) == (None, None, "uniform")
    assert NoisyQuant.official(bits=4, objective="activation").objective == "activation"


@every_kind
def test_replace_validates_again(kind):
    assert kind().replace(bits=6) == kind(bits=6)
    with pytest.raises(InvalidMethod):
        kind().replace(bits=16)
    with pytest.raises(InvalidMethod):
        DQA(bits=6, extra_bits=6).replace(bits=4)


@given(methods)
def test_methods_survive_json(method):
    assert method_from_dict(json.loads(json.dumps(method_to_dict(method)))) == method


def test_unknown_names_and_fields_in_a_dict():
    with pytest.raises(NotAMethod, match=r"'lsq'.*dqa"):
        method_from_dict({"method": "lsq"})
    with pytest.raises(NotAMethod, match="None"):
        method_from_dict({"bits": 4})
    with pytest.raises(InvalidMethod, match=r"'dqa'.*density.*extra_bits"):
        method_from_dict({"method": "dqa", "density": 0.1})
    with pytest.raises(InvalidMethod, match="bits=12"):
        method_from_dict({"method": "dqa", "bits": 12})
    with pytest.raises(NotAMethod):
        method_to_dict(DQA)


def test_the_base_class_is_no_method():
    with pytest.raises(NotAMethod):
        method_to_dict(Method())


@pytest.mark.parametrize("saved", [{"method": []}, {"method": None}, {"method": {}}, [], "dqa", None, 4])
def test_what_is_no_saved_method(saved):
    with pytest.raises(NotAMethod):
        method_from_dict(saved)


def test_fields_that_are_no_text_are_named():
    with pytest.raises(InvalidMethod, match="no field 3"):
        method_from_dict({"method": "dqa", 3: 4})
