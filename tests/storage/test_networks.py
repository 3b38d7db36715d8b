"""Stored models of whole networks, from every room: every quantizer and every output as in the room's own model."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from dqa_plugins import DQA, Direct, iter_quantizers
from dqa_plugins.adapters.fx import get_qconfig_mapping
from dqa_plugins.storage import TraceFailed, convert_stored, prepare_stored, stored_edges
from tests.adapters.networks import batches, build

pytest.importorskip("torchao")
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from dqa_plugins.adapters.pt2e import PluginQuantizer

METHOD = DQA(bits=4)


class Dense(nn.Module):
    """Every layer reads all before it, as in DenseNet; pooled between. (B, 3, 16, 16) -> (B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4 + 4 * k, 4, 3, padding=1) for k in range(3))
        self.stem, self.pool, self.head = nn.Conv2d(3, 4, 3, 2, 1), nn.MaxPool2d(2), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        found = [self.pool(torch.relu(self.stem(x)))]
        for layer in self.layers:
            found.append(torch.relu(layer(torch.cat(found, 1))))
        return self.head(torch.cat(found, 1).mean((2, 3)))


class UNet(nn.Module):
    """Skips over two levels. (B, 3, 16, 16) -> (B, 2, 16, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.d, self.e, self.pool = nn.Conv2d(16, 8, 3, 1, 1), nn.Conv2d(16, 2, 3, 1, 1), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.a(x))
        b = torch.relu(self.b(self.pool(a)))
        c = nn.functional.interpolate(torch.relu(self.c(self.pool(b))), scale_factor=2.0)
        d = nn.functional.interpolate(torch.relu(self.d(torch.cat([c, b], 1))), scale_factor=2.0)
        return self.e(torch.cat([d, a], 1))


class Normed(nn.Module):
    """A residual that a norm which is written out reads through a cast, as in Llama. (B, 5, 8) -> (B, 5, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.first, self.up, self.down = nn.Parameter(torch.ones(8)), *(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = x.to(torch.float32)
        z = self.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6))
        return y + self.down(nn.functional.silu(self.up(z)))


