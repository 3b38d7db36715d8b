"""Stored activations in models that the FX and PT2E adapters prepared or converted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.fx import GraphModule

from dqa_plugins import DQA, QPP, ActivationQuantizer, DenseSparse, Direct, NoisyQuant, iter_quantizers
from dqa_plugins.adapters.fx import get_qconfig_mapping
from dqa_plugins.errors import UncalibratedQuantizer
from dqa_plugins.methods import Method
from dqa_plugins.storage import (
    PackedActivation,
    allocate_bits,
    convert_stored,
    prepare_stored,
    storage_report,
    stored_edges,
)
from dqa_plugins.storage.format.errors import NotPackable
from dqa_plugins.storage.model.sites import Pack
from tests.storage.test_pipeline import Net, Skip

torchao = pytest.importorskip("torchao")
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e  # noqa: E402

from dqa_plugins.adapters.pt2e import PluginQuantizer  # noqa: E402


def fx(model: nn.Module, method: Method, x: Tensor) -> tuple[GraphModule, Callable[..., Any]]:
    return prepare_fx(model, get_qconfig_mapping(method), (x,)), convert_fx


def pt2e(model: nn.Module, method: Method, x: Tensor) -> tuple[GraphModule, Callable[..., Any]]:
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    exported = torch.export.export(model, (x,), dynamic_shapes=(batch,)).module()
    return prepare_pt2e(exported, PluginQuantizer().set_global(method)), convert_pt2e


ADAPTERS = {"fx": fx, "pt2e": pt2e}
EDGES = {
    Net: {"relu": (4, 8, 16, 16), "blocks.0.relu2": (4, 8, 8, 8), "blocks.1.relu2": (4, 8, 4, 4),
          "blocks.2.relu2": (4, 8, 4, 4)},
    Skip: {"relu.0": (4, 16, 16, 16)},
}  # fmt: skip
LIFETIMES = {Net: [2, 2, 1, 2], Skip: [1]}


def case(network: type[nn.Module]) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, its calibration input and a fresh one."""
    torch.manual_seed(0)
    channels = 1 if network is Skip else 3
    return network().eval(), torch.randn(4, channels, 16, 16), torch.randn(7, channels, 16, 16)


@pytest.fixture(params=["prepared", "converted", "converted between"])
def moment(request: pytest.FixtureRequest) -> str:
    """When prepare_stored gets the model, and who converts the adapter's part."""
    return str(request.param)


def stored_by(
    adapter: str, network: type[nn.Module], method: Method, moment: str, coding: str = "joint"
) -> tuple[GraphModule, GraphModule, Tensor]:
    """(stored model, the adapter's own converted model, a fresh input)."""
    model, x, fresh = case(network)
    host, convert = ADAPTERS[adapter](model, method, x)
    with torch.no_grad():
        if moment == "converted":
            host(x)
            wanted = convert(host)
            site = prepare_stored(wanted, DQA(bits=2), x)
            site(x)
            return convert_stored(site, coding), wanted, fresh
        site = prepare_stored(host, DQA(bits=2), x)
        host(x)
        site(x)
        if moment == "converted between":
            site = convert(site)
        return convert_stored(site, coding), convert(host), fresh


