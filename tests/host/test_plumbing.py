"""Hooks, skip, recording and calibration items: what rooms share besides the judge."""

from __future__ import annotations

import types
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import HistogramObserver, MovingAverageMinMaxObserver, PerChannelMinMaxObserver
from torch.fx import symbolic_trace

from dqa_plugins import DQA
from dqa_plugins.errors import DQAWarning, FrameworkMismatch, InvalidArgument
from dqa_plugins.graph.record import record_shapes, untouched
from dqa_plugins.host import hooks
from dqa_plugins.host.hooks import Hook, Host
from dqa_plugins.host.quantize import calibration_calls, split_methods
from dqa_plugins.host.skip import check_skip, resolve_skip, within

HOST = Host("framework", "1.4.2", tested="1.4.0", room="Some", otherwise="use another")


def module(function: Any = None) -> types.ModuleType:
    """A host module `framework.inner` with one function."""
    found = types.ModuleType("framework.inner")
    found.prepare = function or (lambda model, config: model)  # type: ignore[attr-defined]
    return found


def test_a_hook_wraps_once_and_keeps_the_original() -> None:
    host = module()
    original = host.prepare
    hook = Hook(host, "prepare", ("model", "config"), lambda f: lambda *a: ("wrapped", f(*a)))
    hooks.install([hook], HOST)
    hooks.install([hook], HOST)
    assert host.prepare(1, 2) == ("wrapped", 1)
    assert host.prepare.__wrapped__ is original


def test_nothing_is_wrapped_if_one_hook_is_gone() -> None:
    host = module()
    original = host.prepare
    wanted = [Hook(host, name, (), lambda f: print) for name in ("prepare", "convert")]
    with pytest.raises(FrameworkMismatch, match=r"framework\.inner\.convert is gone in framework 1\.4\.2"):
        hooks.install(wanted, HOST)
    assert host.prepare is original


def test_other_parameters_are_refused() -> None:
    hook = Hook(module(lambda graph: graph), "prepare", ("model",), lambda f: f)
    with pytest.raises(FrameworkMismatch, match=r"takes \('graph',\)"):
        hooks.install([hook], HOST)


@pytest.mark.parametrize("version", ["1.4.0", "1.4.9+cpu"])
def test_the_tested_minor_version_is_silent(version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hooks.check_version(Host("framework", version, "1.4.0", "Some"))


@pytest.mark.parametrize("version", ["1.5.0", "2.4.0"])
def test_an_unknown_minor_version_gives_one_sentence(version: str) -> None:
    host = Host("framework", version, "1.4.0", "Some")
    with pytest.warns(DQAWarning, match=rf"framework 1\.4\.0, found {version}") as found:
        hooks.install([Hook(module(), "prepare", (), lambda f: f)], host)
    assert len(found) == 1
    with pytest.raises(FrameworkMismatch, match=r"pip install 'framework==1\.4\.\*'"):
        hooks.check_version(host, strict=True)


def test_skip_by_position_and_name() -> None:
    layers, paths = ["stem", "blocks.0.conv", "head"], ["", "stem", "blocks.0.conv", "blocks.0.relu", "head"]
    assert resolve_skip(("first", "last", "blocks.0"), layers, paths) == ["stem", "head", "blocks.0"]
    assert resolve_skip(("ends",), ["a", "b", "c", "d"], paths) == ["a", "d"]
    assert resolve_skip(("ends",), ["a", "b", "c"], paths) == [], "too little would be left"
    assert resolve_skip(("first",), [], paths) == []
    assert within("blocks.0.conv", ["blocks.0"])
    assert not within("blocks.01", ["blocks.0"])
    with pytest.raises(InvalidArgument, match=r"'blocks\.7'"):
        resolve_skip(("blocks.7",), layers, paths)
    with pytest.raises(InvalidArgument, match="tuple"):
        check_skip("first")


class Everything(nn.Module):
    """A batch norm, a dropout, torch.ao's observers, a buffer that counts, a write into the input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.observers = nn.Sequential(
            MovingAverageMinMaxObserver(), HistogramObserver(), PerChannelMinMaxObserver(ch_axis=1)
        )
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        x = self.observers(self.drop(self.norm(x)))
        return x.relu_() + torch.rand(4)


def test_a_run_leaves_no_trace() -> None:
    model = Everything().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    with untouched(model), torch.no_grad():
        assert not model.training
        model(torch.randn(3, 4))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert all(m.training for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    model.calls.add_(1)
    assert model.state_dict()["calls"] == 1, "the buffer is the one it was"


def test_shapes_are_recorded_and_inputs_not_written() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor, k: Tensor) -> Tensor:
            parts = x.mul_(2).chunk(2, 1)
            return parts[0] + k.float() + x.size(0)

    graph = symbolic_trace(Net())
    x, k = torch.ones(2, 6), torch.arange(3)
    for inputs in ((x, k), {"k": k, "x": x}):
        seen = {node.name: found for node, found in record_shapes(graph, inputs).items()}
        assert torch.equal(x, torch.ones(2, 6))
        assert seen["chunk"].shape is None
        assert (seen["getitem"].shape, seen["k"].dtype) == ((2, 3), torch.int64)
        assert "size" not in seen


def test_calibration_data() -> None:
    x = torch.ones(2, 3)
    model = nn.Linear(3, 1)
    calls, example = calibration_calls(model, iter([x, (x, "label")]), None, None)
    assert [call.inputs for call in calls] == [(x,), (x,)], "the first item is calibrated on too"
    assert example.inputs == (x,)
    for given, expected in ((x, (x,)), ((x,), (x,)), ({"input": x}, {"input": x})):
        assert calibration_calls(model, [x], None, given)[1].inputs == expected


def test_methods_by_site() -> None:
    assert split_methods({"": DQA(), "a": None}) == (DQA(), {"a": None})
