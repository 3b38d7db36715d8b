"""The contract of a room (docs/adding_a_framework.md), once for all of them.

A new room is a line in ROOMS and one in UNCALIBRATED; what its host forces is listed in DIFFERENCES.
"""

from __future__ import annotations

import copy
import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dqa_plugins import DQA, ActivationQuantizer, DenseSparse, Direct, Method, iter_quantizers
from dqa_plugins.errors import DQAError, DQAWarning, UncalibratedQuantizer, UnsupportedInput
from tests.adapters.networks import NETWORKS, Branches, batches, build
from tests.graph import nets

ROOMS = ("fx", "pt2e", "brevitas", "nncf")

# {(room, network): ({site: channel axis} that it has besides, sites that it lacks, why the host forces it)}.
# Nothing at present: the rooms' place.py say where hosts differ on networks that are not among these.
DIFFERENCES: dict[tuple[str, str], tuple[dict[str, int], set[str], str]] = {}

# Hosts that transform what is calibrated: the same tensors only to rounding.
ROUNDED = {
    "residual": "FX and PT2E fold batch norms",
    "attention": "NNCF runs MultiheadAttention operation by operation",
    "recurrent": "PT2E decomposes the LSTM",
}

METHOD = DQA(bits=6, ratio=0.5)


def quantize_model(room: str) -> Callable[..., nn.Module]:
    pytest.importorskip({"fx": "torch", "pt2e": "torchao"}.get(room, room))
    found: Callable[..., nn.Module] = importlib.import_module(f"dqa_plugins.adapters.{room}").quantize_model
    return found


@functools.cache
def quantized(room: str, network: str) -> nn.Module:
    return quantize_model(room)(build(network), METHOD, batches(network))


@functools.cache
def other(room: str, network: str) -> nn.Module:
    """The same network from other data."""
    return quantize_model(room)(build(network), METHOD, batches(network, seed=5, scale=2.0))


def sites(model: nn.Module) -> dict[str, ActivationQuantizer]:
    return dict(iter_quantizers(model))


def output(model: nn.Module, network: str) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(batches(network, 1, seed=9)[0])
    return found


def probe(site: ActivationQuantizer, network: str) -> Tensor:
    """A tensor with as many channels as the site has."""
    channels = site.extra_bits.numel()
    shape = (3, channels, 5, 5) if site.channel_axis == 1 else (3, 5, channels)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 2


every = pytest.mark.parametrize(
    ("room", "network"),
    [
        pytest.param(room, network, marks=pytest.mark.xdist_group(f"conformance-{room}"), id=f"{room}-{network}")
        for room in ROOMS
        for network in NETWORKS
    ],
)
rooms = pytest.mark.parametrize(
    "room", [pytest.param(room, marks=pytest.mark.xdist_group(f"conformance-{room}")) for room in ROOMS]
)


@every
def test_the_same_sites_with_the_same_channel_axes(room: str, network: str) -> None:
    extra, missing, _ = DIFFERENCES.get((room, network), ({}, set(), ""))
    expected = {name: axis for name, axis in NETWORKS[network][2].items() if name not in missing}
    found = [(name, site.channel_axis) for name, site in iter_quantizers(quantized(room, network))]
    assert dict(found) == expected | extra
    assert len(found) == len(dict(found)), "two sites have one name"
    assert [name for name, _ in found if name not in extra] == list(expected), "another order"


@every
def test_every_quantizer_is_frozen_and_runs(room: str, network: str) -> None:
    model = quantized(room, network)
    assert {site.state for site in sites(model).values()} == {"frozen"}
    called: list[str] = []
    hooks = [s.register_forward_hook(lambda _m, _a, _y, n=n: called.append(n)) for n, s in iter_quantizers(model)]
    found = output(model, network)
    for hook in hooks:
        hook.remove()
    assert set(called) == set(sites(model))
    exact = output(build(network), network)
    assert 0 < float((found - exact).norm() / exact.norm()) < 0.3


@every
def test_a_site_fed_the_identical_tensor_gives_the_identical_output(room: str, network: str) -> None:
    """What FX's site gives, where the calibrated tensors are the same, and a bare quantizer with its state."""
    reference = sites(quantized("fx", network))
    for name, site in iter_quantizers(quantized(room, network)):
        x = probe(site, network)
        bare = ActivationQuantizer(site.method, name=name, producer_axis=site.producer_axis)
        bare.load_state_dict(site.state_dict())
        assert torch.equal(site(x), bare(x)), name
        if network not in ROUNDED and name in reference:
            assert torch.equal(site(x), reference[name](x)), name


@every
def test_a_deepcopy_and_a_state_dict_compute_the_same(room: str, network: str) -> None:
    model, expected = quantized(room, network), output(quantized(room, network), network)
    assert torch.equal(output(copy.deepcopy(model), network), expected)
    loaded = copy.deepcopy(other(room, network))
    assert not torch.equal(output(loaded, network), expected)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(output(loaded, network), expected)


@pytest.mark.parametrize("name", nets.NETS)
@rooms
def test_harder_networks(room: str, name: str) -> None:
    """Masks, norms written out, positions, writes through views: FX's sites and axes, outputs near float."""
    found = []
    for where in ("fx", room):
        model: Any = quantize_model(where)(nets.build(name), Direct(bits=8), [nets.inputs(name)])
        found.append([(n, s.channel_axis) for n, s in iter_quantizers(model)])
    assert found[0] == found[1]
    with torch.no_grad():
        expected = nets.build(name)(*nets.inputs(name))
        assert 0 < float((model(*nets.inputs(name)) - expected).norm() / expected.norm()) < 0.03


