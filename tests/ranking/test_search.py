"""The search gives the table of algorithm 3, whichever way it takes."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dqa_plugins import DQA, Direct, NoisyQuant, RankTable, iter_quantizers, rank_channels
from dqa_plugins.errors import InvalidTarget
from dqa_plugins.metrics import IGNORED, accuracy, cross_entropy
from dqa_plugins.ranking import prefix, stacking
from tests.nets import build as build_net
from tests.nets import inputs as net_inputs

from .models import InPlace, Mixing, Segments, Sized, Tiny, Twice, build, images, labelled
from .reference import algorithm_3, assert_same

METHODS = {
    "static": DQA(bits=2),
    "dynamic": DQA(bits=2, qparams="dynamic"),
    "per channel": DQA(bits=2, granularity="channel"),
    "dynamic per channel": DQA(bits=2, granularity="channel", qparams="dynamic"),
    "mse": DQA(bits=2, clip="mse"),
    "quantile": DQA(bits=3, clip=0.98, signed=True),
    "batch scope": DQA(bits=2, qparams="dynamic", scope="batch"),
}


@pytest.fixture
def one_by_one(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Where True, no candidates are stacked: every number is that of algorithm 3, cross-entropies too."""
    if request.param:
        monkeypatch.setattr(prefix.PrefixEvaluator, "_rounds_again", lambda *_: True)
    return bool(request.param)


@pytest.mark.parametrize("one_by_one", [True, False], indirect=True)
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_same_table_as_algorithm_3(name: str, graph: bool, one_by_one: bool) -> None:
    model = build(method=METHODS[name], graph=graph)
    table = rank_channels(model, labelled(), progress=False)
    assert_same(table, algorithm_3(model, labelled()), exact=one_by_one or not graph)


@pytest.mark.parametrize("one_by_one", [True, False], indirect=True)
@pytest.mark.parametrize("kind", [InPlace, Twice, Mixing, Sized])
def test_graphs_that_cannot_simply_be_stacked(kind: Any, one_by_one: bool) -> None:
    """In-place operations, a quantizer called twice, samples that depend on each other, a size from far above."""
    model = build(kind, graph=True)
    table = rank_channels(model, labelled(), progress=False)
    assert_same(table, algorithm_3(model, labelled()), exact=one_by_one)


def test_segmentation() -> None:
    model = build(Segments, graph=True)
    batches = labelled(pixels=True)
    assert_same(rank_channels(model, batches, progress=False), algorithm_3(model, batches), exact=False)


