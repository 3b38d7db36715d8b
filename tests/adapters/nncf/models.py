"""Small float models for the NNCF tests, and the config entry around a set of activation fields."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import nncf
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dqa_plugins import ActivationQuantizer, Method, iter_quantizers


class Residual(nn.Module):
    """conv-bn-relu, a residual addition, max-pool, mean and Linear. (B, 3, 8, 8) -> (B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(x + self.bn2(self.conv2(x)))
        return self.fc(self.pool(x).mean((2, 3)))


class Bottleneck(nn.Module):
    """Two linear bottlenecks with ReLU6 and a depthwise convolution. (B, 3, 8, 8) -> (B, 5)."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expand = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
            self.depth = nn.Sequential(
                nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6(inplace=True)
            )
            self.project = nn.Sequential(nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.project(self.depth(self.expand(x)))

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(self.Block(), self.Block())
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pool(self.blocks(self.stem(x))), 1))


class Concat(nn.Module):
    """Two branches, `channels` and 6 wide, joined by a cat before a convolution. (B, 3, 8, 8) -> (B, 4, 8, 8)."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, channels, 1), nn.Conv2d(3, 6, 1)
        self.join = nn.Conv2d(channels + 6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(torch.cat([F.relu(self.left(x)), self.right(x)], 1))


class Functional(nn.Module):
    """Functional add, relu, gelu and mean. (B, 3, 8, 8) -> (B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = F.relu(self.b(x) + x)
        return self.fc(F.gelu(self.c(x)).mean((2, 3)))


class Tokens(nn.Module):
    """Pre-norm MLP on tokens. (B, T, 16) -> (B, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.fc2(F.gelu(self.fc1(self.norm(x))))
        return self.head(x.mean(1))


class Attention(nn.Module):
    """Token ids, an embedding and one attention layer, by matmul or by SDPA. (B, 6) int64 -> (B, 6, 16)."""

    def __init__(self, sdpa: bool = False) -> None:
        super().__init__()
        self.sdpa = sdpa
        self.embed, self.position = nn.Embedding(50, 16), nn.Parameter(torch.randn(1, 6, 16))
        self.norm, self.out = nn.LayerNorm(16), nn.Linear(16, 16)
        self.query, self.key, self.value = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embed(ids) + self.position)
        q, k, v = (f(x).view(-1, 6, 2, 8).transpose(1, 2) for f in (self.query, self.key, self.value))
        if self.sdpa:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = torch.softmax(q @ k.transpose(2, 3) * 0.35, -1) @ v
        return self.out(y.transpose(1, 2).reshape(-1, 6, 16)) + x


class Listed(nn.Module):
    """Layers in a ModuleList that the parent calls itself. (B, 3, 8, 8) -> (B, 8, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        pairs = [(3, 8), (8, 8), (8, 8)]
        self.down = nn.ModuleList(
            nn.ModuleDict({"conv": nn.Conv2d(i, o, 3, padding=1), "relu": nn.ReLU()}) for i, o in pairs
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.down:
            x = layer["relu"](layer["conv"](x))
        return x


class Twice(nn.Module):
    """One ReLU called twice. (B, 3, 8, 8) -> (B, 4, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.relu = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.relu(self.b(self.relu(self.a(x)))))


MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "residual": (Residual, (2, 3, 8, 8)),
    "bottleneck": (Bottleneck, (2, 3, 8, 8)),
    "concat": (Concat, (2, 3, 8, 8)),
    "functional": (Functional, (2, 3, 8, 8)),
    "tokens": (Tokens, (2, 6, 16)),
    "attention": (Attention, (2, 6)),
    "sdpa": (lambda: Attention(sdpa=True), (2, 6)),
    "listed": (Listed, (2, 3, 8, 8)),
    "twice": (Twice, (2, 3, 8, 8)),
}


def build(name: str, seed: int = 0) -> nn.Module:
    """A model of MODELS with fixed weights and non-trivial batch-norm statistics, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MODELS[name][0]().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 2)
                module.running_mean.uniform_(-0.3, 0.3)
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.uniform_(0.1, 0.5)
    return model


def batches(name: str, count: int = 4, seed: int = 1) -> list[Tensor]:
    """Calibration batches of different magnitude."""
    generator = torch.Generator().manual_seed(seed)
    shape = MODELS[name][1]
    if name in ("attention", "sdpa"):
        return [torch.randint(0, 50, shape, generator=generator) for _ in range(count)]
    return [torch.randn(shape, generator=generator) * (1 + 0.5 * i) for i in range(count)]


def config(activations: dict[str, Any] | None = None, **entry: Any) -> dict[str, Any]:
    """A config entry; DQA at 4 bits unless told otherwise, float weights."""
    activations = activations if activations is not None else {"mode": "dqa", "bits": 4}
    return {"compression": {"algorithm": "quantization", "activations": activations, **entry}}


def quantized(name: str, activations: dict[str, Any] | None = None, **entry: Any) -> nn.Module:
    """A model of MODELS, quantized by the adapter on its batches."""
    return copy.deepcopy(_quantized(name, json.dumps(config(activations, **entry))))


@functools.cache
def _quantized(name: str, entry: str) -> nn.Module:
    from dqa_plugins.adapters.nncf import quantize

    return quantize(build(name), nncf.Dataset(batches(name)), json.loads(entry))


def site_list(model: nn.Module) -> list[str]:
    """Site names in order of execution."""
    return [name for name, _ in iter_quantizers(model)]


def bare(method: Method, name: str, data: list[Tensor], producer_axis: int = 1) -> ActivationQuantizer:
    """An ActivationQuantizer without any framework, calibrated and frozen."""
    quantizer = ActivationQuantizer(method, name=name, producer_axis=producer_axis)
    for x in data:
        quantizer(x)
    return quantizer.freeze()


def inputs_of_quantizers(model: nn.Module, x: Tensor) -> dict[str, list[Tensor]]:
    """What each quantizer was fed while the model ran on x, {site name: tensors}."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        q.register_forward_pre_hook(lambda _, args, n=n: seen.setdefault(n, []).append(args[0].detach().clone()))
        for n, q in iter_quantizers(model)
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


def outputs_of_modules(model: nn.Module, names: list[str], data: list[Tensor]) -> dict[str, list[Tensor]]:
    """What modules of a float model gave, by torch's own forward hooks."""
    model = copy.deepcopy(model)
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda _, __, y, n=name: seen[n].append(y.detach().clone()))
    with torch.no_grad():
        for x in data:
            model(x)
    return seen