@rooms
def test_methods_by_site_and_by_module(room: str) -> None:
    named: dict[str, Method | None] = {
        "": Direct(bits=8),
        "relu.0": DenseSparse(bits=4),
        "right": None,
        "join": Direct(bits=5),
        "input": DQA(bits=3),
    }
    model = quantize_model(room)(build("branches"), named, batches("branches"))
    found = {name: site.method for name, site in iter_quantizers(model)}
    assert found["relu.0"] == DenseSparse(bits=4)
    assert found["join"] == Direct(bits=5)
    assert found["input.0"] == DQA(bits=3)
    assert found["cat.0"] == Direct(bits=8)
    assert "right" not in found


@rooms
def test_what_a_mapping_does_not_name_stays_float(room: str) -> None:
    model = quantize_model(room)(build("branches"), {"relu.0": METHOD}, batches("branches"))
    assert list(sites(model)) == ["relu.0"]


class Flat(nn.Module):
    """A flatten between what makes and what reads a tensor. (B, 3, 8, 8) -> (B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.flatten, self.fc = nn.Conv2d(3, 4, 3), nn.AvgPool2d(6), nn.Flatten(), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flatten(self.pool(self.conv(x))))


@rooms
def test_every_site_by_its_own_name(room: str) -> None:
    """Also behind a flatten, which nobody names: it hands on what is quantized already."""
    run, data = quantize_model(room), [torch.rand(4, 3, 8, 8)]
    names = list(sites(run(Flat().eval(), METHOD, data)))
    mixed = {name: DQA(bits=4) if k % 2 else Direct(bits=6) for k, name in enumerate(names)}
    found = sites(run(Flat().eval(), mixed, data))
    assert {name: site.method for name, site in found.items()} == mixed


@rooms
def test_float_weights(room: str) -> None:
    model = quantize_model(room)(build("branches"), {"relu.0": Direct(bits=8)}, batches("branches"), weight_bits=None)
    site, exact = sites(model)["relu.0"], build("branches")
    with torch.no_grad():
        x = batches("branches", 1, seed=9)[0]
        expected = exact.join(torch.cat([site(exact.left(x).relu()), exact.right(x)], 1))
        assert torch.allclose(model(x), expected, atol=1e-6)


@rooms
def test_an_unknown_name_is_said(room: str) -> None:
    run = quantize_model(room)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            run(build("branches"), {"": METHOD, "rihgt": None}, batches("branches"))
            said = [str(w.message) for w in caught if issubclass(w.category, DQAWarning)]
        except DQAError as error:
            said = [str(error)]
    assert any("rihgt" in text for text in said), said


@rooms
def test_items_of_every_form(room: str) -> None:
    run, data = quantize_model(room), batches("branches")
    plain = sites(run(build("branches"), METHOD, data))
    items = [(x,) for x in data], [[x] for x in data], [{"x": x} for x in data]
    for form in items:
        found = sites(run(build("branches"), METHOD, iter(form)))
        assert {n: s.scale.item() for n, s in found.items()} == {n: s.scale.item() for n, s in plain.items()}
    labelled = [(x, torch.zeros(4)) for x in data]
    for settled in ({}, {"inputs": lambda item: item[0]}):
        found = sites(run(build("branches"), METHOD, labelled, **settled))
        assert {n: s.scale.item() for n, s in found.items()} == {n: s.scale.item() for n, s in plain.items()}
    with pytest.raises(UncalibratedQuantizer, match="no batches"):
        run(build("branches"), METHOD, [])


@rooms
def test_a_quantized_model_is_not_quantized_again(room: str) -> None:
    with pytest.raises(UnsupportedInput, match=r"quantized already \('input\.0'.*float model again"):
        quantize_model(room)(quantized(room, "branches"), METHOD, batches("branches"))


@rooms
def test_the_float_model_is_left_alone(room: str) -> None:
    model = build("residual")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantize_model(room)(model, METHOD, batches("residual"))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert type(model.relu1) is nn.ReLU


# ---------------------------------------------------------------- quantizers that saw no data


class Early(Branches):
    """Leaves before the last site once it has run often enough: hosts that run eagerly see it in their graph."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return super().forward(x) if self.runs <= 3 else self.right(x)


def _fx() -> None:
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    from dqa_plugins.adapters.fx import get_qconfig_mapping

    convert_fx(prepare_fx(build("branches"), get_qconfig_mapping(METHOD), (batches("branches")[0],)))


def _pt2e() -> None:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    from dqa_plugins.adapters.pt2e import PluginQuantizer

    exported = torch.export.export(build("branches"), (batches("branches")[0],)).module()
    convert_pt2e(prepare_pt2e(exported, PluginQuantizer().set_global(METHOD)))


def _brevitas() -> None:
    from dqa_plugins.adapters.brevitas import substitute_layers

    substitute_layers(build("squeeze"), {nn.ReLU6: METHOD})(batches("squeeze")[0])


def _nncf() -> None:
    quantize_model("nncf")(Early().eval(), METHOD, batches("branches"))


UNCALIBRATED = {"fx": _fx, "pt2e": _pt2e, "brevitas": _brevitas, "nncf": _nncf}


@rooms
def test_a_quantizer_that_saw_no_data_raises_by_name(room: str) -> None:
    quantize_model(room)
    with pytest.raises(UncalibratedQuantizer, match=r"'(input\.0|act|relu\.0)'"):
        UNCALIBRATED[room]()
