"""Which tensors get a quantizer, what it is called, and which axis it takes for channels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from dqa_plugins import DQA, DenseSparse, Direct, NoisyQuant, iter_quantizers
from dqa_plugins.adapters.fx import get_qconfig, get_qconfig_mapping
from tests.nets import build, inputs

SITES = {
    "residual": ["input.0", "relu", "bn2", "relu.1", "fc"],
    "bottleneck": ["input.0", "expand.2", "depth.2", "project.1", "add.0", "head"],
    "concat": ["input.0", "relu.0", "right", "cat.0", "last"],
    "transposed": ["input.0", "relu.0", "second"],
    "tokens": ["input.0", "embed", "norm", "up", "down", "add.0", "head"],
    "two_inputs": ["input.0", "input.1", "image", "vector", "relu.0", "out"],
}


def sites(name: str, method: Any = None) -> list[str]:
    mapping = get_qconfig_mapping(DQA() if method is None else method)
    return [site for site, _ in iter_quantizers(prepare_fx(build(name), mapping, inputs(name)))]


@pytest.mark.parametrize("name", SITES)
def test_sites_have_their_original_names_in_order_of_execution(name: str) -> None:
    found = sites(name)
    assert [s for s in found if s in SITES[name]] == SITES[name]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("name", SITES)
def test_names_and_order_are_the_same_after_convert(name: str) -> None:
    prepared = prepare_fx(build(name), get_qconfig_mapping(DQA()), inputs(name))
    before = [site for site, _ in iter_quantizers(prepared)]
    prepared(*inputs(name))
    assert [site for site, _ in iter_quantizers(convert_fx(prepared))] == before


def test_no_observer_is_left_over_in_a_prepared_model() -> None:
    for name in SITES:
        prepared = prepare_fx(build(name), get_qconfig_mapping(DQA()), inputs(name))
        assert "" not in [q.name for _, q in iter_quantizers(prepared)], name


def test_tokens_have_their_channels_last_and_images_at_axis_one() -> None:
    axes = {
        s: q.channel_axis
        for s, q in iter_quantizers(prepare_fx(build("tokens"), get_qconfig_mapping(DQA()), inputs("tokens")))
    }
    assert axes["embed"] == axes["norm"] == axes["down"] == axes["add.0"] == -1
    axes = {
        s: q.channel_axis
        for s, q in iter_quantizers(prepare_fx(build("concat"), get_qconfig_mapping(DQA()), inputs("concat")))
    }
    assert set(axes.values()) == {1}


def test_channels_of_tokens_are_counted_along_the_last_axis() -> None:
    prepared = prepare_fx(build("tokens"), get_qconfig_mapping(DQA()), inputs("tokens"))
    prepared(*inputs("tokens"))
    quantizers = dict(iter_quantizers(convert_fx(prepared)))
    assert quantizers["embed"].num_channels == 10
    assert int((quantizers["embed"].extra_bits > 0).sum()) == 4


@pytest.mark.parametrize("method", [DQA(), NoisyQuant(amplitude=0.5), Direct(granularity="channel")], ids=str)
def test_a_concatenation_of_8_and_9_channels_gets_a_quantizer_of_its_own(method: Any) -> None:
    prepared = prepare_fx(build("concat"), get_qconfig_mapping(method), inputs("concat"))
    prepared(*inputs("concat"))
    channels = {s: q.num_channels for s, q in iter_quantizers(convert_fx(prepared))}
    assert (channels["relu.0"], channels["right"], channels["cat.0"]) == (8, 9, 17)


def test_a_shared_observer_stays_one_module_and_sees_every_call() -> None:
    prepared = prepare_fx(build("concat"), get_qconfig_mapping(Direct(bits=4)), inputs("concat"))
    prepared(*inputs("concat", batch=4))
    counts = {s: q.calibration.count for s, q in iter_quantizers(prepared)}
    assert max(counts.values()) > 4, counts
    converted = convert_fx(prepared)
    calls = [n.target for n in converted.graph.nodes if n.op == "call_module" and "quantizer" in str(n.target)]
    assert len(calls) > len(set(calls)) == len(list(iter_quantizers(converted)))


def test_moved_and_selected_values_are_not_quantized_again() -> None:
    prepared = prepare_fx(build("concat"), get_qconfig_mapping(DQA()), inputs("concat"))
    producers = [
        n.all_input_nodes[0]
        for n in prepared.graph.nodes
        if n.op == "call_module" and hasattr(prepared.get_submodule(str(n.target)), "quantizer")
    ]
    assert not {getattr(p.target, "__name__", p.target) for p in producers} & {"transpose", "max_pool2d", "flatten"}


def test_a_relu6_is_quantized_behind_not_before() -> None:
    prepared = prepare_fx(build("bottleneck"), get_qconfig_mapping(DQA()), inputs("bottleneck"))
    prepared(*inputs("bottleneck"))
    quantizers = dict(iter_quantizers(convert_fx(prepared)))
    assert not quantizers["expand.2"].signed, "the range before the clamp was taken"
    assert quantizers["project.1"].signed


def test_a_site_name_of_a_fused_module_can_be_configured() -> None:
    mapping = get_qconfig_mapping(DQA(bits=4))
    mapping.set_module_name("depth.2", get_qconfig(DenseSparse(bits=2))).set_module_name("expand.2", None)
    prepared = prepare_fx(build("bottleneck"), mapping, inputs("bottleneck"))
    methods = {s: q.method for s, q in iter_quantizers(prepared)}
    assert methods["depth.2"] == DenseSparse(bits=2)
    assert "expand.2" not in methods


@pytest.mark.parametrize(
    ("skip", "left_out"), [((), set()), (("first", "last"), {"conv1", "fc"}), (("conv2",), {"conv2"})]
)
def test_skip_leaves_layers_float(skip: tuple[str, ...], left_out: set[str]) -> None:
    prepared = prepare_fx(build("residual"), get_qconfig_mapping(DQA(), skip=skip), inputs("residual"))
    prepared(*inputs("residual"))
    converted = convert_fx(prepared)
    kept = {
        name
        for name in ("conv1", "conv2", "fc")
        if not any("reference" in type(m).__module__ for m in converted.get_submodule(name).modules())
    }
    assert kept == left_out
    assert ("fc" in dict(iter_quantizers(converted))) == ("fc" not in left_out)


def test_placing_does_not_touch_the_statistics_of_anything() -> None:
    net = build("concat").train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    prepared = prepare_fx(net.eval(), get_qconfig_mapping(DQA()), inputs("concat"))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(q.calibration.count == 0 for _, q in iter_quantizers(prepared))


def test_example_inputs_that_do_not_run_only_cost_the_separation(caplog: Any) -> None:
    prepared = prepare_fx(build("concat"), get_qconfig_mapping(DQA()), (torch.zeros(1, 1),))
    assert "shapes could not be traced" in caplog.text
    with pytest.raises(ValueError, match="calibrated on"):
        prepared(*inputs("concat"))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 1, 1))
        self.inner = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(nn.functional.conv2d(x, self.weight)) + x.mean(1, keepdim=True)


def test_functional_layers_are_named_by_operation() -> None:
    x = torch.randn(2, 3, 5, 5)
    prepared = prepare_fx(Functional().eval(), get_qconfig_mapping(DQA()), (x,))
    assert [s for s, _ in iter_quantizers(prepared)][:4] == ["input.0", "conv2d.0", "inner", "mean.0"]
