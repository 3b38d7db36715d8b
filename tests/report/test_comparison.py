"""compare_methods and suggest: the figures are those of the calls they stand for."""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dqa_plugins import DQA, DenseSparse, Direct, NoisyQuant, iter_quantizers
from dqa_plugins.errors import InvalidArgument, UncalibratedQuantizer, UnsupportedInput
from dqa_plugins.report import activation_report, compare_methods, suggest
from tests.adapters.networks import batches, build

ROOMS = ("fx", "pt2e", "brevitas", "nncf")
DATA = batches("branches", 3)


def quantize(room: str) -> Any:
    return importlib.import_module(f"dqa_plugins.adapters.{room}").quantize_model


def closeness(model: nn.Module) -> float:
    """100 minus the error of the outputs in percent."""
    with torch.no_grad():
        x = batches("branches", 1, seed=5)[0]
        expected = build("branches")(x)
        return 100 - 100 * float((model(x) - expected).norm() / expected.norm())


@pytest.mark.filterwarnings("ignore::dqa_plugins.errors.DQAWarning")  # nothing is quantized
@pytest.mark.parametrize("room", ROOMS)
def test_rows_are_what_the_calls_give(room: str) -> None:
    methods = {"four": Direct(bits=4), "mixed": {"relu.0": DenseSparse(bits=3)}, "none": {"relu.0": None}}
    found = compare_methods(build("branches"), methods, DATA, closeness, quantize=quantize(room), progress=False)
    assert [row.name for row in found.rows] == ["float", *methods]
    assert found["float"].score == pytest.approx(100)
    assert (found["float"].bits, found["float"].sites, found["float"].evaluate_time_vs_float) == (32, 0, 1)
    for name, method in methods.items():
        model = quantize(room)(build("branches"), method, DATA)
        row = found[name]
        assert row.score == pytest.approx(closeness(model), rel=1e-6)
        assert row.sites == len(list(iter_quantizers(model)))
        assert row.seconds > 0 < row.evaluate_time_vs_float
        if row.sites:
            assert row.bits == activation_report(model, DATA[:1]).bits_per_activation
    assert found["none"].bits == 32
    assert found["four"].bits == 4


def test_a_method_that_cannot_be_had_is_a_row() -> None:
    methods = {"output": NoisyQuant(bits=4, objective="output"), "plain": Direct(bits=8)}
    found = compare_methods(build("branches"), methods, DATA, closeness, quantize=quantize("brevitas"), progress=False)
    assert "UnsupportedCombination" in found["output"].failed
    assert math.isnan(found["output"].score)
    assert found["plain"].score > 95
    assert "UnsupportedCombination" in str(found)
    assert "<table>" in found._repr_html_()
    assert json.loads(json.dumps(found.to_dict()))["rows"][2]["name"] == "plain"


def test_other_errors_are_not_hidden() -> None:
    def broken(model: nn.Module) -> float:
        raise KeyError("label")

    run = functools.partial(compare_methods, build("branches"), quantize=quantize("fx"), progress=False)
    with pytest.raises(KeyError, match="label"):
        run({"a": Direct()}, DATA, broken)
    with pytest.raises(UnsupportedInput, match="evaluate returned a str"):
        run({"a": Direct()}, DATA, lambda model: "good")
    with pytest.raises(InvalidArgument, match="one method or more"):
        run({}, DATA, closeness)
    with pytest.raises(UncalibratedQuantizer, match="no batches"):
        run({"a": Direct()}, [], closeness)


class Unequal(nn.Module):
    """Two branches of which one decides the output, and whose channels differ by a factor of 1000."""

    def __init__(self) -> None:
        super().__init__()
        self.loud, self.soft, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.loud(x).relu() + 1e-4 * self.soft(x).relu())


@pytest.mark.parametrize("room", ROOMS)
def test_the_cheapest_mix_that_holds(room: str) -> None:
    torch.manual_seed(0)
    net, x = Unequal().eval(), torch.randn(64, 6)
    with torch.no_grad():
        expected = net(x)

    def score(model: nn.Module) -> float:
        with torch.no_grad():
            return 100 - 100 * float((model(x) - expected).norm() / expected.norm())

    candidates = (Direct(bits=2), Direct(bits=4), Direct(bits=8))
    run = functools.partial(suggest, net, iter([x]), score, quantize=quantize(room), progress=False)
    found = run(candidates=candidates, max_drop=5.0)
    model = quantize(room)(net, found, [x])
    assert {name: q.method for name, q in iter_quantizers(model)} == dict(found)
    assert found.holds
    assert score(model) == pytest.approx(found.score, abs=1e-4)
    assert found.score >= found.float_score - 5
    assert found["relu.1"].bits == 2, "what hardly matters gets the fewest bits"
    assert found["relu.0"].bits > 2
    assert found.bits < 8
    assert min(bits for bits, reached in found.tried if reached >= found.float_score - 5) == pytest.approx(found.bits)
    impossible = suggest(
        net, [x], score, quantize=quantize(room), candidates=(Direct(bits=2),), max_drop=0, progress=False
    )
    assert not impossible.holds
    assert "NOT held" in str(impossible)


def test_sites_that_share_a_quantizer_are_all_named() -> None:
    candidates = (Direct(bits=8), DQA(bits=4))  # DQA looks at channels, so that it shares nothing here
    found = suggest(
        build("branches"), DATA, closeness, quantize=quantize("fx"), candidates=candidates, max_drop=3, progress=False
    )
    model = quantize("fx")(build("branches"), DQA(bits=4), DATA)
    assert set(found) >= {name for name, _ in iter_quantizers(model)}
    assert found.holds


@pytest.mark.filterwarnings("ignore::dqa_plugins.errors.DQAWarning")  # nothing is quantized
def test_arguments_of_suggest() -> None:
    run = functools.partial(suggest, build("branches"), DATA, closeness, quantize=quantize("fx"), progress=False)
    for wrong in ({"candidates": ()}, {"candidates": (DQA(), DQA())}, {"max_drop": -1.0}, {"max_drop": math.nan}):
        with pytest.raises(InvalidArgument, match="different candidates"):
            run(**wrong)
    with pytest.raises(UncalibratedQuantizer, match="nothing to choose"):
        suggest(
            nn.Flatten(), itertools.repeat(torch.ones(2, 3), 2), lambda m: 1.0, quantize=quantize("fx"), progress=False
        )
