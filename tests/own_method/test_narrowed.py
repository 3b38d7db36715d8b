"""The proof of the normal form: a method that nobody knew runs in four frameworks, two runtimes, storage and files."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dqa_plugins import QPP, ActivationQuantizer, iter_quantizers, method_from_dict, method_to_dict
from dqa_plugins.export import compare_backends
from dqa_plugins.report import activation_report
from dqa_plugins.storage import PackedActivation, pack
from tests.compare import assert_exact
from tests.own_method.narrowed import Narrowed

METHOD = Narrowed(bits=3)


class Net(nn.Module):
    """Channels of very different reach behind the first ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu1 = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(6, 4, 3), nn.ReLU()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu2(self.conv2(self.relu1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


def net() -> Net:
    torch.manual_seed(2)
    model = Net().eval()
    with torch.no_grad():
        model.conv1.weight.mul_(torch.tensor([1.0, 0.1, 0.3, 2.0, 0.01, 0.7]).reshape(-1, 1, 1, 1))
    return model


def batches() -> list[Tensor]:
    return [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(3)]


def room(name: str) -> Callable[..., nn.Module]:
    import importlib

    pytest.importorskip({"fx": "torch", "pt2e": "torchao"}.get(name, name))
    quantize: Callable[..., nn.Module] = importlib.import_module(f"dqa_plugins.adapters.{name}").quantize_model
    return quantize


def expected(quantizer: ActivationQuantizer, x: Tensor) -> Tensor:
    """In numpy, from the definition: nothing of the package but the decided numbers."""
    scale = np.float32(quantizer.scale.item())
    step = scale * quantizer.sixteenths.numpy().reshape(1, -1, *[1] * (x.ndim - 2))
    low, high = (-4, 3) if quantizer.signed else (0, 7)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.where(step > 0, np.rint(x.numpy() / step), 0)
    return torch.from_numpy((np.clip(codes, low, high) * step).astype(np.float32))


@pytest.fixture(scope="module", params=["fx", "pt2e", "brevitas", "nncf"])
def quantized(request: pytest.FixtureRequest) -> nn.Module:
    return room(request.param)(net(), METHOD, batches())


def test_every_room_places_calibrates_and_computes_it(quantized: nn.Module) -> None:
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    names = dict(iter_quantizers(quantized))
    hooks = [
        q.register_forward_hook(lambda _, args, y, name=name: seen.update({name: (args[0], y)}))
        for name, q in names.items()
    ]
    with torch.no_grad():
        quantized(batches()[0])
    for hook in hooks:
        hook.remove()
    assert {"relu1", "relu2"} <= set(seen)
    for name, (x, y) in seen.items():
        assert names[name].method == METHOD
        assert_exact(y, expected(names[name], x), name)
    assert len(names["relu1"].sixteenths.unique()) > 2, "the channels of relu1 differ"
    assert "Narrowed" in str(activation_report(quantized, batches()))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_it_exports(quantized: nn.Module, backend: str) -> None:
    pytest.importorskip(backend)
    for parity in compare_backends(quantized, torch.cat(batches()), backends=(backend,)):
        assert parity.max_difference <= 1e-5, str(parity)
        assert parity.share_off == 0, str(parity)
        assert parity.network.only_ties, str(parity)


def test_it_travels_in_a_state_dict(quantized: nn.Module) -> None:
    for name, quantizer in iter_quantizers(quantized):
        file = io.BytesIO()
        torch.save(quantizer.state_dict(), file)
        file.seek(0)
        fresh = ActivationQuantizer(METHOD, name=name, index=quantizer.index)
        fresh.load_state_dict(torch.load(file, weights_only=True))
        x = torch.randn(2, quantizer.num_channels, 5, 5)
        if quantizer.channel_axis == 1:
            assert_exact(fresh(x), expected(quantizer, x), name)


@pytest.mark.parametrize("coding", ["none", "joint", "auto"])
def test_it_packs(quantized: nn.Module, coding: str) -> None:
    """Exactly, also through bytes; its grid is none of those that the format knows by number."""
    quantizer = dict(iter_quantizers(quantized))["relu1"]
    x = torch.randn(3, 6, 9, 9).relu()
    packed = pack(x, quantizer, coding)
    assert_exact(packed.unpack(), expected(quantizer, x))
    assert_exact(PackedActivation.from_bytes(packed.to_bytes()).unpack(), expected(quantizer, x))


@pytest.mark.parametrize("qparams", ["dynamic", QPP()])
def test_its_parameters_come_from_any_source(qparams: Any) -> None:
    method = METHOD.replace(qparams=qparams)
    assert method_from_dict(method_to_dict(method)) == method
    model = room("fx")(net(), method, [x for _ in range(8) for x in batches()])
    with torch.no_grad():
        whole, single = model(batches()[0]), model(batches()[0][:1])
    torch.testing.assert_close(whole[:1], single, rtol=1e-4, atol=1e-4)


def test_a_config_names_it() -> None:
    pytest.importorskip("nncf")
    import nncf

    from dqa_plugins.adapters.nncf import quantize

    entry = {"algorithm": "quantization", "activations": {"mode": "narrowed", "bits": 3, "least": 2}}
    model = quantize(net(), nncf.Dataset(batches()), {"compression": entry})
    assert {q.method for _, q in iter_quantizers(model)} == {Narrowed(bits=3, least=2)}
