"""placement_report in every room: sites, what stays float, settings that matched nothing; and the one warning."""

from __future__ import annotations

import copy
import importlib
import io
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dqa_plugins import DQA, ActivationQuantizer, Direct
from dqa_plugins.errors import DQAWarning, DuplicateSites
from dqa_plugins.host.sites import Summary, keep_summary
from dqa_plugins.report import PlacementReport, placement_report
from tests.adapters.networks import batches, build

ROOMS = ("fx", "pt2e", "brevitas", "nncf")
rooms = pytest.mark.parametrize("room", ROOMS)


def quantize(room: str, model: nn.Module, method: Any, data: list[Any]) -> nn.Module:
    found: nn.Module = importlib.import_module(f"dqa_plugins.adapters.{room}").quantize_model(model, method, data)
    return found


@rooms
def test_sites_axes_and_what_stays_float(room: str) -> None:
    model = quantize(room, build("attention"), DQA(), batches("attention"))
    report = placement_report(model)
    rows = {row.site: row for row in report.sites}
    assert list(rows)[:3] == ["input.0", "add.0", "norm"]
    assert (rows["norm"].producer, rows["norm"].axis, rows["norm"].axis_told) == ("LayerNorm", -1, True)
    assert set(rows["norm"].readers) == {"query", "key", "value", "add.1"}
    assert [row.site for row in report.sites if not row.axis_told] == ["matmul.0", "mul.0", "softmax.0"]
    assert rows["norm"].method == "DQA(bits=4)"
    floats = dict(report.floats)
    assert "inside" in floats["attend"], "the projections of MultiheadAttention"
    assert any("parameters" in reason for reason in floats.values()), "the learned position"
    assert not report.unmatched


@rooms
def test_recurrent_layers_are_listed(room: str) -> None:
    floats = dict(placement_report(quantize(room, build("recurrent"), DQA(), batches("recurrent"))).floats)
    assert "inside" in floats["lstm"]


@rooms
def test_it_survives_copies_and_prints(room: str) -> None:
    model = quantize(room, build("branches"), {"": DQA(), "relu.0": DQA(bits=3, ratio=0.5)}, batches("branches"))
    report = placement_report(model)
    assert placement_report(copy.deepcopy(model)) == report
    wrapped = nn.Sequential(copy.deepcopy(model))
    assert [row.site for row in placement_report(wrapped).sites] == [row.site for row in report.sites]
    assert json.loads(json.dumps(report.to_dict()))["sites"][1]["method"] == "DQA(bits=3, ratio=0.5)"
    text = str(report)
    assert text.startswith("5 quantized tensors\nsite ")
    assert "DQA(bits=3, ratio=0.5)" in text


def test_rich_prints_the_same_rows() -> None:
    console = pytest.importorskip("rich.console").Console(width=300, record=True, file=io.StringIO())
    report = placement_report(quantize("fx", build("attention"), DQA(), batches("attention")))
    console.print(report)
    text = console.export_text()
    assert all(row.site in text and row.producer in text for row in report.sites)


def test_prepared_models_have_the_report_of_converted_ones() -> None:
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    from dqa_plugins.adapters.fx import get_qconfig_mapping

    x = batches("branches")[0]
    prepared = prepare_fx(build("branches"), get_qconfig_mapping(DQA()), (x,))
    before = placement_report(prepared)
    prepared(x)
    assert placement_report(convert_fx(prepared)) == before


def test_nncf_tells_before_it_quantizes() -> None:
    nncf = pytest.importorskip("nncf")
    from dqa_plugins.adapters.nncf import placement, quantize

    config = {"compression": {"algorithm": "quantization", "activations": {"mode": "dqa"}, "ignored_scopes": ["join"]}}
    data = nncf.Dataset(batches("branches"))
    before = placement(build("branches"), data, config)
    assert dict(before.floats)["cat.0"] == "only ignored operations read it"
    assert before == placement_report(quantize(build("branches"), data, config))


def test_quantizers_put_in_by_hand() -> None:
    model = nn.Sequential(nn.Linear(3, 3), ActivationQuantizer(Direct(), name="hand"), nn.Linear(3, 2), nn.LSTM(2, 2))
    report = placement_report(model)
    assert [row.site for row in report.sites] == ["hand"]
    assert [name for name, _ in report.floats] == ["0", "2", "3"]