def image(network: type[nn.Module]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    shape = (4, 5, 8) if network is Normed else (4, 3, 16, 16)
    return network().eval(), (torch.randn(shape),)


def fx(model: nn.Module, x: tuple[Any, ...]) -> tuple[Any, Callable[..., Any]]:
    return prepare_fx(model, get_qconfig_mapping(METHOD), x), convert_fx


def pt2e(model: nn.Module, x: tuple[Any, ...]) -> tuple[Any, Callable[..., Any]]:
    return prepare_pt2e(torch.export.export(model, x).module(), PluginQuantizer().set_global(METHOD)), convert_pt2e


def check(stored: nn.Module, wanted: nn.Module, x: tuple[Any, ...]) -> None:
    with torch.no_grad():
        assert torch.equal(stored(*x), wanted(*x))
    names = [name for name, _ in iter_quantizers(stored)]
    assert names == [name for name, _ in iter_quantizers(wanted)], "a quantizer was doubled or dropped"
    assert stored_edges(stored)


def check_both(room: Callable[..., Any], model: nn.Module, x: tuple[Any, ...]) -> None:
    """Made from the prepared model, and from the converted one."""
    prepared, convert = room(model, x)
    with torch.no_grad():
        site = prepare_stored(prepared, DQA(bits=2), x)
        prepared(*x)
        site(*x)
        wanted = convert(prepared)
        check(convert_stored(site), wanted, x)
        again = prepare_stored(wanted, DQA(bits=2), x)
        again(*x)
        check(convert_stored(again), wanted, x)


@pytest.mark.parametrize("room", [fx, pt2e])
@pytest.mark.parametrize("network", [Dense, UNet, Normed])
def test_networks_of_fx_and_pt2e(room: Callable[..., Any], network: type[nn.Module]) -> None:
    check_both(room, *image(network))


@pytest.mark.parametrize("network", [Dense, UNet, Normed])
@pytest.mark.parametrize("method", [METHOD, Direct(bits=4, qparams="dynamic")], ids=str)
def test_networks_of_brevitas(network: type[nn.Module], method: Any) -> None:
    """A layer is activation and quantizer in one: its result was quantized a second time, by another method."""
    run = pytest.importorskip("dqa_plugins.adapters.brevitas").quantize_model
    model, x = image(network)
    wanted = run(model, method, [x])
    site = prepare_stored(wanted, DQA(bits=2), x)
    with torch.no_grad():
        site(*x)
    check(convert_stored(site), wanted, x)


def test_substituted_layers_of_brevitas() -> None:
    """ReLU, then a signed quantizer: what is packed is the ReLU's result, not its input."""
    room = pytest.importorskip("dqa_plugins.adapters.brevitas")
    mode = importlib.import_module("brevitas.graph.calibrate").calibration_mode
    x = batches("residual")[0]
    wanted = room.substitute_layers(build("residual"), {nn.ReLU: Direct(bits=4, signed=True)})
    with torch.no_grad(), mode(wanted):
        wanted(x)
    site = prepare_stored(wanted, DQA(bits=2), x)
    with torch.no_grad():
        site(x)
    check(convert_stored(site), wanted, (x,))


def test_models_of_nncf_are_refused() -> None:
    """torch.fx sees the model without NNCF's hooks: the stored model computed without its quantizers, in silence."""
    run = pytest.importorskip("dqa_plugins.adapters.nncf").quantize_model
    quantized = run(build("residual"), METHOD, batches("residual"))
    with pytest.raises(TraceFailed, match=r"torch\.fx does not see 6 quantizers"):
        prepare_stored(quantized, METHOD, batches("residual")[0])


def test_values_inside_float_layers_can_be_skipped_by_the_name_of_their_edge() -> None:
    """An encoder layer is one site; values inside it get names behind its own, which `skip` did not know."""
    torch.manual_seed(0)
    layers = (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2))
    model, x = nn.Sequential(*layers, nn.Linear(16, 4)).eval(), (torch.randn(4, 6, 16),)
    prepared, convert = pt2e(model, x)
    prepared(*x)
    wanted = convert(prepared)
    names = [edge.name for edge in stored_edges(prepare_stored(wanted, METHOD, x))]
    assert names == ["0", "0.stored", "1.stored"]
    site = prepare_stored(wanted, METHOD, x, skip=tuple(names[1:]))
    assert [edge.name for edge in stored_edges(site)] == ["0"]


def transformer(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """A small random instance of the transformers library."""
    made = importlib.import_module("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    images, text, swin = {"image_size": 32, "patch_size": 8}, {"vocab_size": 64}, {"image_size": 32, "patch_size": 4}
    positions = {**text, "max_position_embeddings": 32}
    options: dict[str, dict[str, Any]] = {
        "ViT": {**small, **images},
        "Swin": {**swin, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic"},
        "Bert": {**small, **positions},
        "Llama": {**small, **positions, "num_key_value_heads": 2, "use_cache": False},
        "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "use_cache": False, **text},
        "T5": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "use_cache": False, **text},
    }  # fmt: skip
    torch.manual_seed(0)
    model = getattr(made, "T5EncoderModel" if name == "T5" else f"{name}Model")
    config = getattr(made, f"{name}Config")(**options[name])
    if name != "ResNet":
        config._attn_implementation = "eager"
    x = torch.randn(2, 3, 32, 32) if name in ("ViT", "Swin", "ResNet") else torch.randint(0, 64, (2, 9))
    return Last(model(config)).eval(), (x,)


class Last(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).last_hidden_state


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT", "Swin", "ResNet", "Bert", "Llama", "GPT2", "T5"])
def test_transformers(name: str) -> None:
    """By export: torch.fx traces none of them."""
    pytest.importorskip("transformers")
    check_both(pt2e, *transformer(name))
