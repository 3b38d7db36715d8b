"""What a ranking leaves behind: nothing but extra bits; and how it is interrupted and resumed."""

from __future__ import annotations

import builtins
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dqa_plugins import DQA, iter_quantizers, rank_channels
from dqa_plugins.ranking import CheckpointMismatch, RankTableError, prefix

from .models import Tiny, build, labelled


class Snapshot:
    """Everything of a model that a ranking could touch."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors = {k: v.clone() for k, v in model.state_dict().items()}
        self.modes = [m.training for m in model.modules()]
        self.hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for m in model.modules()]
        self.grads = [(p.requires_grad, p.grad) for p in model.parameters()]

    def assert_unchanged(self, *, extra_bits: bool) -> None:
        now = Snapshot(self.model)
        assert (self.modes, self.hooks, self.grads) == (now.modes, now.hooks, now.grads)
        assert self.tensors.keys() == now.tensors.keys()
        for key, before in self.tensors.items():
            if extra_bits and key.endswith(("extra_bits", "_extra_state")):
                continue
            assert torch.equal(before, now.tensors[key]), key


class Stop(BaseException):
    pass


def stopping_after(calls: int) -> Any:
    """A metric that raises after some calls."""
    left = iter(range(calls))  # where an iterator stands is no part of what a metric computes

    def metric(outputs: Tensor, targets: Tensor) -> Tensor:
        if next(left, None) is None:
            raise Stop
        return (outputs.argmax(1) == targets).double()

    metric.__name__ = "hits"
    return metric


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("strategy", ["greedy", "taylor", "error", "random"])
def test_only_extra_bits_change(strategy: str, graph: bool, training: bool) -> None:
    model = build(graph=graph).train(training)
    model.conv2.eval()
    handle = model.fc.register_forward_hook(lambda *_: None)
    before = Snapshot(model)
    generator = torch.get_rng_state()
    rank_channels(model, labelled(), strategy, progress=False)
    before.assert_unchanged(extra_bits=True)
    assert torch.equal(generator, torch.get_rng_state())
    assert all(quantizer.state == "observe" for _, quantizer in iter_quantizers(model))
    handle.remove()


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("calls", [0, 4, 25])
def test_nothing_changes_when_it_fails(graph: bool, calls: int) -> None:
    model = build(graph=graph).train()
    before = Snapshot(model)
    with pytest.raises(Stop):
        rank_channels(model, labelled(), metric=stopping_after(calls), progress=False)
    before.assert_unchanged(extra_bits=False)


def test_inputs_stay_as_they_are() -> None:
    class Overwrites(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(1.5))

    batches = labelled()
    before = [x.clone() for x, _ in batches]
    for strategy in ("greedy", "taylor"):
        rank_channels(build(Overwrites, graph=True), batches, strategy, progress=False)
    assert all(torch.equal(a, x) for a, (x, _) in zip(before, batches, strict=True))


@pytest.mark.parametrize("graph", [True, False])
def test_interrupt_and_resume(graph: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The resumed search evaluates only what is missing, and gives the table of an uninterrupted one."""
    path = tmp_path / "ranking.json"
    whole = rank_channels(build(graph=graph), labelled(), metric=stopping_after(1000), progress=False)
    with pytest.raises(Stop):  # 3 batches, 6 channels: in the second layer
        rank_channels(build(graph=graph), labelled(), metric=stopping_after(25), checkpoint=path, progress=False)
    assert [layer["name"] for layer in json.loads(path.read_text())["table"]["layers"]] == ["q1"]
    counting = stopping_after(18)  # the second layer alone
    resumed = rank_channels(build(graph=graph), labelled(), metric=counting, checkpoint=path, progress=False)
    assert resumed == whole
    nothing = stopping_after(0)
    model = build(graph=graph)
    assert rank_channels(model, labelled(), metric=nothing, checkpoint=path, progress=False) == whole
    assert all(quantizer.ranked for _, quantizer in iter_quantizers(model))
    assert [p.name for p in tmp_path.iterdir()] == ["ranking.json"]


def test_resuming_the_stacked_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ranking.json"
    whole = rank_channels(build(graph=True), labelled(), progress=False)
    original = prefix.PrefixEvaluator.scores

    def interrupted(self: Any, index: int, *rest: Any) -> Any:
        if index == 1:
            raise KeyboardInterrupt
        return original(self, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(prefix.PrefixEvaluator, "scores", interrupted)
        with pytest.raises(KeyboardInterrupt):
            rank_channels(build(graph=True), labelled(), checkpoint=path, progress=False)
    assert rank_channels(build(graph=True), labelled(), checkpoint=path, progress=False) == whole


def test_checkpoints_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "ranking.json"
    rank_channels(build(), labelled(), checkpoint=path, progress=False)
    before = path.read_bytes()
    other = build()
    with torch.no_grad():
        other.fc.weight += 1
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (build(method=DQA(bits=3)), labelled(), {}, "layers"),
        (other, labelled(), {}, "model"),
        (build(), labelled((20, 20)), {}, "batches"),
        (build(), labelled(), {"strict": True}, "strict"),
        (build(), labelled(), {"metric": stopping_after(9)}, "metric"),
    ]
    for model, batches, settings, what in cases:
        with pytest.raises(CheckpointMismatch, match=rf"ranking\.json.*other.*{what}"):
            rank_channels(model, batches, checkpoint=path, progress=False, **settings)
    assert path.read_bytes() == before
    for content in ("", "{}", '{"schema": "dqa_plugins.ranking_checkpoint", "version": 9}'):
        path.write_text(content)
        with pytest.raises(RankTableError, match=r"ranking\.json"):
            rank_channels(build(), labelled(), checkpoint=path, progress=False)


