"""taylor, error and random; arguments that cannot be used."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dqa_plugins import DQA, ActivationQuantizer, Direct, iter_quantizers, rank_channels
from dqa_plugins.errors import InvalidArgument, UncalibratedQuantizer, UnsupportedCombination, UnsupportedInput
from dqa_plugins.ranking import MetricError, RankingError
from tests.nets import build as build_net
from tests.nets import inputs as net_inputs

from .models import InPlace, Mixing, Segments, Tiny, Twice, build, images, labelled
from .reference import direct


def channel_changes(model: nn.Module, batches: list[Any]) -> dict[str, Tensor]:
    """Squared first-order loss change, sample by sample, by autograd on a delta added to the activation."""
    quantizers = dict(iter_quantizers(model))
    totals = {name: torch.zeros(6, dtype=torch.float64) for name in quantizers}
    samples = 0
    for x, y in batches:
        for i in range(len(x)):
            samples += 1
            steps: dict[str, Tensor] = {}
            errors: dict[str, Tensor] = {}

            def hook(q: ActivationQuantizer, _: Any, value: Tensor, steps: Any = steps, errors: Any = errors) -> Tensor:
                name = next(n for n, other in quantizers.items() if other is q)
                errors[name] = value.detach() - direct(q, value.detach())
                steps[name] = torch.zeros_like(value, requires_grad=True)
                return value.detach() * 0 + value + steps[name]

            for q in quantizers.values():
                q.forward = lambda value: value  # type: ignore[method-assign]
            handles = [q.register_forward_hook(hook) for q in quantizers.values()]
            loss = nn.functional.cross_entropy(model(x[i : i + 1]).double(), y[i : i + 1])
            loss.backward()
            for name in quantizers:
                change = (errors[name].double() * steps[name].grad.double()).sum((0, 2, 3))
                totals[name] += change.square()
            for handle in handles:
                handle.remove()
    return {name: total / samples for name, total in totals.items()}


def test_taylor_is_the_squared_first_order_change() -> None:
    model, reference = build(), build()
    for _, quantizer in iter_quantizers(reference):
        quantizer.freeze()
    table = rank_channels(model, labelled((5, 3)), "taylor", progress=False)
    expected = channel_changes(reference, labelled((5, 3)))
    for layer in table:
        assert list(layer.scores) == pytest.approx(expected[layer.name].tolist(), rel=1e-4, abs=1e-12)
        assert list(layer.order) == sorted(range(6), key=lambda c: (-layer.scores[c], c))
        assert layer.losses is None


@pytest.mark.parametrize("kind", [Twice, Mixing])
@pytest.mark.parametrize("graph", [True, False])
def test_taylor_runs_on_awkward_models(kind: Any, graph: bool) -> None:
    table = rank_channels(build(kind, graph=graph), labelled(), "taylor", progress=False)
    assert all(max(layer.scores) > 0 for layer in table)


def test_taylor_of_a_model_without_a_backward_pass() -> None:
    with pytest.raises(RankingError, match="in place"):
        rank_channels(build(InPlace), labelled(), "taylor", progress=False)


def test_taylor_of_a_metric() -> None:
    """A differentiable metric is the loss; one without a gradient is refused."""
    model = build(graph=True)
    entropy = rank_channels(model, labelled(), "taylor", progress=False)
    same = rank_channels(
        model,
        labelled(),
        "taylor",
        metric=lambda z, t: -nn.functional.cross_entropy(z.double(), t, reduction="none"),
        progress=False,
    )
    assert same.layers == entropy.layers
    with pytest.raises(MetricError, match="gradient"):
        rank_channels(model, labelled(), "taylor", metric=lambda z, t: (z.argmax(1) == t).float(), progress=False)
    with pytest.raises(MetricError, match="neither"):
        rank_channels(model, [(images(4), images(4))], "taylor", progress=False)


def test_taylor_of_segmentation_and_inference_mode() -> None:
    batches = labelled(pixels=True)
    model = build(Segments, graph=True)
    plain = rank_channels(model, batches, "taylor", progress=False)
    with torch.inference_mode():
        again = rank_channels(model, labelled(pixels=True), "taylor", progress=False)
    assert plain == again


@pytest.mark.parametrize(
    "method", [DQA(bits=2), DQA(bits=3, qparams="dynamic", granularity="channel"), DQA(clip="mse")]
)
def test_error_is_what_an_unranked_quantizer_uses(method: DQA) -> None:
    model, plain = build(method=method), build(method=method)
    table = rank_channels(model, strategy="error", progress=False)
    for (name, ranked), (_, unranked) in zip(iter_quantizers(model), iter_quantizers(plain), strict=True):
        assert torch.equal(ranked.freeze().extra_bits, unranked.freeze().extra_bits)
        assert len(table[name].scores) == 6


@pytest.mark.parametrize("converted", [True, False])
def test_predictions_reach_every_strategy(converted: bool) -> None:
    """Where the graph hands a quantizer its predicted qparams, the strategies quantize with those."""
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    from dqa_plugins import QPP
    from dqa_plugins.adapters.fx import get_qconfig_mapping

    mapping = get_qconfig_mapping(DQA(bits=2, qparams=QPP(mode="paper", sites=("input",))), weight_bits=None)
    x = net_inputs("residual", batch=40)
    model = prepare_fx(build_net("residual"), mapping, x)
    with torch.no_grad():
        model(*x)
        batches = [(x, build_net("residual")(*x).argmax(1))]
    strategies: tuple[Any, ...] = ("taylor", "error", "greedy")
    found = [
        rank_channels(convert_fx(copy.deepcopy(model)), batches, strategy, progress=False) for strategy in strategies
    ]
    if not converted:
        prepared = [rank_channels(model, batches, strategy, progress=False) for strategy in strategies]
        assert [t.layers for t in prepared[::2]] == [t.layers for t in found[::2]]
    assert all(max(layer.scores) > 0 for table in found for layer in table)


def test_error_of_a_frozen_model_needs_batches() -> None:
    """Its calibration values are gone; the same data again gives the same errors (all of it was kept: 24 samples)."""
    model, frozen = build(), build()
    for _, quantizer in iter_quantizers(frozen):
        quantizer.freeze()
    with pytest.raises(RankingError, match="frozen"):
        rank_channels(frozen, strategy="error", progress=False)
    table = rank_channels(frozen, [(images(24, seed=5), None)], "error", progress=False)
    expected = rank_channels(model, strategy="error", progress=False)
    for layer in table:
        assert list(layer.scores) == pytest.approx(list(expected[layer.name].scores), rel=1e-6)


def test_random_depends_on_the_seed_and_the_name_alone() -> None:
    first = rank_channels(build(), strategy="random", seed=1, progress=False)
    torch.rand(7)
    assert rank_channels(build(graph=True), strategy="random", seed=1, progress=False) == first
    assert rank_channels(build(), strategy="random", seed=2, progress=False).layers != first.layers
    assert first["q1"].order != first["q2"].order


def test_arguments() -> None:
    model = build()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"strategy": "best"}, "strategy='best'"),
        ({}, "needs batches"),
        ({"batches": []}, "got no batches"),
        ({"batches": images(4)}, r"got a Tensor of shape \(4,.*give \[batch\]"),
        ({"batches": [images(4)]}, r"batch 0 is a Tensor.*\[\(inputs, targets\)\]"),
        ({"batches": [(images(4), 1, 2)]}, "batch 0"),
        ({"batches": labelled(), "memory": 0}, "memory=0"),
        ({"batches": [*labelled(), (images(0), torch.empty(0))]}, "batch 3 holds no samples"),
        ({"batches": [((images(0),), torch.empty(0))], "strategy": "taylor"}, "batch 0 holds no samples"),
        ({"batches": [({"x": images(0)}, None)]}, "batch 0 holds no samples"),
        ({"batches": labelled(), "strategy": "taylor", "checkpoint": "x"}, "checkpoint"),
    ]
    for arguments, message in cases:
        with pytest.raises((RankingError, InvalidArgument, UnsupportedInput, UncalibratedQuantizer), match=message):
            rank_channels(model, progress=False, **arguments)


def test_models_that_cannot_be_ranked() -> None:
    with pytest.raises(UnsupportedCombination, match=r"'q1'.*no important channels"):
        rank_channels(build(method=Direct(bits=3)), labelled(), progress=False)
    with pytest.raises(RankingError, match="no ActivationQuantizer"):
        rank_channels(nn.Linear(2, 2), labelled(), progress=False)
    with pytest.raises(UncalibratedQuantizer, match="'q1'"):
        rank_channels(Tiny(DQA()), labelled(), strategy="random", progress=False)
    training = build()
    training.q1.start_qat()
    with pytest.raises(UnsupportedCombination, match=r"'q1'.*qat"):
        rank_channels(training, labelled(), progress=False)
    twins = build()
    twins.q1.name = twins.q2.name = "same"
    with pytest.raises(RankingError, match="'same'"):
        rank_channels(twins, labelled(), progress=False)


@pytest.mark.parametrize("graph", [True, False])
def test_metrics_that_cannot_be_used(graph: bool) -> None:
    batches = labelled()
    cases: list[tuple[Any, str]] = [
        (lambda z, t: z.mean(), r"'q1'.*shape \(20,\)"),
        (lambda z, t: 0.5, "returned a float"),
        (lambda z, t: torch.ones(3), r"shape \(3,\)"),
        (lambda z, t: z[:, 0] * float("nan"), "NaN or Inf"),
    ]
    for metric, message in cases:
        with pytest.raises(MetricError, match=message):
            rank_channels(build(graph=graph), batches, metric=metric, progress=False)
    with pytest.raises(MetricError, match="Give metric="):
        rank_channels(build(graph=graph), [(images(4), images(4))], progress=False)
