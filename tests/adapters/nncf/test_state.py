"""Copies, state_dict, NNCF's own config, JSON + safetensors, another process, strip: all exact."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import nncf
import pytest
import torch
from nncf.torch import get_config, load_from_config
from safetensors.torch import load_file, save_file

from dqa_plugins import DQA, ActivationQuantizer, iter_quantizers
from dqa_plugins.adapters.nncf import ALLOWED_MODULES, load, quantize, save
from dqa_plugins.errors import StateMismatch, UnsupportedInput
from dqa_plugins.report import placement_report
from tests.adapters.nncf.models import batches, build, quantized, site_list
from tests.compare import assert_exact, same_bits

MIXED: dict[str, Any] = {
    "weights": {"bits": 8},
    "scope_overrides": {
        "activations": {
            "input.0": {"mode": "direct", "bits": 8, "symmetric": False},
            "relu1": {"mode": "dense_sparse"},
            "bn2": {"mode": "noisyquant", "granularity": "channel"},
            "relu2": {"qparams": "dynamic"},
        }
    },
}
ENTRY = {"algorithm": "quantization", "activations": {"mode": "dqa"}}
X = batches("residual", seed=11)[0]


def outputs_equal(left: torch.nn.Module, right: torch.nn.Module) -> None:
    with torch.no_grad():
        assert same_bits(left(X), right(X))
    assert site_list(left) == site_list(right)
    states = left.state_dict(), right.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert same_bits(tensor, states[1][name]), name


def test_the_module_that_quantizes_is_ours() -> None:
    from nncf.torch.quantization.layers import BaseQuantizer

    for _, quantizer in iter_quantizers(quantized("residual", **MIXED)):
        assert isinstance(quantizer, ActivationQuantizer)
        assert not isinstance(quantizer, BaseQuantizer)
        assert quantizer.state == "frozen"


def test_deepcopy() -> None:
    model = quantized("residual", **MIXED)
    copied = copy.deepcopy(model)
    outputs_equal(model, copied)
    dict(iter_quantizers(copied))["bn2"].noise.zero_()
    assert dict(iter_quantizers(model))["bn2"].noise.abs().sum() > 0, "copies share nothing"


def test_get_config_and_load_from_config(tmp_path: Path) -> None:
    model = quantized("residual", **MIXED)
    path = tmp_path / "model.pth"
    torch.save({"config": get_config(model), "state": model.state_dict()}, path)
    loaded = torch.load(path, weights_only=True)
    assert json.loads(json.dumps(loaded["config"])) == loaded["config"]
    fresh = load_from_config(build("residual", seed=5), loaded["config"], allowed_modules=ALLOWED_MODULES)
    fresh.load_state_dict(loaded["state"])
    outputs_equal(model, fresh.eval())
    with pytest.raises(nncf.InternalError, match="untrusted path 'dqa_plugins"):
        load_from_config(build("residual"), loaded["config"])


@pytest.mark.parametrize("name", ["residual", "concat", "attention"])
def test_json_and_safetensors(name: str, tmp_path: Path) -> None:
    """concat shares one quantizer between two tensors, which plain safetensors refuses."""
    model = quantized(name, {"mode": "direct", "bits": 4}, weights={"mode": "asymmetric"})
    folder = save(model, tmp_path / "model")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    loaded = load(build(name, seed=5), folder)
    x = batches(name, seed=11)[0]
    with torch.no_grad():
        assert same_bits(loaded(x), model(x))
    assert site_list(loaded) == site_list(model)
    assert placement_report(loaded) == placement_report(model)
    assert any(row.readers for row in placement_report(loaded).sites)


class Versioned(torch.nn.Module):
    """Like torchvision's MNASNet: its state_dict has a version, and one without is refused."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).relu())

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        if local_metadata.get("version") != 2:
            raise ValueError(f"version {local_metadata.get('version')}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def test_versions_of_layers_are_saved(tmp_path: Path) -> None:
    model = quantize(Versioned().eval(), nncf.Dataset([X]), {"compression": {**ENTRY, "weights": {}}})
    outputs_equal(model, load(Versioned(), save(model, tmp_path)))


def test_loading_into_another_model_is_refused(tmp_path: Path) -> None:
    folder = save(quantized("residual", **MIXED), tmp_path)
    with pytest.raises(StateMismatch, match="holds another model than Tokens"):
        load(build("tokens"), folder)


PROCESS = """
import sys, torch
from dqa_plugins.adapters.nncf import load
from tests.adapters.nncf.models import build
folder = sys.argv[1]
model = load(build("residual", seed=9), folder)
with torch.no_grad():
    torch.save(model(torch.load(folder + "/x.pt")), folder + "/y.pt")
"""


def test_a_sequential_is_refused_with_a_way_out() -> None:
    """NNCF's hooks are a module of the model, which it would call like a layer (3.4)."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU()).eval()
    with pytest.raises(UnsupportedInput, match=r"nn\.Sequential.*module of your own"):
        quantize(model, nncf.Dataset([torch.randn(2, 3, 4, 4)]), DQA())


def test_another_process(tmp_path: Path) -> None:
    model = quantized("residual", **MIXED)
    save(model, tmp_path)
    torch.save(X, tmp_path / "x.pt")
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", PROCESS, str(tmp_path)], check=True, cwd=root, capture_output=True)
    with torch.no_grad():
        assert_exact(torch.load(tmp_path / "y.pt"), model(X))


@pytest.mark.parametrize("weights", [{"bits": 8}, {"mode": "asymmetric"}, None], ids=str)
def test_strip(weights: dict[str, Any] | None) -> None:
    """NNCF turns its weight quantizers into torch's FakeQuantize; ours stay as they are."""
    model = quantized("residual", **{**MIXED, "weights": weights})
    stripped = nncf.strip(model, example_input=X)
    assert site_list(stripped) == site_list(model)
    for (name, left), (_, right) in zip(iter_quantizers(stripped), iter_quantizers(model), strict=True):
        for key, buffer in left.named_buffers():
            assert same_bits(buffer, dict(right.named_buffers())[key]), f"{name}.{key}"
    hooks = nncf.torch.function_hook.get_hook_storage(stripped).named_hooks()
    kinds = {type(module).__name__ for _, module in hooks}
    assert kinds == ({"NNCFQuantizer", "FakeQuantize"} if weights else {"NNCFQuantizer"})
    # torch's FakeQuantize rounds the weights in another order: the first site behind them may differ by a step
    with torch.no_grad():
        assert torch.allclose(stripped(X), model(X), atol=0.05)


def test_half_keeps_the_parameters_of_quantizers() -> None:
    model = quantized("residual").half()
    assert all(q.scale.dtype == torch.float32 for _, q in iter_quantizers(model))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _deep(path: Path) -> None:
    path.write_text("[" * 100_000)


def _other_version(path: Path) -> None:
    save_file(load_file(path), path, {"schema": "dqa_plugins.nncf_model", "version": "9"})


@pytest.mark.parametrize(
    ("file", "damage", "text"),
    [
        ("config.json", _cut, "damaged"),
        ("config.json", _deep, "damaged"),
        ("config.json", lambda path: path.write_text("{}"), "damaged"),
        ("model.safetensors", _cut, "damaged"),
        ("model.safetensors", lambda path: path.write_bytes(b""), "damaged"),
        ("model.safetensors", _other_version, "version 9"),
    ],
)
def test_damaged_folders_are_refused_by_name(file: str, damage: Any, text: str, tmp_path: Path) -> None:
    save(quantized("residual"), tmp_path / "saved")
    damage(tmp_path / "saved" / file)
    with pytest.raises(StateMismatch, match=rf"saved.*{text}"):
        load(build("residual"), tmp_path / "saved")
