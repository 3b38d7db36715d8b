"""Tiny prepared and calibrated models with quantizers placed by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dqa_plugins import DQA, ActivationQuantizer, Method


class Tiny(nn.Module):
    """conv, quantizer, conv with a residual add, quantizer, pool, Linear; one dead channel in each layer."""

    def __init__(self, method: Method, later: Method | None = None) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.q1, self.q2 = ActivationQuantizer(method), ActivationQuantizer(later or method)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.q1(F.relu(self.conv1(x)))
        x = self.q2(F.relu(x + self.conv2(x)))
        return self.fc(x.mean((2, 3)))


class InPlace(Tiny):
    """In-place operations on values that are read again."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.q1(F.relu_(self.conv1(x)))
        y = self.conv2(x)
        x.mul_(0.5)
        y += x
        x = self.q2(F.relu_(y))
        return self.fc(x.mean((2, 3)))


class Twice(Tiny):
    """The first quantizer is called again behind the second."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.q1(F.relu(self.conv1(x)))
        x = self.q2(F.relu(x + self.conv2(x)))
        x = self.q1(F.relu(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


class Mixing(Tiny):
    """Samples depend on their batch."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.q1(F.relu(self.conv1(x)))
        x = x - x.mean(0, keepdim=True)
        x = self.q2(F.relu(x + self.conv2(x)))
        return self.fc(x.mean((2, 3)))


class Sized(Tiny):
    """A size taken before the quantizers and used behind them."""

    def forward(self, x: Tensor) -> Tensor:
        batch = x.size(0)
        x = self.q1(F.relu(self.conv1(x)))
        x = self.q2(F.relu(x + self.conv2(x)))
        return self.fc(x.mean((2, 3)).reshape(batch, 6))


class Segments(Tiny):
    """Class scores per pixel."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.q1(F.relu(self.conv1(x)))
        x = self.q2(F.relu(x + self.conv2(x)))
        return self.fc(x.movedim(1, -1)).movedim(-1, 1)


def build(
    kind: Callable[..., nn.Module] = Tiny, method: Method | None = None, *, graph: bool = False, **settings: Any
) -> nn.Module:
    """Fixed weights, calibrated on 24 samples; a torch.fx graph, or a plain module."""
    torch.manual_seed(0)
    model = kind(method or DQA(bits=2), **settings).eval()
    with torch.no_grad():
        for conv in (model.conv1, model.conv2):
            conv.weight[3], conv.bias[3] = 0, -1
        if graph:
            tracer = _Tracer()
            model = fx.GraphModule(model, tracer.trace(model))
        model(images(24, seed=5))
    return model


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, ActivationQuantizer) or super().is_leaf_module(m, module_qualified_name)


def images(count: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, 6, 6, generator=generator) * torch.linspace(0.5, 2, count).reshape(-1, 1, 1, 1)


def labelled(sizes: tuple[int, ...] = (20, 20, 7), pixels: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Batches of different size; labels at random, so that accuracies differ."""
    found = []
    for seed, size in enumerate(sizes):
        generator = torch.Generator().manual_seed(seed)
        shape = (size, 6, 6) if pixels else (size,)
        found.append((images(size, seed + 10), torch.randint(0, 4, shape, generator=generator)))
    return found