METHODS = [
    DQA(bits=3),
    DQA(bits=3, qparams="dynamic", granularity="channel"),
    Direct(bits=4, symmetric=False, qparams="dynamic"),
    NoisyQuant(bits=4, amplitude=0.3),
    DenseSparse(bits=3),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{type(m).__name__}-{m.qparams}")
@pytest.mark.parametrize("network", [Net, Skip])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_outputs_equal_those_of_the_adapter(
    adapter: str, network: type[nn.Module], method: Method, moment: str
) -> None:
    stored, wanted, fresh = stored_by(adapter, network, method, moment)
    with torch.no_grad():
        found = stored(fresh)
        assert isinstance(found, Tensor)
        torch.testing.assert_close(found, wanted(fresh), rtol=0, atol=0)


@pytest.mark.parametrize("network", [Net, Skip])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_edges_lifetimes_and_quantizers(adapter: str, network: type[nn.Module], moment: str) -> None:
    stored, wanted, fresh = stored_by(adapter, network, DQA(bits=3), moment)
    edges = stored_edges(stored)
    named = {e.name: e.shape for e in edges}
    assert named == EDGES[network]
    assert [e.lifetime for e in edges] == LIFETIMES[network]
    names = [name for name, _ in iter_quantizers(stored)]
    assert names == [name for name, _ in iter_quantizers(wanted)], "a quantizer was doubled or dropped"
    called = [m for n in stored.graph.nodes if n.op == "call_module" and (m := stored.get_submodule(str(n.target)))]
    quantizers = [m for m in called if isinstance(m, ActivationQuantizer)]
    assert all(m.quantizer in quantizers for m in called if isinstance(m, Pack))
    assert all(m.quantizer.method.bits == 3 for m in called if isinstance(m, Pack))
    with torch.no_grad():
        report = storage_report(stored, fresh)
    wanted_count = sum(torch.Size(shape).numel() for shape in EDGES[network].values()) * len(fresh) // 4
    assert report.elements == wanted_count


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_calibration_sees_every_value_once(adapter: str) -> None:
    model, x, _ = case(Net)
    host, _ = ADAPTERS[adapter](model, DQA(bits=3), x)
    site = prepare_stored(host, DQA(bits=3), x)
    with torch.no_grad():
        host(x)
        site(x)
    counts = {name: q.calibration.count for name, q in iter_quantizers(host)}
    assert {name: q.calibration.count for name, q in iter_quantizers(site)} == counts


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_allocated_bits(adapter: str) -> None:
    """Allocation sets the adapter's own quantizers and leaves the statistics of all others alone."""
    model, x, fresh = case(Net)
    host, _ = ADAPTERS[adapter](model, DQA(bits=4), x)
    site = prepare_stored(host, DQA(bits=4), x)
    with torch.no_grad():
        site(x)
    before = copy.deepcopy({name: q.calibration.count for name, q in iter_quantizers(site)})
    vectors = allocate_bits(site, [x], 2.0)
    assert {name: q.calibration.count for name, q in iter_quantizers(site)} == before
    assert set(vectors) == set(EDGES[Net])
    stored = convert_stored(site, "joint")
    quantizers = dict(iter_quantizers(stored))
    assert all(torch.equal(quantizers[name].extra_bits, vector) for name, vector in vectors.items())
    with torch.no_grad():
        assert stored(fresh).shape == (7, 5)


def test_values_that_the_adapter_left_float_get_a_quantizer() -> None:
    model, x, fresh = case(Net)
    host = prepare_fx(model, get_qconfig_mapping(DQA(bits=3), skip=("blocks.0.relu2",)), (x,))
    site = prepare_stored(host, Direct(bits=5), x)
    with torch.no_grad():
        site(x)
        stored = convert_stored(site)
        stored(fresh)
    methods = {m.edge.name: m.quantizer.method for m in stored.modules() if isinstance(m, Pack)}
    assert methods["blocks.0.relu2"] == Direct(bits=5)
    assert methods["relu"] == DQA(bits=3)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_converted_model_needs_data_for_its_tables(adapter: str) -> None:
    model, x, fresh = case(Net)
    host, convert = ADAPTERS[adapter](model, DQA(bits=3), x)
    with torch.no_grad():
        host(x)
        converted = convert(host)
        site = prepare_stored(converted, DQA(bits=3), x)
        with pytest.raises(UncalibratedQuantizer, match="'relu'"):
            convert_stored(site)
        assert torch.equal(convert_stored(site, "none")(fresh), converted(fresh))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_resizing_is_no_layer(adapter: str) -> None:
    """aten.upsample_bilinear2d is not bilinear: only convolutions and their like count for a lifetime."""

    class Resized(Skip):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.down(x))
            y = torch.relu(self.inner(nn.functional.max_pool2d(x, 2)))
            y = nn.functional.interpolate(y, scale_factor=2.0, mode="bilinear", align_corners=False)
            return self.up(torch.cat([x, y], 1))

    model, x = Resized().eval(), torch.randn(4, 1, 16, 16)
    host, _ = ADAPTERS[adapter](model, DQA(), x)
    assert [e.lifetime for e in stored_edges(prepare_stored(host, DQA(), x))] == [1]


