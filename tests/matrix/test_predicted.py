"""QPP across a network: features of one site, notes of the quantizers before, the same in every adapter."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dqa_plugins import QPP, ActivationQuantizer, DenseSparse, Direct, iter_quantizers
from dqa_plugins.export import compare_backends, to_exported_program
from dqa_plugins.export.runners import Target, compiled
from dqa_plugins.methods import Method
from dqa_plugins.qpp import qpp_report
from dqa_plugins.qpp.features import channel_features, mean_of, sum_of
from tests.matrix.rooms import METHODS, ROOMS, SITES, batches, net
from tests.qpp.connected import calibrate_connected

QPPS = {
    "paper": QPP(mode="paper", sites=("input",)),
    "extended": QPP(),
    "sites": QPP(sites=("input", "relu3"), augment=False),
}


def wanted(name: str) -> dict[str, Method]:
    return {SITES[method]: METHODS[method].replace(qparams=QPPS[name]) for method in METHODS}


@functools.cache
def converted(adapter: str, name: str) -> nn.Module:
    return ROOMS[adapter](wanted(name))


@functools.cache
def by_hand(name: str) -> nn.Module:
    """The network with quantizers placed and connected without an adapter."""
    model, quantizers = net(), []
    for site, method in wanted(name).items():
        quantizers.append(ActivationQuantizer(method, name=site, index=len(quantizers)))
        setattr(model, site, nn.Sequential(getattr(model, site), quantizers[-1]))
    calibrate_connected(model, quantizers, batches())
    return model


def activations(model: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Site -> what went in and what came out."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def note(module: Any, args: Any, y: Tensor) -> None:
        found[module.name] = (args[0], y)

    hooks = [quantizer.register_forward_hook(note) for _, quantizer in iter_quantizers(model)]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


def group(adapter: str) -> Any:
    return pytest.param(adapter, marks=pytest.mark.xdist_group(f"matrix-{adapter}"))


@pytest.mark.parametrize("name", QPPS)
@pytest.mark.parametrize("adapter", [group("brevitas"), group("nncf")])
def test_hooked_adapters_equal_the_network_connected_by_hand(adapter: str, name: str) -> None:
    x = batches(1, 5, 17)[0]
    found, expected = activations(converted(adapter, name), x), activations(by_hand(name), x)
    for site, (before, after) in expected.items():
        assert torch.equal(found[site][0], before)
        assert torch.equal(found[site][1], after)
        assert not torch.equal(before, after)


@pytest.mark.xdist_group("matrix-fx")
@pytest.mark.parametrize("name", QPPS)
def test_graph_adapters_equal_each_other(name: str) -> None:
    """Both also quantize what the first convolution reads (`stem`), so they differ from the other two."""
    x = batches(1, 5, 17)[0]
    fx, pt2e = (activations(converted(adapter, name), x) for adapter in ("fx", "pt2e"))
    assert list(fx) == list(pt2e) == ["stem", "relu1", "relu2", "relu3", "relu4"]
    for site in fx:
        assert torch.equal(fx[site][1], pt2e[site][1])


@pytest.mark.xdist_group("matrix-fx")
@pytest.mark.parametrize("adapter", ["fx", "pt2e"])
def test_one_predictor_node_per_site(adapter: str) -> None:
    model = converted(adapter, "sites")
    targets = [str(node.target) for node in model.graph.nodes if node.op == "call_module"]
    assert [t for t in targets if t.startswith("predictor_")] == ["predictor_input_0", "predictor_relu3"]
    predictions = [t for t in targets if t.endswith((".predictor", ".predictor.own"))]
    assert len(predictions) == 5
    calls = [node for node in model.graph.nodes if isinstance(_module(model, node), ActivationQuantizer)]
    assert all(len(node.args) == 2 for node in calls)
    assert not any("qpp_start" in t for t in targets)


def _module(model: nn.Module, node: Any) -> nn.Module | None:
    return model.get_submodule(str(node.target)) if node.op == "call_module" else None


@pytest.mark.parametrize("name", QPPS)
@pytest.mark.parametrize("adapter", [group(adapter) for adapter in ROOMS])
def test_deepcopy_export_and_report(adapter: str, name: str) -> None:
    model, x = converted(adapter, name), batches(1, 4, 29)[0]
    with torch.no_grad():
        y = _tensor(model(x))
        assert torch.equal(_tensor(copy.deepcopy(model)(x)), y)
        program = to_exported_program(model, (x,)).module()
        assert torch.equal(_tensor(program(x)), y)
        doubled = _tensor(program(torch.cat([x, x])))
    torch.testing.assert_close(doubled, torch.cat([y, y]))
    report = qpp_report(model, [x])
    assert [layer.site for layer in report.layers][-4:] == list(SITES.values())
    assert not any(layer.reason for layer in report.layers)


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else value.value


@pytest.mark.slow
@pytest.mark.xdist_group("matrix-fx")
@pytest.mark.parametrize(("name", "backend"), [("sites", "onnxruntime"), ("paper", "torch.compile")])
def test_a_backend_makes_the_same_predictions(name: str, backend: str) -> None:
    """The predictors are part of the exported network; the sites alone are cells of test_matrix."""
    for found in compare_backends(converted("fx", name), batches(1, 8, 23)[0], backends=[backend]):
        assert found.max_difference <= 1e-5, str(found)
        assert found.share_off == 0, str(found)
        assert found.network.only_ties, str(found)
        assert found.network.max_difference <= 1e-5, str(found)


@functools.cache
def bent(method: Method) -> nn.Module:
    """Enough samples for radial basis functions, and biases that set a floor to the thresholds."""
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    from dqa_plugins.adapters.fx import get_qconfig_mapping

    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU())
    torch.manual_seed(3)
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.weight, std=0.4)
        nn.init.normal_(layer.bias)
    prepared = prepare_fx(model.eval(), get_qconfig_mapping(method, weight_bits=None), (batches()[0],))
    with torch.no_grad():
        for x in batches(8):
            prepared(dimmed(x))
    return convert_fx(prepared)


def dimmed(x: Tensor) -> Tensor:
    """Light from 1 to 1 / 30."""
    return x.abs() * torch.logspace(0, -1.5, len(x)).reshape(-1, 1, 1, 1)


@pytest.mark.slow
@pytest.mark.xdist_group("matrix-fx")
@pytest.mark.parametrize(
    ("method", "backend"),
    [
        (DenseSparse(density=0.05, qparams=QPP(sites=("input",))), "onnxruntime"),
        (Direct(granularity="channel", qparams=QPP(sites=("input",))), "openvino"),
    ],
)
def test_radial_basis_functions_are_exported(method: Method, backend: str) -> None:
    model, x = bent(method), dimmed(batches(1, 8, 23)[0])
    predictors = [quantizer.predictor for _, quantizer in iter_quantizers(model)]
    assert any(predictor is not None and len(predictor.centres) > 0 for predictor in predictors)
    for found in compare_backends(model, x, backends=[backend]):
        assert found.share_off == 0, str(found)
        assert found.max_difference <= 1e-5, str(found)
        assert found.network.only_ties, str(found)
        assert found.network.samples_touched <= 0.25, str(found)


class Reductions(nn.Module):
    """Channel features, then a regression with several outputs: reductions with vectors right behind them."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight, self.bias = torch.rand(6, 10, generator=generator).double(), torch.rand(6, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        known = channel_features(x, 1)
        return sum_of(known.unsqueeze(1) * self.weight) + self.bias.double() + mean_of(x.flatten(1)).unsqueeze(1)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_reductions_and_the_vectors_behind_them(backend: str) -> None:
    """OpenVINO pairs a vector with the wrong dimension behind a reduction that drops one; not where it is kept."""
    model, x = Reductions(), torch.rand(16, 5, 12, 12, generator=torch.Generator().manual_seed(1))
    for _, run in compiled(backend, Target(model, (x,))):
        torch.testing.assert_close(run(x)[0].double(), model(x), rtol=1e-5, atol=1e-5)
