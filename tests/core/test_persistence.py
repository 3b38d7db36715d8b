"""state_dict, torch.save(weights_only), safetensors, and another process: nothing is lost, not even a bit."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file

from dqa_plugins import DQA, QPP, ActivationQuantizer, DenseSparse, Direct, DQAWarning, NoisyQuant, method_to_dict
from dqa_plugins.errors import DQAError, StateMismatch
from dqa_plugins.state import to_bytes
from tests.compare import calibrated, same_bits
from tests.strategies import cases, methods

METHODS = [
    Direct(),
    Direct(symmetric=False, clip=0.99),
    DQA(granularity="channel"),
    NoisyQuant(),
    DenseSparse(),
    DQA(qparams="dynamic", clip="mse"),
    NoisyQuant(qparams="dynamic"),
    DenseSparse(qparams="dynamic"),
]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{type(m).__name__}-{m.qparams}")
every_state = pytest.mark.parametrize("state", ["observe", "frozen", "qat"])


def data(seed: int = 0) -> torch.Tensor:
    return torch.randn(6, 5, 4, 4, generator=torch.Generator().manual_seed(seed)) * (1 + seed)


def in_state(method, state: str) -> ActivationQuantizer:
    if state == "qat":
        q = ActivationQuantizer(method, name="site").start_qat().train()
        q(data())
        q(data(1))
        return q.eval()
    return calibrated(method, [data(), data(1)], freeze=state == "frozen")


def assert_equal_now_and_later(other: ActivationQuantizer, q: ActivationQuantizer) -> None:
    """Same state, same output, and the same future."""
    assert other.state == q.state
    other.train(q.training)  # the host's flag, no part of the state
    for name, value in q.state_dict().items():
        assert same_bits(other.state_dict()[name], value), name
    x = data(2)
    assert same_bits(other(x), q(x))
    for each in (other, q):
        each.train()
        each(data(3))
        each.freeze()
    assert same_bits(other(x), q(x))


@every_state
@every_method
def test_a_state_dict_carries_everything(method, state):
    q = in_state(method, state)
    other = ActivationQuantizer(method, name="site")
    other.load_state_dict(q.state_dict())
    assert other.num_channels == q.num_channels
    assert other.signed == q.signed
    assert other.channel_axis == q.channel_axis
    assert_equal_now_and_later(other, q)


@pytest.mark.filterwarnings("ignore::dqa_plugins.errors.DQAWarning")
@given(cases(), methods)
@settings(max_examples=60)
def test_any_calibrated_quantizer_survives_a_state_dict(case, method):
    for freeze in (False, True):
        q = calibrated(method, case.batches, freeze=freeze, producer_axis=case.channel_axis)
        other = ActivationQuantizer(method, name="site")  # the channel axis comes with the state
        other.load_state_dict(q.state_dict())
        q.freeze()
        other.freeze()
        assert same_bits(other(case.x), q(case.x))


@every_state
@every_method
def test_torch_save_without_pickle(method, state, tmp_path):
    """Loads with weights_only=True: tensors only."""
    q = in_state(method, state)
    torch.save(q.state_dict(), tmp_path / "q.pt")
    other = ActivationQuantizer(method, name="site")
    other.load_state_dict(torch.load(tmp_path / "q.pt", weights_only=True))
    assert_equal_now_and_later(other, q)


@every_state
@every_method
def test_safetensors(method, state, tmp_path):
    """Also of a channels_last batch of one, whose views are not contiguous."""
    q = in_state(method, state)
    if state == "observe":
        q(data()[:1].to(memory_format=torch.channels_last))
    save_file(q.state_dict(), tmp_path / "q.safetensors")
    other = ActivationQuantizer(method, name="site")
    other.load_state_dict(load_file(tmp_path / "q.safetensors"))
    assert_equal_now_and_later(other, q)


def test_chosen_extra_bits_survive_in_every_state():
    """A ranking set before freezing is not replaced by the default one after loading."""
    chosen = torch.tensor([0, -2, 4, 0, 1])
    q = in_state(DQA(), "observe")
    q.set_extra_bits(chosen)
    other = ActivationQuantizer(DQA(), name="site")
    other.load_state_dict(q.state_dict())
    assert torch.equal(other.freeze().extra_bits, chosen)
    assert same_bits(other(data()), q.freeze()(data()))


CHILD = """
import json, sys, torch
from safetensors.torch import load_file
from dqa_plugins import ActivationQuantizer, method_from_dict

