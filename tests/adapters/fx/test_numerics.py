"""A site in FX computes what the bare quantizer computes, before and after convert, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx

from dqa_plugins import DQA, ActivationQuantizer, DenseSparse, Direct, NoisyQuant, iter_quantizers
from dqa_plugins.adapters.fx import get_qconfig, get_qconfig_mapping
from tests.nets import NETS, build, inputs

METHODS = [
    Direct(bits=4),
    Direct(bits=8, symmetric=False),
    Direct(bits=3, granularity="channel", clip=0.99),
    DQA(bits=3),
    DQA(bits=2, granularity="channel", clip="mse"),
    NoisyQuant(bits=4, amplitude=0.4),
    DenseSparse(bits=3, density=0.05),
]
BOTH = [m.replace(qparams=q) for m in METHODS for q in ("static", "dynamic")]


def prepare(name: str, method: Any, **options: Any) -> Any:
    prepared = prepare_fx(build(name), get_qconfig_mapping(method, **options), inputs(name))
    with torch.no_grad():
        for seed in (1, 2, 3):
            prepared(*inputs(name, seed=seed))
    return prepared


def record(model: nn.Module, name: str, seed: int) -> dict[ActivationQuantizer, list[tuple[Any, Any]]]:
    calls: dict[ActivationQuantizer, list[tuple[Any, Any]]] = {q: [] for _, q in iter_quantizers(model)}
    hooks = [q.register_forward_hook(lambda q, a, y: calls[q].append((a[0], y))) for q in calls]
    with torch.no_grad():
        model(*inputs(name, seed=seed))
    for hook in hooks:
        hook.remove()
    return calls


@pytest.mark.parametrize("method", BOTH, ids=str)
@pytest.mark.parametrize("name", ["residual", "tokens"])
def test_every_site_equals_a_bare_quantizer_calibrated_on_the_same_tensors(name: str, method: Any) -> None:
    prepared = prepare_fx(build(name), get_qconfig_mapping(method), inputs(name))
    bare = {
        site: ActivationQuantizer(method, name=site, producer_axis=q.producer_axis)
        for site, q in iter_quantizers(prepared)
    }
    for seed in (1, 2, 3):
        for quantizer, calls in record(prepared, name, seed).items():
            for x, y in calls:
                assert y is x, "a prepared model must be the float model"
                bare[quantizer.name](x)
    converted = convert_fx(prepared)
    sites = dict(iter_quantizers(converted))
    assert list(sites) == list(bare)
    for site, quantizer in bare.items():
        quantizer.freeze()
        assert quantizer.state_dict().keys() == sites[site].state_dict().keys()
        calls = record(converted, name, 9)[sites[site]]
        assert calls, f"{site} is never called"
        for x, y in calls:
            assert torch.equal(quantizer(x), y), site
            assert not torch.equal(x, y), f"{site} does not quantize"


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("method", [DQA(bits=3), DenseSparse(bits=3, qparams="dynamic")], ids=str)
def test_all_networks_convert_and_stay_near_float(name: str, method: Any) -> None:
    x = inputs(name, seed=2)
    with torch.no_grad():
        expected, got = build(name)(*x), convert_fx(prepare(name, method.replace(bits=8)))(*x)
    assert 0 < (got - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("method", BOTH, ids=str)
def test_deepcopy_and_state_dict_of_a_prepared_model_convert_to_the_same_model(method: Any) -> None:
    prepared = prepare("residual", method)
    twin = copy.deepcopy(prepared)
    fresh = prepare_fx(build("residual"), get_qconfig_mapping(method), inputs("residual"))
    fresh.load_state_dict(prepared.state_dict())
    x = inputs("residual", seed=7)
    with torch.no_grad():
        expected = convert_fx(prepared)(*x)
        assert torch.equal(convert_fx(twin)(*x), expected)
        assert torch.equal(convert_fx(fresh)(*x), expected)


@pytest.mark.parametrize("convert", [convert_to_reference_fx, lambda p: convert_fx(p, _remove_qconfig=False)])
def test_other_ways_to_convert_keep_every_quantizer(convert: Any) -> None:
    prepared = prepare("residual", DQA(bits=3))
    expected = convert_fx(copy.deepcopy(prepared))
    converted = convert(prepared)
    x = inputs("residual", seed=7)
    with torch.no_grad():
        assert torch.equal(converted(*x), expected(*x))
    assert [n for n, _ in iter_quantizers(converted)] == [n for n, _ in iter_quantizers(expected)]


def test_a_converted_model_saves_loads_and_copies_exactly(tmp_path: Any) -> None:
    converted = convert_fx(prepare("residual", DQA(bits=3)))
    other = convert_fx(prepare("residual", DQA(bits=3, ratio=0.4)))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    torch.save(converted.state_dict(), tmp_path / "w.pt")
    other.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True))
    x = inputs("residual", seed=7)
    with torch.no_grad():
        assert torch.equal(other(*x), converted(*x))
        assert torch.equal(copy.deepcopy(converted)(*x), converted(*x))


def test_dynamic_samples_do_not_depend_on_their_batch() -> None:
    converted = convert_fx(prepare("concat", DQA(bits=3, qparams="dynamic")))
    (x,) = inputs("concat", batch=6)
    calls: dict[str, list[Any]] = {}
    for batch in (x, x[2:3]):
        for quantizer, seen in record_batch(converted, batch).items():
            calls.setdefault(quantizer.name, []).append((quantizer, seen[0][0]))
    for site, ((quantizer, whole), (_, alone)) in calls.items():
        both = quantizer.runtime_qparams(whole)[0], quantizer.runtime_qparams(whole[2:3])[0]
        assert torch.equal(both[0][2:3], both[1]), site
        torch.testing.assert_close(whole[2:3], alone, rtol=1e-4, atol=1e-5)


def record_batch(model: nn.Module, batch: torch.Tensor) -> dict[ActivationQuantizer, list[Any]]:
    calls: dict[ActivationQuantizer, list[Any]] = {q: [] for _, q in iter_quantizers(model)}
    hooks = [q.register_forward_hook(lambda q, a, y: calls[q].append((a[0], y))) for q in calls]
    with torch.no_grad():
        model(batch)
    for hook in hooks:
        hook.remove()
    return calls


def test_methods_bit_widths_and_float_layers_mix_in_one_model() -> None:
    mapping = (
        get_qconfig_mapping(DQA(bits=3))
        .set_module_name("conv2", get_qconfig(NoisyQuant(bits=5, amplitude=0.3)))
        .set_module_name_regex("fc.*", None)
        .set_object_type(nn.AdaptiveAvgPool2d, get_qconfig(DenseSparse(bits=2)))
    )
    prepared = prepare_fx(build("residual"), mapping, inputs("residual"))
    prepared(*inputs("residual"))
    methods = {name: q.method for name, q in iter_quantizers(convert_fx(prepared))}
    assert methods == {
        "input.0": DQA(bits=3),
        "relu": DQA(bits=3),
        "bn2": NoisyQuant(bits=5, amplitude=0.3),
        "relu.1": DQA(bits=3),
    } | {k: v for k, v in methods.items() if k == "pool"}


def test_a_stock_qconfig_keeps_working_beside_ours() -> None:
    from torch.ao.quantization import get_default_qconfig

    mapping = get_qconfig_mapping(DQA(bits=4)).set_module_name("fc", get_default_qconfig("x86"))
    prepared = prepare_fx(build("residual"), mapping, inputs("residual"))
    prepared(*inputs("residual"))
    converted = convert_fx(prepared)
    assert "bn2" in dict(iter_quantizers(converted))
    assert any("quantize_per_tensor" in str(node.target) for node in converted.graph.nodes)


@pytest.mark.parametrize("layout", ["channels_last", "non_contiguous", "batch_of_one"])
def test_memory_layouts_and_a_batch_of_one_just_work(layout: str) -> None:
    converted = convert_fx(prepare("concat", DQA(bits=3)))
    (x,) = inputs("concat")
    with torch.no_grad():
        expected = converted(x)
        other = {
            "channels_last": x.to(memory_format=torch.channels_last),
            "non_contiguous": torch.stack([x, x], -1)[..., 0],
            "batch_of_one": x[:1],
        }[layout]
        torch.testing.assert_close(converted(other), expected[: len(other)], rtol=0, atol=0.2)