@pytest.mark.parametrize("memory", [1, 20_000, 2**30])
@pytest.mark.parametrize("rows", [1, 7, None])
def test_little_memory_and_odd_passes_change_nothing(
    memory: int, rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rows is not None:
        monkeypatch.setattr(stacking.Stack, "rows_per_pass", lambda self, memory: rows)
    model = build(graph=True)
    table = rank_channels(model, labelled(), progress=False, memory=memory)
    assert_same(table, algorithm_3(model, labelled()), exact=False)


def test_little_memory_keeps_no_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    original = prefix.PrefixEvaluator.scores

    def scores(self: Any, *args: Any) -> Any:
        found = original(self, *args)
        kept.append(len(self._cached))
        return found

    monkeypatch.setattr(prefix.PrefixEvaluator, "scores", scores)
    rank_channels(build(graph=True), labelled(), progress=False, memory=1)
    rank_channels(build(graph=True), labelled(), progress=False)
    assert kept == [0, 0, 3, 3]


def test_strict_keeps_the_first_best() -> None:
    model = build(graph=True)
    table = rank_channels(model, labelled(), strict=True, progress=False)
    expected = algorithm_3(model, labelled(), strict=True)
    assert table.strict
    assert_same(table, expected, exact=False)
    for layer in table:
        assert layer.order[0] == layer.scores.index(max(layer.scores))


def test_ties_of_accuracy_go_to_the_lower_loss_then_to_the_lower_index() -> None:
    """Two dead channels change nothing: they tie in accuracy and loss."""
    model = build(graph=True)
    with torch.no_grad():
        for conv in (model.conv1, model.conv2):
            conv.weight[1], conv.bias[1] = 0, -1
    batches = [(images(3, 11), torch.zeros(3, dtype=torch.int64))]  # one to four values of accuracy
    table = rank_channels(model, batches, progress=False)
    assert_same(table, algorithm_3(model, batches), exact=False)
    for layer in table:
        assert layer.losses is not None
        assert layer.scores[1] == layer.scores[3]
        assert layer.losses[1] == layer.losses[3]
        assert layer.order.index(3) == layer.order.index(1) + 1
        keys = [(-layer.scores[c], layer.losses[c], c) for c in layer.order]
        assert keys == sorted(keys)
        assert len(set(layer.scores)) <= 4


def test_near_ties_are_settled_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tolerance that takes in everything, every channel is scored again, and every number is exact."""
    monkeypatch.setattr(prefix, "SAFETY", 1e9)
    monkeypatch.setattr(stacking, "SAFETY", 1e9)
    model = build(graph=True)
    assert_same(rank_channels(model, labelled(), progress=False), algorithm_3(model, labelled()), exact=True)


def test_samples_that_depend_on_each_other_are_noticed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dqa_plugins.ranking"):
        rank_channels(build(Mixing, graph=True), labelled(), progress=False)
    assert "scoring candidates one by one" in caplog.text


def test_a_metric_of_the_users() -> None:
    """It decides first; its ties go to the cross-entropy too."""

    def coarse(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs[:, 0] > outputs[:, 1]).float()

    for graph in (True, False):
        model = build(graph=graph)
        table = rank_channels(model, labelled(), metric=coarse, progress=False)
        assert table.metric == "coarse"
        assert_same(table, algorithm_3(model, labelled(), metric=coarse), exact=True)


def test_a_metric_without_classes_needs_no_cross_entropy() -> None:
    batches = [(images(9), torch.randn(9, 4, generator=torch.Generator().manual_seed(0)))]
    table = rank_channels(build(graph=True), batches, metric=lambda z, t: -(z - t).square().mean(1), progress=False)
    for layer in table:
        assert layer.losses is None
        assert list(layer.order) == sorted(range(6), key=lambda c: (-layer.scores[c], c))


def test_other_methods_quantize_while_later_layers_are_searched() -> None:
    """A Direct or NoisyQuant layer is not in the table, but is on once it is passed."""
    for first in (Direct(bits=2), NoisyQuant(bits=3, amplitude=0.5), Direct(bits=2, symmetric=False)):
        for graph in (True, False):
            model = build(method=first, later=DQA(bits=2), graph=graph)
            table = rank_channels(model, labelled(), progress=False)
            assert [layer.name for layer in table] == ["q2"]
            assert_same(table, algorithm_3(model, labelled()), exact=not graph)


@pytest.mark.parametrize("name", ["bottleneck", "concat", "transposed", "tokens", "two_inputs"])
def test_networks_of_every_shape_in_fx(name: str) -> None:
    """Last-axis channels, several inputs, depthwise convolutions, concatenation."""
    from torch.ao.quantization.quantize_fx import prepare_fx

    from dqa_plugins.adapters.fx import get_qconfig_mapping

    model = prepare_fx(build_net(name), get_qconfig_mapping(DQA(bits=2), weight_bits=None), net_inputs(name))
    with torch.no_grad():
        model(*net_inputs(name, batch=12))
        batches = [(x, build_net(name)(*x).argmax(1)) for x in (net_inputs(name, 12, 40), net_inputs(name, 5, 41))]
    table = rank_channels(model, batches, progress=False)
    assert_same(table, algorithm_3(model, batches), exact=False)


def test_keyword_inputs() -> None:
    batches: list[Any] = [({"x": x}, y) for x, y in labelled()]
    for graph in (True, False):
        model = build(graph=graph)
        assert_same(rank_channels(model, batches, progress=False), algorithm_3(model, batches), exact=not graph)


def test_batches_are_read_once() -> None:
    model = build(graph=True)
    table = rank_channels(model, iter(labelled()), progress=False)
    assert_same(table, algorithm_3(model, labelled()), exact=False)


def test_a_second_ranking_is_the_same() -> None:
    """What the first one applied does not change the second."""
    model = build(graph=True)
    tables = [rank_channels(model, labelled(), progress=False) for _ in range(2)]
    assert tables[0] == tables[1]


def test_a_frozen_model_can_be_ranked() -> None:
    prepared, frozen = build(graph=True), build(graph=True)
    for _, quantizer in iter_quantizers(frozen):
        quantizer.freeze()
    tables = [rank_channels(m, labelled(), progress=False) for m in (prepared, frozen)]
    assert tables[0].to_dict() == tables[1].to_dict()
    for (_, a), (_, b) in zip(iter_quantizers(prepared), iter_quantizers(frozen), strict=True):
        assert torch.equal(a.freeze().extra_bits, b.extra_bits)
        assert torch.equal(a.fake_quantize(images(2)[:, :1].expand(2, 6, 6, 6)), b(images(2)[:, :1].expand(2, 6, 6, 6)))


def _pt2e(method: DQA) -> nn.Module:
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    from dqa_plugins.adapters.pt2e import PluginQuantizer
    from tests.matrix import rooms

    dynamic = ({0: torch.export.Dim("batch", min=1, max=1024)},)
    exported = torch.export.export(rooms.net(), (rooms.batches()[0],), dynamic_shapes=dynamic).module()
    prepared = prepare_pt2e(exported, PluginQuantizer(weight_bits=None).set_global(method))
    with torch.no_grad():
        for x in rooms.batches():
            prepared(x)
    return prepared


@pytest.mark.parametrize("room", ["fx", "pt2e", "brevitas", "nncf", "pt2e prepared"])
def test_every_adapter(room: str) -> None:
    """Models of every framework; prepared, converted, or frozen by their calibration."""
    from tests.matrix import rooms

    pytest.importorskip({"fx": "torch", "pt2e": "torchao", "pt2e prepared": "torchao"}.get(room, room))
    method = DQA(bits=2)
    wanted = dict.fromkeys(rooms.SITES.values(), method)
    model = _pt2e(method) if room == "pt2e prepared" else rooms.ROOMS[room](wanted)
    with torch.no_grad():
        batches = [(x, rooms.net()(x).argmax(1)) for x in rooms.batches(3, seed=9)]
    table = rank_channels(model, batches, progress=False)
    assert_same(table, algorithm_3(model, batches), exact=False)
    assert {"relu1", "relu2", "relu3"} <= {layer.name for layer in table}
    again = RankTable.from_dict(table.to_dict())
    again.apply(model, ratio=0.5)
    for _, quantizer in iter_quantizers(model):
        assert int((quantizer.extra_bits > 0).sum()) == round(0.5 * quantizer.num_channels)


def test_metrics() -> None:
    outputs = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    targets = torch.tensor([1, 1])
    assert accuracy(outputs, targets).tolist() == [1.0, 0.0]
    expected = [math.log1p(math.exp(-1)), 3 + math.log1p(math.exp(-3))]
    assert cross_entropy(outputs, targets).tolist() == pytest.approx(expected, abs=1e-12)
    pixels = torch.stack([outputs, outputs], 2)
    assert accuracy(pixels, torch.tensor([[1, 0], [0, 0]])).tolist() == [0.5, 1.0]
    partly = torch.tensor([[1, IGNORED], [IGNORED, IGNORED]])
    assert accuracy(pixels, partly).tolist() == [1.0, 0.0]
    assert cross_entropy(pixels, partly).tolist() == pytest.approx([expected[0], 0.0], abs=1e-12)
    with pytest.raises(InvalidTarget, match=r"class 2, .* 2 classes"):
        accuracy(outputs, torch.tensor([1, 2]))
    with pytest.raises(InvalidTarget, match="class -1"):
        cross_entropy(outputs, torch.tensor([1, -1]))


@pytest.mark.slow
def test_resnet32_has_the_table_of_algorithm_3() -> None:
    """ResNet-32 on digits, a few layers of every depth."""
    from torch.ao.quantization.quantize_fx import prepare_fx

    from dqa_plugins.adapters.fx import get_qconfig, get_qconfig_mapping
    from examples.networks import load
    from examples.networks.digits import calibration_subset, load_split

    network, _ = load("resnet32")
    x, y = calibration_subset(load_split(), 32)
    mapping = get_qconfig_mapping(None)
    for block in (6, 12, 14):
        mapping.set_module_name(f"blocks.{block}.conv1", get_qconfig(DQA(bits=2), weight_bits=None))
    model = prepare_fx(network, mapping, (x[:2],))
    with torch.no_grad():
        model(x)
    table = rank_channels(model, [(x, y)], progress=False)
    assert len(table) >= 3
    assert_same(table, algorithm_3(model, [(x, y)]), exact=False)


def test_tiny_is_what_it_says() -> None:
    model = build(Tiny)
    assert [name for name, _ in iter_quantizers(model)] == ["q1", "q2"]
