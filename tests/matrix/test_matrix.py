"""One test body for adapter x method x qparams x check: a method means the same everywhere."""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dqa_plugins import ActivationQuantizer
from dqa_plugins.export.compare import Comparison
from dqa_plugins.qpp import connect, fit
from tests.matrix.rooms import METHODS, ROOMS, SITES, SOURCES, batches, methods, net, sites

BACKENDS = ("onnxruntime", "openvino", "torch.export", "torch.compile")
ROOT = Path(__file__).parents[2]

cells = [
    pytest.mark.parametrize("method", METHODS),
    pytest.mark.parametrize("source", SOURCES),
    pytest.mark.parametrize(
        "adapter", [pytest.param(name, marks=pytest.mark.xdist_group(f"matrix-{name}")) for name in ROOMS]
    ),
]


def cell(test: Any) -> Any:
    """Parametrise a test over adapter x source x method."""
    for mark in cells:
        test = mark(test)
    return test


@functools.cache
def converted(adapter: str, source: str) -> nn.Module:
    return ROOMS[adapter](methods(source))


@functools.cache
def float_activations(seed: int | None = None) -> dict[str, Tensor]:
    """What each ReLU of the float network gives on the calibration data (or on other data)."""
    model, found = net(), {}
    hooks = [
        module.register_forward_hook(lambda _m, _a, y, name=name: found.setdefault(name, []).append(y))
        for name, module in model.named_children()
    ]
    with torch.no_grad():
        for x in batches() if seed is None else batches(1, 5, seed):
            model(x)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


@functools.cache
def reference(source: str, method: str) -> ActivationQuantizer:
    """A bare quantizer calibrated on the float network's own activations."""
    quantizer = ActivationQuantizer(methods(source)[SITES[method]], name=SITES[method])
    connect([quantizer])  # predicted: it reads itself, as in the networks
    quantizer(float_activations()[SITES[method]])
    fit(quantizer)
    return quantizer.freeze()


def probe(method: str) -> Tensor:
    return float_activations(17)[SITES[method]]


@cell
def test_the_calibrated_site_equals_the_reference(adapter: str, source: str, method: str) -> None:
    site = sites(converted(adapter, source))[SITES[method]]
    assert site.method == reference(source, method).method
    assert site.state == "frozen"
    x = probe(method)
    assert torch.equal(site(x), reference(source, method)(x))
    assert not torch.equal(site(x), x), "it does not quantize"


@cell
def test_the_converted_model_runs_its_sites(adapter: str, source: str, method: str) -> None:
    """The quantizer is in the forward path, and what it returns is what the next layer gets."""
    model = converted(adapter, source)
    site, seen = sites(model)[SITES[method]], []
    hook = site.register_forward_hook(lambda _m, a, y: seen.append((a[0], y)))
    with torch.no_grad():
        output = model(batches(1, 4, 5)[0])
        hook.remove()
        changed = site.register_forward_hook(lambda _m, _a, y: y * 0)
        other = model(batches(1, 4, 5)[0])
        changed.remove()
    assert len(seen) == 1
    assert torch.equal(seen[0][1], reference(source, method)(seen[0][0]))
    assert not torch.equal(_tensor(output), _tensor(other)), "nobody reads the quantized tensor"


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else value.value


@cell
def test_a_deepcopy_computes_the_same(adapter: str, source: str, method: str) -> None:
    twin = copy.deepcopy(converted(adapter, source))
    x = probe(method)
    assert torch.equal(sites(twin)[SITES[method]](x), reference(source, method)(x))


@cell
def test_state_dict_in_another_process(adapter: str, source: str, method: str, tmp_path_factory: Any) -> None:
    found = _other_process(adapter, str(tmp_path_factory.getbasetemp()))[source]
    assert torch.equal(found[SITES[method]], reference(source, method)(probe(method)))


@functools.cache
def _other_process(adapter: str, folder: str) -> dict[str, dict[str, Tensor]]:
    """Load the state_dicts into models prepared with other data, in a fresh process; their outputs on the probes."""
    base = Path(folder) / adapter
    states = {source: converted(adapter, source).state_dict() for source in SOURCES}
    torch.save(states, f"{base}.states")
    torch.save({SITES[m]: probe(m) for m in METHODS}, f"{base}.probes")
    code = """
import sys, torch
import tests.matrix.rooms as rooms
adapter, base = sys.argv[1:]
plain = rooms.batches
rooms.batches = lambda *a, **k: [x * 3 for x in plain(*a, **k)]
probes, found = torch.load(base + ".probes", weights_only=True), {}
for source, state in torch.load(base + ".states", weights_only=True).items():
    model = rooms.ROOMS[adapter](rooms.methods(source))
    before = {n: rooms.sites(model)[n](x) for n, x in probes.items()}
    model.load_state_dict(state)
    found[source] = {n: rooms.sites(model)[n](x) for n, x in probes.items()}
    # three times the data predicts three times the range: only static parameters move
    assert source != "static" or all(not torch.equal(before[n], found[source][n]) for n in probes)
torch.save(found, base + ".out")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, adapter, str(base)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(f"{base}.out", weights_only=True)  # type: ignore[no-any-return]


@functools.cache
def _comparison(adapter: str, source: str) -> Comparison:
    """The exported programs and ONNX files are shared by the backends."""
    return Comparison(converted(adapter, source), batches(1, 16, 23)[0])


@functools.cache
def _backend(adapter: str, source: str, backend: str) -> list[Any]:
    return _comparison(adapter, source).against(backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@cell
def test_the_backend_has_the_same_numbers(adapter: str, source: str, method: str, backend: str) -> None:
    if source == "predicted" and backend == "torch.compile" and adapter != "fx":
        pytest.skip("inductor compiles the program that torch.export ran; half a minute each: seen with FX")
    _agrees(adapter, source, method, backend)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("executorch") is None, reason="executorch is not installed")
@cells[0]
@cells[1]
@pytest.mark.parametrize("adapter", [pytest.param("fx", marks=pytest.mark.xdist_group("matrix-fx"))])
def test_executorch_has_the_same_numbers(adapter: str, source: str, method: str) -> None:
    """With FX only: it lowers the program that torch.export ran, and takes half a minute for each."""
    _agrees(adapter, source, method, "executorch")


def _agrees(adapter: str, source: str, method: str, backend: str) -> None:
    for found in _backend(adapter, source, backend):
        (site,) = [q for q in found.quantizers if q.site == SITES[method]]
        assert site.max_difference <= 1e-5, str(found)
        assert site.share_off == 0, str(found)
        assert found.network.only_ties, str(found)