def test_layers_of_brevitas_that_were_not_substituted() -> None:
    substitute = pytest.importorskip("dqa_plugins.adapters.brevitas").substitute_layers
    floats = placement_report(substitute(build("residual"), {"relu1": DQA()})).floats
    assert [name for name, _ in floats] == ["conv1", "bn1", "conv2", "bn2", "relu2", "fc"]


def test_no_room_keeps_two_quantizers_of_one_name() -> None:
    """Every room hands its quantizers over in one place, which asks."""
    twins = [ActivationQuantizer(Direct(), name="same") for _ in range(2)]
    with pytest.raises(DuplicateSites, match="'same'"):
        keep_summary(Summary(), nn.Identity(), twins)
    keep_summary(Summary(), nn.Identity(), [twins[0], twins[0]])


# ---------------------------------------------------------------- settings without effect


def said(caught: Any) -> list[str]:
    return [str(w.message) for w in caught if issubclass(w.category, DQAWarning)]


@rooms
def test_a_setting_for_what_cannot_be_quantized_is_told(room: str) -> None:
    """It was silent: the max-pool only hands on what the ReLU's quantizer made."""
    with pytest.warns(DQAWarning, match=r"matched nothing for 'pool' \(it makes no values") as caught:
        model = quantize(room, build("residual"), {"relu1": DQA(), "pool": DQA(bits=3)}, batches("residual"))
    assert len(said(caught)) == 1
    assert [setting for setting, _ in placement_report(model).unmatched] == ["pool"]


def fx(change: Callable[[Any], Any]) -> nn.Module:
    from torch.ao.quantization.quantize_fx import prepare_fx

    from dqa_plugins.adapters.fx import get_qconfig_mapping

    mapping = get_qconfig_mapping(DQA())
    change(mapping)
    prepared: nn.Module = prepare_fx(build("residual"), mapping, (batches("residual")[0],))
    return prepared


def pt2e(quantizer: Any) -> nn.Module:
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    exported = torch.export.export(build("residual"), (batches("residual")[0],)).module()
    prepared: nn.Module = prepare_pt2e(exported, quantizer)
    return prepared


def unmatched(report: PlacementReport) -> list[str]:
    return [setting for setting, _ in report.unmatched]


def test_fx_types_and_patterns_that_match_nothing_are_told() -> None:
    def misspelt(mapping: Any) -> None:
        mapping.set_object_type(nn.GELU, None).set_module_name_regex("rleu.*", None)
        # these match: a fused layer, a function of the graph, a pattern
        mapping.set_object_type(nn.BatchNorm2d, None).set_object_type("mean", None)
        mapping.set_module_name_regex("relu.", None)

    with pytest.warns(DQAWarning, match=r"'GELU' .*'rleu\.\*'") as caught:
        prepared = fx(misspelt)
    assert len(said(caught)) == 1
    assert unmatched(placement_report(prepared)) == ["GELU", "rleu.*"]


def test_fx_without_a_method_says_so() -> None:
    with pytest.warns(DQAWarning, match="No method is set"):
        fx(lambda mapping: mapping.set_global(None))


def test_pt2e_types_that_match_nothing_and_a_quantizer_without_a_method() -> None:
    from dqa_plugins.adapters.pt2e import PluginQuantizer

    with pytest.warns(DQAWarning, match="GELU"):
        prepared = pt2e(PluginQuantizer().set_global(DQA()).set_module_type(nn.GELU, Direct()))
    assert unmatched(placement_report(prepared)) == ["torch.nn.modules.activation.GELU"]
    with pytest.warns(DQAWarning, match="No method is set"):
        pt2e(PluginQuantizer())


@rooms
def test_quantize_model_without_a_method_says_so(room: str) -> None:
    with pytest.warns(DQAWarning, match=r"No method is set|placed no quantizer") as caught:
        quantize(room, build("branches"), {"": None}, batches("branches"))
    assert len(said(caught)) == 1


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def test_standalone_modules_of_fx_are_in_the_report() -> None:
    from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
    from torch.ao.quantization.quantize_fx import prepare_fx

    from dqa_plugins.adapters.fx import get_qconfig_mapping

    custom = PrepareCustomConfig().set_standalone_module_name("0", None, (torch.randn(2, 4),), None, None)
    model = nn.Sequential(Tiny(), nn.Linear(4, 2)).eval()
    prepared = prepare_fx(model, get_qconfig_mapping(Direct()), (torch.randn(2, 4),), custom)
    rows = {row.site: row for row in placement_report(prepared).sites}
    assert list(rows) == ["input.0", "0.fc", "1"] or {"0.fc", "1"} <= rows.keys()
    assert rows["0.fc"].producer == "Linear"
