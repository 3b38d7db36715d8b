"""Rankings against algorithm 3 written down plainly: one full forward pass per channel."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from dqa_plugins import DQA, Direct, RankTable, iter_quantizers, rank_channels
from dqa_plugins.adapters.fx import get_qconfig_mapping
from dqa_plugins.errors import UncalibratedQuantizer, UnsupportedCombination
from dqa_plugins.functional import direct_fake_quantize
from dqa_plugins.ranking import RankTableMismatch
from tests.nets import build, inputs


def prepared(name: str = "residual", method: Any = None) -> Any:
    mapping = get_qconfig_mapping(method or DQA(bits=2), weight_bits=None, skip=("first", "last"))
    model = prepare_fx(build(name), mapping, inputs(name))
    with torch.no_grad():
        model(*inputs(name, batch=16))
    return model


def labelled(name: str = "residual", count: int = 3) -> list[tuple[Any, Tensor]]:
    found = []
    for seed in range(count):
        x = inputs(name, batch=16, seed=40 + seed)
        with torch.no_grad():
            found.append((x, build(name)(*x).argmax(1)))
    return found


def naive(model: Any, batches: list[tuple[Any, Tensor]]) -> dict[str, list[int]]:
    """Algorithm 3: forward order; each channel in turn left out; earlier layers keep their best channel float."""
    frozen = copy.deepcopy(model)
    quantizers = dict(iter_quantizers(frozen))
    for quantizer in quantizers.values():
        quantizer.freeze()
    left_out: dict[str, int] = {}

    def hook(name: str) -> Any:
        def replace(quantizer: Any, args: Any, _: Any) -> Tensor:
            x = args[0]
            if name not in left_out:
                return x
            scale = quantizer.runtime_qparams(x).scale
            y = direct_fake_quantize(x, scale, quantizer.method.bits, signed=quantizer.signed).clone()
            y[:, left_out[name]] = x[:, left_out[name]]
            return y

        return replace

    for name, quantizer in quantizers.items():
        quantizer.register_forward_hook(hook(name))
    order = {}
    for name, quantizer in quantizers.items():
        scores = []
        for channel in range(quantizer.num_channels):
            left_out[name] = channel
            hits, loss, total = 0, 0.0, 0
            with torch.no_grad():
                for x, y in batches:
                    z = frozen(*x)
                    hits += int((z.argmax(1) == y).sum())
                    loss += float(nn.functional.cross_entropy(z, y, reduction="sum").double())
                    total += len(y)
            scores.append((-hits, loss, channel))
        order[name] = [channel for *_, channel in sorted(scores)]
        left_out[name] = order[name][0]
    return order


@pytest.mark.parametrize("qparams", ["static", "dynamic"])
def test_greedy_is_algorithm_3(qparams: str) -> None:
    model = prepared(method=DQA(bits=2, qparams=qparams))
    expected = naive(model, labelled())
    table = rank_channels(model, labelled(), progress=False)
    assert [layer.name for layer in table] == list(expected)
    for layer in table:
        count = len(layer.important(0.4))
        assert set(layer.important(0.4)) == set(expected[layer.name][:count]), layer.name
        assert layer.important(1 / layer.channels)[0] == expected[layer.name][0]


@pytest.mark.parametrize("strategy", ["greedy", "taylor", "error", "random"])
def test_a_ranking_is_applied_in_place_and_survives_convert(strategy: str) -> None:
    model = prepared()
    table = rank_channels(model, labelled(), strategy, progress=False)
    converted = dict(iter_quantizers(convert_fx(model)))
    for layer in table:
        important = torch.nonzero(converted[layer.name].extra_bits).flatten().tolist()
        assert sorted(important) == sorted(layer.important(0.4)), layer.name
        assert len(important) == round(0.4 * layer.channels)


def test_the_error_strategy_is_what_an_unranked_model_does() -> None:
    model, plain = prepared(), prepared()
    rank_channels(model, strategy="error", progress=False)
    for (_, a), (_, b) in zip(iter_quantizers(convert_fx(model)), iter_quantizers(convert_fx(plain)), strict=True):
        assert torch.equal(a.extra_bits, b.extra_bits)


def test_ranking_changes_nothing_but_the_extra_bits() -> None:
    model = prepared()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rank_channels(model, labelled(), progress=False)
    after = model.state_dict()
    changed = {k.split(".")[-1] for k, v in before.items() if v.shape != after[k].shape or not torch.equal(v, after[k])}
    assert changed <= {"extra_bits", "_extra_state"}
    assert {q.state for _, q in iter_quantizers(model)} == {"observe"}


def test_a_user_metric_decides() -> None:
    table = rank_channels(prepared(), labelled(), metric=lambda z, y: -z.square().mean(1), progress=False)
    again = rank_channels(prepared(), labelled(), metric=lambda z, y: -z.square().mean(1), progress=False)
    assert table.to_dict() == again.to_dict()
    assert table.to_dict() != rank_channels(prepared(), labelled(), progress=False).to_dict()


def test_a_table_saves_loads_and_applies_with_any_ratio(tmp_path: Path) -> None:
    table = rank_channels(prepared(), labelled(), "taylor", progress=False)
    table.save(tmp_path / "ranks.json")
    loaded = RankTable.load(tmp_path / "ranks.json")
    assert loaded.to_dict() == table.to_dict()
    model = prepared()
    loaded.apply(model, ratio=0.75)
    for _, quantizer in iter_quantizers(model):
        assert int((quantizer.extra_bits > 0).sum()) == round(0.75 * quantizer.num_channels)
    assert "bn2" in str(table)


def test_a_table_of_another_model_is_refused_by_name() -> None:
    table = rank_channels(prepared(), strategy="error", progress=False)
    with pytest.raises(RankTableMismatch, match=r"bn2|relu"):
        table.apply(prepared("bottleneck"))


def test_greedy_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "greedy.json"
    whole = rank_channels(prepared(), labelled(), progress=False, checkpoint=path)
    assert rank_channels(prepared(), labelled(), progress=False, checkpoint=path).to_dict() == whole.to_dict()


def test_what_cannot_be_ranked_says_so() -> None:
    with pytest.raises(UnsupportedCombination):
        rank_channels(prepared(method=Direct(bits=3)), labelled(), progress=False)
    fresh = prepare_fx(build("residual"), get_qconfig_mapping(DQA()), inputs("residual"))
    with pytest.raises(UncalibratedQuantizer, match=r"input\.0"):
        rank_channels(fresh, labelled(), progress=False)
