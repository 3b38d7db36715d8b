"""Models of all rooms lower alike, and compute what they computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dqa_plugins import DQA, QPP, DenseSparse, Direct, Method, NoisyQuant
from dqa_plugins.runtime import lower, lowering_report
from tests.runtime.nets import assert_close, batches, converted

METHODS = {
    "Direct": Direct(bits=8),
    "asymmetric": Direct(bits=4, symmetric=False),
    "DQA": DQA(bits=4),
    "NoisyQuant": NoisyQuant(bits=6, amplitude=0.3),
    "DenseSparse": DenseSparse(bits=6, density=0.02),
}
SOURCES: dict[str, Any] = {
    "static": "static",
    "dynamic": "dynamic",
    "paper": QPP(mode="paper", sites=("input",)),
    "extended": QPP(),
}


def cells() -> list[Any]:
    """All of FX; of the other rooms, which the one program makes alike, each source once. Fast ones of FX only."""
    found = [("fx", source, name) for source in ("static", "dynamic") for name in METHODS]
    found += [("fx", source, "DenseSparse") for source in ("paper", "extended")]
    others = [("static", "DQA"), ("static", "DenseSparse"), ("dynamic", "DenseSparse"), ("paper", "DenseSparse")]
    slow = [(room, *cell) for room in ("pt2e", "brevitas", "nncf") for cell in others]
    slow.remove(("brevitas", "paper", "DenseSparse"))  # to_exported_program cannot trace its sessions either
    return [*found, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in slow)]


@pytest.mark.filterwarnings("ignore:NNCF's bias correction is left out")
@pytest.mark.parametrize(("room", "source", "name"), cells())
def test_outputs_are_those_of_the_converted_model(room: str, source: str, name: str) -> None:
    method: Method = METHODS[name].replace(qparams=SOURCES[source])
    model = converted(room, method)
    lowered = lower(model, batches()[0])
    for x in (batches()[1], batches()[2][:1]):
        with torch.no_grad():
            assert_close(lowered(x), model(x))
    report = lowering_report(lowered)
    assert len(report.layers) == 5
    reasons = [layer.reason for layer in report.layers if not layer.lowered]
    if name != "NoisyQuant":
        assert len(reasons) <= 2, reasons  # mean pooling may have no quantizer behind it
        assert set(reasons) <= {"no quantizer in front of it"}  # or dynamic ones in front of max pooling
    elif source == "dynamic":
        assert all("depends on the sample" in reason or "no quantizer" in reason for reason in reasons)
    if source in ("static", "dynamic"):  # predictions from so few samples are off now and then
        assert all(site.fallbacks == 0 for site in report.sites), str(report)
    if name == "DenseSparse":
        assert all(0 < site.density < 0.15 for site in report.sites if site.name.startswith("relu")), str(report)
        assert all(site.calls + site.fallbacks == 2 for site in report.sites), str(report)


def test_quantizers_move_behind_pooling_and_a_shortcut_is_fused() -> None:
    """The sum and the ReLU of a shortcut are in the pass that quantizes, and no fake quantization is left."""
    quiet = {"conv2": None, "": DenseSparse(bits=8)}
    lowered = lower(converted("fx", quiet), batches()[0])
    targets = [str(node.target) for node in lowered.graph.nodes]
    assert not any("fake_quantize" in target for target in targets)
    assert not any("relu" in target for target in targets)  # a maximum before the ReLU is the same
    assert not any("batch_norm" in target for target in targets)