class Pooled(nn.Module):
    """The head of a ResNet: the tensor that waits for the addition is pooled from a quantized one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu, self.pool = nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        self.conv1, self.conv2, self.head = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.stem(x)))
        x = x + self.conv2(self.relu(self.conv1(x)))
        return self.head(x) + self.head(self.conv2(x))


class Reshaped(nn.Module):
    """A quantized tensor that waits in another shape: its channels are no longer where its quantizer had them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.inner = nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Linear(256, 256)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv(x))
        y = x.flatten(2)
        z = x + self.conv(x[:, :3])
        return y + self.inner(y) + self.inner(z.flatten(2))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{type(m).__name__}-{m.qparams}")
@pytest.mark.parametrize("network", [Pooled, Reshaped])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_values_derived_from_a_quantized_one(
    adapter: str, network: type[nn.Module], method: Method, moment: str
) -> None:
    """They get no quantizer of their own: pooled values keep their codes, reshaped ones stay as they are."""
    stored, wanted, fresh = stored_by(adapter, network, method, moment)
    with torch.no_grad():
        torch.testing.assert_close(stored(fresh), wanted(fresh), rtol=0, atol=0)
    if network is Pooled:
        assert (4, 8, 4, 4) in [e.shape for e in stored_edges(stored)]


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("mode", ["paper", "extended"])
def test_predictions_travel_with_the_packed_value(adapter: str, mode: str) -> None:
    """Each sample is packed with the thresholds that its own features predicted; the outputs are those of QPP."""
    torch.manual_seed(0)
    model = Net().eval()
    gains = torch.linspace(0.3, 3, 48).reshape(-1, 1, 1, 1)
    images = torch.rand(48, 3, 16, 16) * gains
    method = DenseSparse(bits=4, density=0.05, qparams=QPP(mode=mode, sites=("input",), augment=False))
    host, convert_host = ADAPTERS[adapter](model, method, images[:4])
    with pytest.raises(NotPackable, match="Convert the model by its adapter first"):
        prepare_stored(host, Direct(), images[:4])
    with torch.no_grad():
        for batch in images.split(16):
            host(batch)
        converted = convert_host(host)
        prepared = prepare_stored(converted, Direct(), images[:4])
        prepared(images[:16])
        stored = convert_stored(prepared)
        packs = [m for m in stored.modules() if isinstance(m, Pack)]
        assert packs
        assert all(pack.quantizer.method.source == "predicted" for pack in packs)
        fresh = torch.rand(9, 3, 16, 16) * gains[::5][:9]
        torch.testing.assert_close(stored(fresh), converted(fresh), rtol=0, atol=0)
        found: list[Tensor] = []
        packs[0].register_forward_hook(
            lambda *a: found.append(PackedActivation.from_bytes(a[2].to_bytes()).unpack())  # no model is needed for it
        )
        twin = next(q for name, q in iter_quantizers(converted) if name == packs[0].quantizer.name)
        twin.register_forward_hook(lambda *a: found.append(a[2]))
        stored(fresh)
        converted(fresh)
    assert torch.equal(*found)
    steps = [sample[sample > 0].min() for sample in found[0]]
    assert max(steps) > 3 * min(steps)  # a step of each sample's own