folder, methods = sys.argv[1], json.loads(sys.argv[2])
for i, fields in enumerate(methods):
    for state in ("observe", "frozen", "qat"):
        stem = f"{folder}/{i}-{state}"
        by_pickle_free_torch = ActivationQuantizer(method_from_dict(fields), name="site")
        by_pickle_free_torch.load_state_dict(torch.load(stem + ".pt", weights_only=True))
        by_safetensors = ActivationQuantizer(method_from_dict(fields), name="site")
        by_safetensors.load_state_dict(load_file(stem + ".safetensors"))
        tensors = load_file(stem + ".data")
        for q in (by_pickle_free_torch, by_safetensors):
            q.freeze()
            same = q(tensors["x"]).view(torch.int32) == tensors["y"].view(torch.int32)
            assert same.all(), f"{stem}: {int((~same).sum())} values differ"
print("exact")
"""


def test_another_process_computes_the_same_bits(tmp_path):
    """All methods, all states: saved here, loaded and frozen in a fresh interpreter."""
    for i, method in enumerate(METHODS):
        for state in ("observe", "frozen", "qat"):
            q = in_state(method, state)
            torch.save(q.state_dict(), tmp_path / f"{i}-{state}.pt")
            save_file(q.state_dict(), tmp_path / f"{i}-{state}.safetensors")
            x = data(5)
            save_file({"x": x, "y": q.freeze()(x)}, tmp_path / f"{i}-{state}.data")
    arguments = [str(tmp_path), json.dumps([method_to_dict(m) for m in METHODS])]
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "exact", done.stderr


# ---------------------------------------------------------------- what does not fit


def test_the_state_of_another_method_is_refused_and_changes_nothing():
    """Named, both of them; nothing half-written: the quantizer still computes what it did."""
    q = calibrated(Direct(bits=4), [data()], name="layer1.relu")
    before = {name: value.clone() for name, value in q.state_dict().items()}
    expected = q(data(1))
    with pytest.raises(StateMismatch, match=r"'layer1\.relu'.*bits=3.*bits=4") as caught:
        q.load_state_dict(calibrated(Direct(bits=3), [data(3)]).state_dict())
    assert isinstance(caught.value, ValueError)
    for name, value in q.state_dict().items():
        assert same_bits(value, before[name]), f"{name} was overwritten"
    assert same_bits(q(data(1)), expected)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_a_damaged_extra_state_is_a_typed_error(damage):
    q = calibrated(Direct(), [data()], name="layer1.relu")
    state = q.state_dict()
    extra = state["_extra_state"]
    state["_extra_state"] = {"truncated": extra[:-7], "garbage": extra.flip(0), "empty": extra[:0]}[damage]
    with pytest.raises(DQAError, match=r"layer1\.relu"):
        ActivationQuantizer(Direct(), name="layer1.relu").load_state_dict(state)


def test_quantizers_inside_a_model():
    """Prefixes, several quantizers, strict loading."""

    def build() -> torch.nn.Module:
        return torch.nn.Sequential(
            ActivationQuantizer(DQA(), name="a"), torch.nn.ReLU(), ActivationQuantizer(DenseSparse(), name="b")
        )

    model, other = build(), build()
    model(data())
    for q in (model[0], model[2]):
        q.freeze()
    missing = other.load_state_dict(model.state_dict(), strict=True)
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    assert same_bits(other(data(1)), model(data(1)))


@pytest.mark.parametrize(
    ("key", "value"),
    [("state", "foo"), ("state", None), ("axis", "1"), ("channels", 2.0), ("signed", 1), ("index", True)],
)
def test_an_extra_state_that_no_quantizer_writes_is_refused(key, value):
    """It names layer, key and value; the quantizer still computes what it did."""
    q = calibrated(Direct(), [data()], name="layer1.relu")
    expected, state = q(data(1)), q.state_dict()
    fields = json.loads(bytes(state["_extra_state"].numpy()).decode())
    state["_extra_state"] = to_bytes({**fields, key: value})
    with pytest.raises(StateMismatch, match=rf"'layer1\.relu'.*{key}={re.escape(repr(value))}"):
        q.load_state_dict(state)
    assert same_bits(q(data(1)), expected)


def reshaped(value: torch.Tensor) -> torch.Tensor:
    return torch.cat([value.flatten(), value.flatten()])[None]


EDITS = {
    "scale of another shape": ("scale", reshaped),
    "scale of complex numbers": ("scale", lambda value: value.to(torch.complex64)),
    "sparse scale": ("scale", lambda value: value.reshape(1).to_sparse()),
    "vector of other channels": ("extra_bits", lambda value: torch.cat([value, value])),
    "no vector": ("extra_bits", lambda value: value[:0]),
    "no scale": ("scale", lambda value: torch.empty(0)),
    "kept values of another number": ("calibration.kept_sample", lambda value: value[:-1]),
    "counts of nobody": ("calibration.counts", lambda value: value + 1),
    "maximum of NaN": ("calibration.maximum", lambda value: value * float("nan")),
}


@pytest.mark.parametrize("edit", EDITS)
def test_buffers_that_no_calibration_gives_are_refused_before_any_is_loaded(edit):
    """Those of the record inside as well; the quantizer stays as it was."""
    key, change = EDITS[edit]
    frozen = "calibration" not in key
    batch = torch.randn(4, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    state = calibrated(DQA(bits=4), [batch], freeze=frozen, name="layer1.relu").state_dict()
    state[key] = change(state[key])
    other = calibrated(DQA(bits=4), [batch * 2], freeze=frozen, name="layer1.relu")
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(StateMismatch, match=r"'layer1\.relu'"):
        other.load_state_dict(state)
    assert all(same_bits(value, before[name]) for name, value in other.state_dict().items())


def test_the_extra_state_says_its_version():
    """States of earlier releases have none and load; those of later ones are refused."""
    q = calibrated(DQA(bits=4), [torch.randn(4, 5, 3, 3)])
    fields = json.loads(bytes(q.get_extra_state().numpy()))
    assert fields["version"] == 1
    for version, good in ((None, True), (2, False), (True, False)):
        changed = {**fields, "version": version}
        if version is None:
            del changed["version"]
        state = q.state_dict() | {"_extra_state": to_bytes(changed)}
        other = ActivationQuantizer(DQA(bits=4), name="layer1.relu")
        if good:
            other.load_state_dict(state)
        else:
            with pytest.raises(StateMismatch, match=f"version {version}"):
                other.load_state_dict(state)


@pytest.mark.parametrize(
    ("field", "value"),
    [("history", "abc"), ("history", [1]), ("groups", "1"), ("groups", -1), ("signed", 1), ("site", 3)],
)
def test_a_predictor_described_in_other_words_is_refused(field, value):
    q = calibrated(DenseSparse(qparams=QPP()), [torch.rand(4, 5, 3, 3)], freeze=False, name="layer1.relu")
    fields = json.loads(bytes(q.get_extra_state().numpy()))
    fields["predictor"][field] = value
    with pytest.raises(StateMismatch, match=rf"'layer1\.relu'.*predictor.*{field}"):
        q.load_state_dict(q.state_dict() | {"_extra_state": to_bytes(fields)})


@pytest.mark.parametrize("edit", ["predictor.low", "predictor.bias", "predictor.centres"])
def test_a_regression_with_parts_missing_is_refused(edit):
    q = ActivationQuantizer(DenseSparse(qparams=QPP()), name="layer1.relu")
    q(torch.rand(4, 5, 3, 3))
    with pytest.warns(DQAWarning, match="frozen before"):
        q.freeze()
    state, other = q.state_dict(), ActivationQuantizer(q.method, name="layer1.relu")
    other.load_state_dict(state)
    state[edit] = state[edit][:0] if state[edit].numel() else state[edit][None]
    with pytest.raises(StateMismatch, match=r"'layer1\.relu'.*" + edit.removeprefix("predictor.")):
        other.load_state_dict(state)
