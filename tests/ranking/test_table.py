"""RankTable: JSON, printing, applying, and everything it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dqa_plugins import DQA, RankTable, iter_quantizers, rank_channels
from dqa_plugins.errors import DQAError
from dqa_plugins.ranking import LayerRanks, RankingError, RankTableError, RankTableMismatch

from .models import build, labelled


def table(**settings: Any) -> RankTable:
    return rank_channels(build(graph=True), labelled(), progress=False, **settings)


def applied(model: Any) -> list[torch.Tensor]:
    return [quantizer.extra_bits for _, quantizer in iter_quantizers(model)]


@pytest.mark.parametrize("strategy", ["greedy", "taylor", "error", "random"])
def test_json_round_trip(strategy: str, tmp_path: Path) -> None:
    made = table(strategy=strategy, seed=3, strict=True)
    made.save(tmp_path / "t.json")
    loaded = RankTable.load(str(tmp_path / "t.json"))
    assert loaded == made
    assert (loaded.strategy, loaded.seed, loaded.strict) == (strategy, 3, True)
    assert json.loads((tmp_path / "t.json").read_text())["version"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]


def test_saving_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.json"
    table(strategy="random").save(path)
    before = path.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(OSError, match="no space"):
        table(strategy="error").save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.25, 0.4, 0.5, 1.0])
def test_any_ratio(ratio: float) -> None:
    model, made = build(graph=True, method=DQA(bits=3, extra_bits=2)), table()
    made.apply(model, ratio=ratio)
    for layer, extra in zip(made, applied(model), strict=True):
        important = list(layer.order[: round(ratio * 6)])
        assert extra[important].tolist() == [2] * len(important)
        assert int(extra.sum()) == 2 * len(important)


def test_without_a_ratio_the_methods_own_counts() -> None:
    made = table()
    model = build(graph=True, method=DQA(bits=2, ratio=0.7))
    made.apply(model)
    assert [int((extra > 0).sum()) for extra in applied(model)] == [4, 4]


@pytest.mark.parametrize("ratio", [-0.1, 1.5, float("nan"), True, "0.5", [0.5], 0.5j])
def test_bad_ratios(ratio: Any) -> None:
    with pytest.raises(RankingError, match="ratio="):
        table(strategy="random").apply(build(graph=True), ratio=ratio)


def test_of_another_model_changes_nothing() -> None:
    made = table(strategy="random")
    layers = list(made.layers)
    renamed = RankTable((layers[0], LayerRanks("other", layers[1].order, layers[1].scores)), "random")
    shorter = RankTable((layers[0], LayerRanks("q2", (1, 0), (0.0, 1.0))), "random")
    fewer, more = RankTable(layers[:1], "random"), RankTable((*layers, LayerRanks("q3", (0,), (1.0,))), "random")
    cases = [(renamed, "'other'.*'q2'"), (shorter, "'q2' has 6 channels.*ranks 2"), (fewer, "'q2'"), (more, "'q3'")]
    for bad, message in cases:
        model = build(graph=True)
        before = [extra.clone() for extra in applied(model)]
        with pytest.raises(RankTableMismatch, match=message) as caught:
            bad.apply(model)
        assert isinstance(caught.value, ValueError)
        assert isinstance(caught.value, DQAError)
        assert all(torch.equal(a, b) for a, b in zip(before, applied(model), strict=True))
        assert not any(quantizer.ranked for _, quantizer in iter_quantizers(model))


DAMAGE: dict[str, Any] = {
    "no table": [],
    "another schema": {"schema": "other"},
    "a later version": {"version": 2},
    "no permutation": {"layers": [{"name": "a", "order": [0, 0], "scores": [1, 2], "losses": None}]},
    "scores missing": {"layers": [{"name": "a", "order": [0, 1], "losses": None}]},
    "too few scores": {"layers": [{"name": "a", "order": [0, 1], "scores": [1], "losses": None}]},
    "text for a number": {"layers": [{"name": "a", "order": [0], "scores": ["x"], "losses": None}]},
    "fractional channel": {"layers": [{"name": "a", "order": [0.5], "scores": [1], "losses": None}]},
    "NaN": {"layers": [{"name": "a", "order": [0], "scores": [float("nan")], "losses": None}]},
    "infinity": {"layers": [{"name": "a", "order": [0], "scores": [1], "losses": [float("inf")]}]},
    "a number that no float holds": {"layers": [{"name": "a", "order": [0], "scores": [10**400], "losses": None}]},
    "text for a list": {"layers": [{"name": "a", "order": [0, 1], "scores": "12", "losses": None}]},
    "numbers as text": {"layers": [{"name": "a", "order": [0, 1], "scores": ["1", " 2 "], "losses": None}]},
    "a layer without a name": {"layers": [{"name": None, "order": [0], "scores": [1], "losses": None}]},
    "a strategy that is no text": {"strategy": {"x": 1}},
    "strict that is no truth value": {"strict": 1},
    "a version that is no integer": {"version": True},
    "a layer twice": {"layers": [{"name": "a", "order": [0], "scores": [1], "losses": None}] * 2},
    "no layers": {"layers": None},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused(damage: str, tmp_path: Path) -> None:
    change = DAMAGE[damage]
    data = {**table(strategy="random").to_dict(), **change} if isinstance(change, dict) else change
    path = tmp_path / "t.json"
    path.write_text(json.dumps(data))
    with pytest.raises(RankTableError, match=r"t\.json"):
        RankTable.load(path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"null", b"[" * 100_000])
def test_files_that_are_no_tables(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(content)
    with pytest.raises(RankTableError, match=r"t\.json"):
        RankTable.load(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    table(strategy="random").save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(RankTableError):
            RankTable.load(path)


def test_scores_must_be_finite() -> None:
    for scores in ((float("nan"), 0.0), (0.0, float("inf"))):
        with pytest.raises(RankTableError, match="'a': scores must be finite"):
            LayerRanks("a", (0, 1), scores)


def test_reading_and_printing() -> None:
    made = table()
    assert len(made) == 2
    assert made["q1"].channels == 6
    assert made["q2"].important(0.5) == made["q2"].order[:3]
    with pytest.raises(KeyError, match="'q1'"):
        made["nowhere"]
    text = str(made)
    assert "greedy ranking by accuracy" in text
    assert all(layer.name in text for layer in made)