def top(k: int) -> Any:
    return lambda z, t: (z.topk(k).indices == t[:, None]).any(1).double()


def weighted(z: Tensor, t: Tensor, weight: float = 1.0) -> Tensor:
    return weight * z[:, 0]


class Weighted:
    def __init__(self, weight: float) -> None:
        self.weight = weight

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        return weighted(z, t, self.weight)


# pairs that are one metric, then pairs that are two
SAME = [
    (None, None),
    *[(make(1), make(1)) for make in (top, Weighted, lambda w: functools.partial(weighted, weight=w))],
]
OTHER = [
    (lambda z, t: z[:, 0], lambda z, t: -z[:, 0]),
    (lambda z, t: z.amax(1), lambda z, t: z.amin(1)),
    (lambda z, t: weighted(z, t), lambda z, t, weight=2.0: weighted(z, t)),
    *[(make(1), make(2)) for make in (top, Weighted, lambda w: functools.partial(weighted, weight=w))],
]


@pytest.mark.parametrize("number", range(len(SAME)))
def test_a_checkpoint_resumes_with_the_same_metric(number: int, tmp_path: Path) -> None:
    first, second = SAME[number]
    table = rank_channels(build(), labelled(), metric=first, checkpoint=tmp_path / "m.json", progress=False)
    assert rank_channels(build(), labelled(), metric=second, checkpoint=tmp_path / "m.json", progress=False) == table


@pytest.mark.parametrize("number", range(len(OTHER)))
def test_a_checkpoint_of_another_metric_of_the_same_name(number: int, tmp_path: Path) -> None:
    first, second = OTHER[number]
    rank_channels(build(), labelled(), metric=first, checkpoint=tmp_path / "m.json", progress=False)
    with pytest.raises(CheckpointMismatch, match="other metric"):
        rank_channels(build(), labelled(), metric=second, checkpoint=tmp_path / "m.json", progress=False)


class Peaks(Tiny):
    """`Tiny` with the largest position in place of the mean: the same layers and weights."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.q1(nn.functional.relu(self.conv1(x)))
        x = self.q2(nn.functional.relu(x + self.conv2(x)))
        return self.fc(x.amax((2, 3)))


@pytest.mark.parametrize("graph", [True, False])
def test_a_checkpoint_of_another_network_with_equal_weights(graph: bool, tmp_path: Path) -> None:
    path = tmp_path / "n.json"
    rank_channels(build(graph=graph), labelled(), checkpoint=path, progress=False)
    dilated = build(graph=graph)
    dilated.conv2.dilation = dilated.conv2.padding = (2, 2)
    for other in (build(Peaks, graph=graph), dilated):
        with pytest.raises(CheckpointMismatch, match="other model"):
            rank_channels(other, labelled(), checkpoint=path, progress=False)


IDENTITY = """
import sys
sys.path.insert(0, {root!r})
from tests.matrix import rooms
from dqa_plugins import DQA
from dqa_plugins.digest import digest
model = rooms.ROOMS[{room!r}](dict.fromkeys(rooms.SITES.values(), DQA(bits=2)))
print(digest([model, lambda z, t: z.size(1) in {{2, "a", "b", "c"}}]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("room", ["fx", "pt2e", "brevitas", "nncf"])
def test_another_process_has_the_same_identity(room: str) -> None:
    """No address, no order of a set and no reused object is part of it."""
    pytest.importorskip({"fx": "torch", "pt2e": "torchao"}.get(room, room))
    code = IDENTITY.format(root=str(Path(__file__).parents[2]), room=room)
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True
        ).stdout.splitlines()[-1]
        for seed in ("1", "2")
    }
    assert len(found) == 1


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    rank_channels(build(graph=True), labelled())
    assert "12/12" in capsys.readouterr().err
    rank_channels(build(graph=True), labelled(), progress=False)
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""


def test_without_tqdm(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    original = builtins.__import__

    def without(name: str, *rest: Any, **settings: Any) -> Any:
        if name.startswith("tqdm"):
            raise ImportError(name)
        return original(name, *rest, **settings)

    monkeypatch.setattr(builtins, "__import__", without)
    with caplog.at_level("INFO", "dqa_plugins"):
        rank_channels(build(), labelled())
    assert "tqdm is not installed" in caplog.text
    assert "q2" in caplog.text


def test_the_same_in_inference_mode() -> None:
    with torch.inference_mode():
        inside = rank_channels(build(graph=True), labelled(), progress=False)
    assert inside == rank_channels(build(graph=True), labelled(), progress=False)


def test_a_checkpoint_whose_table_is_of_other_layers(tmp_path: Path) -> None:
    """Its identity is right, its table is not: another name, another number of channels, another order."""
    path = tmp_path / "ranking.json"
    table = rank_channels(build(), labelled(), checkpoint=path, progress=False)
    whole = json.loads(path.read_text())
    first, second = whole["table"]["layers"]
    shorter = {**first, "order": [0], "scores": [0.5], "losses": None}
    for layers in ([{**first, "name": "q9"}, second], [shorter, second], [second, first], [second]):
        path.write_text(json.dumps({**whole, "table": {**whole["table"], "layers": layers}}))
        with pytest.raises(RankTableError, match=r"ranking\.json.*damaged"):
            rank_channels(build(), labelled(), checkpoint=path, progress=False)
    path.write_text(json.dumps({**whole, "table": {**whole["table"], "layers": [first]}}))
    assert rank_channels(build(), labelled(), checkpoint=path, progress=False) == table
