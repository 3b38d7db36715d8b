"""Chains of a convolution, an addition and a ReLU: found where nothing else sees what is between, and the same then."""

from __future__ import annotations

import logging
import operator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from dqa_plugins import DQA, ActivationQuantizer, rank_channels
from dqa_plugins.ranking import convolution, suffix
from dqa_plugins.ranking.evaluate import Scorer
from dqa_plugins.ranking.graph import Graph
from dqa_plugins.ranking.stage import Stage

from .models import build, images, labelled
from .reference import algorithm_3, assert_same


class Residual(nn.Module):
    """A quantizer between each convolution and what follows; a strided and a grouped convolution."""

    def __init__(self, method: DQA) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.conv3, self.down = nn.Conv2d(16, 16, 3, 2, 1, bias=False), nn.Conv2d(16, 16, 1, 2, groups=4)
        self.q1, self.q2, self.q3, self.q4 = (ActivationQuantizer(method) for _ in range(4))
        self.relu, self.fc = nn.ReLU(), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.q1(torch.relu(self.conv1(x)))
        x = self.relu(x + self.q2(self.conv2(x)))
        x = self.q4(self.relu(self.q3(self.conv3(x)) + self.down(x)))
        return self.fc(x.mean((2, 3)))


class Changed(Residual):
    """What a convolution has read is overwritten before the addition."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.q1(torch.relu(self.conv1(x)))
        y = self.q2(self.conv2(x))
        x.mul_(0.5)
        x = self.relu(self.q3(y + x))
        return self.fc(self.q4(x).mean((2, 3)))


class Read(Residual):
    """The convolution's output and the sum are read again; a ReLU behind two quantizers is not."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.q1(torch.relu(self.conv1(x)))
        y = self.conv2(x)
        z = x + y
        x = self.q2(torch.relu(z)) + y + z
        x = self.relu(self.q4(self.q3(self.conv3(x))))
        return self.fc(x.mean((2, 3)))


class Shapes(Residual):
    """The addend has another shape than the convolution's output, or is the output itself."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.q1(torch.relu(self.conv1(x)))
        x = self.relu(self.q2(self.conv2(x)) + x.mean((2, 3), keepdim=True))
        y = self.q3(self.conv3(x))
        return self.fc(self.q4(F.relu(y + y)).mean((2, 3)))


class Accumulated(Residual):
    """A sum written into an addend that is read again, and into the convolution's own output."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.q1(torch.relu(self.conv1(x)))
        x += self.q2(self.conv2(x))
        y = self.q3(self.conv3(x))
        y += self.q4(self.down(x))
        return self.fc(torch.relu(y).mean((2, 3)))


KINDS = [Residual, Changed, Read, Shapes, Accumulated]


def ways(model: nn.Module) -> list[Any]:
    stage = Stage(model)
    return suffix.SuffixEvaluator(stage, [], Scorer(None), stacking=True, memory=2**30, rows=None)._ways


def described(model: GraphModule) -> list[tuple[str, str | None, int, str | None]]:
    (chains, *_) = [way.chains for way in ways(model)]
    names = [node.name for node in chains.graph.nodes]
    return [
        (names[c.conv], None if c.add is None else names[c.add], c.side, None if c.relu is None else names[c.relu])
        for c in chains.found
    ]


def test_the_chains_of_a_graph() -> None:
    assert described(build(Residual, graph=True)) == [
        ("conv1", None, 0, "relu"),
        ("conv2", "add", 1, "relu_1"),
        ("conv3", "add_1", 0, "relu_2"),
        ("down", None, 0, None),  # the addition is taken
    ]


def test_what_breaks_a_chain() -> None:
    changed = {conv: (add, relu) for conv, add, _, relu in described(build(Changed, graph=True))}
    assert changed == {"conv1": (None, "relu"), "conv2": (None, None)}
    model = build(Accumulated, graph=True)
    for node in model.graph.nodes:  # tracing writes += as +
        node.target = operator.iadd if node.target is operator.add else node.target
    model.recompile()
    accumulated = {conv: (add, relu) for conv, add, _, relu in described(model)}
    assert accumulated["conv2"] == (None, None)
    assert accumulated["conv3"] == ("add_1", "relu_1")
    read = {conv: (add, relu) for conv, add, _, relu in described(build(Read, graph=True))}
    assert read == {"conv1": (None, "relu"), "conv2": (None, None), "conv3": (None, "relu_2")}


@pytest.mark.parametrize("kind", KINDS)
def test_same_values_from_every_start(kind: Any) -> None:
    """Run to each node plainly, and from there with the chains that hold."""
    model = build(kind, graph=True)
    stage = Stage(model)
    plain = Graph(stage.model)  # every quantizer is off
    (way, *_) = ways(model)
    x = images(5)
    with torch.no_grad():
        expected = plain.run(plain.start(x), 0, plain.length)
        for start in range(plain.length):
            values = plain.start(x)
            plain.run(values, 0, start)
            way.begin(start - 1)
            found = way.graph.run(values, start, plain.length)
            assert torch.allclose(found, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_same_table_as_algorithm_3(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    for run in (convolution.Winograd, convolution.Packed):
        monkeypatch.setattr(run, "__call__", _counted(run.__call__, calls))
    model = build(kind, graph=True)
    table = rank_channels(model, labelled(), progress=False)
    assert calls
    assert_same(table, algorithm_3(model, labelled()), exact=False)


def _counted(function: Any, calls: list[Any]) -> Any:
    def counted(*args: Any) -> Any:
        calls.append(args)
        return function(*args)

    return counted


def test_fused_convolutions_that_deviate_are_not_trusted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The next way is tried; the table stays the same."""

    def wrong(self: Any, x: Tensor, addend: Tensor | None, relu: bool) -> Tensor:
        return original(self, x, addend, relu) * 1.001

    original = convolution.Winograd.__call__
    monkeypatch.setattr(convolution.Winograd, "__call__", wrong)
    model = build(Residual, graph=True)
    with caplog.at_level(logging.INFO, "dqa_plugins.ranking"):
        table = rank_channels(model, labelled(), progress=False)
    assert "with fused convolutions: outputs deviate" in caplog.text
    assert "in channels-last format: outputs deviate" not in caplog.text
    assert_same(table, algorithm_3(model, labelled()), exact=False)


def test_fused_convolutions_that_fail_are_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: Any) -> Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(convolution.Winograd, "__call__", failing)
    monkeypatch.setattr(convolution.Packed, "__call__", failing)
    model = build(Residual, graph=True)
    with caplog.at_level(logging.INFO, "dqa_plugins.ranking"):
        table = rank_channels(model, labelled(), progress=False)
    assert caplog.text.count("no such kernel") == 1
    assert_same(table, algorithm_3(model, labelled()), exact=False)
