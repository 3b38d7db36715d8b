"""Networks of the kinds that others write, one per question of placement, with inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Tracer
from torch.nn import functional as F

from dqa_plugins.graph.axes import channel_axes
from dqa_plugins.graph.fx import describe, follow_in_place
from dqa_plugins.graph.operations import Operation, Value
from dqa_plugins.graph.record import record_shapes


class Attention(nn.Module):
    """Two heads, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = torch.softmax(q @ k.transpose(-1, -2) / 2.0, -1)
        return self.out((scores @ v).transpose(1, 2).reshape(x.shape[0], x.shape[1], 8))


class RMSNorm(nn.Module):
    """As in Llama and T5."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.float32)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.to(x.dtype)


class PlainLayerNorm(nn.Module):
    """Mean, difference, square root, division, weight and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        d = x - x.mean(-1, keepdim=True)
        return d / torch.sqrt((d * d).mean(-1, keepdim=True) + 1e-5) * self.weight + self.bias


class Language(nn.Module):
    """Embeddings, learned positions, a mask, attention, norms that are written out, LeakyReLU, an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions, self.learned = (
            nn.Embedding(11, 8),
            nn.Embedding(32, 8),
            nn.Parameter(torch.linspace(-1, 1, 56).reshape(1, 7, 8)),
        )
        self.norm1, self.attention, self.norm2 = RMSNorm(), Attention(), PlainLayerNorm()
        self.up, self.act, self.down = nn.Linear(8, 16), nn.LeakyReLU(), nn.Linear(16, 8)
        self.lstm, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1])) + self.learned
        x = x * (1.0 - (ids == 0).float()).unsqueeze(-1)
        x = x + self.attention(self.norm1(x))
        x = x + self.down(self.act(self.up(self.norm2(x))))
        y, (h, _) = self.lstm(x)
        return self.head(y[:, -1] + h[-1])


class Vision(nn.Module):
    """A residual, a concatenation, squeeze and excitation, scalar factors, functional operations, a 0-d mean."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other, self.join = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(16, 8, 1)
        self.squeeze, self.fc1, self.fc2 = nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.weight, self.head = nn.Parameter(torch.randn(8, 8, 1, 1)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        x = x + self.other(x) * 0.02
        x = F.relu6(self.join(torch.cat([x, F.max_pool2d(F.pad(x, (0, 1, 0, 1)), 2, 1)], 1)))
        x = x * torch.sigmoid(self.fc2(F.relu(self.fc1(self.squeeze(x)))))
        x = F.conv2d(x, self.weight)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)) * x.mean()


class InPlace(nn.Module):
    """A write into a view after which the tensor itself is read again; harmless in-place operations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        filled = y[:, :4].mul_(50.0)
        z = self.second(x)
        z += 1
        z.add_(2.0)
        return self.second(z * 2 + y) + filled.sum(1, keepdim=True)


NETS: dict[str, tuple[type[nn.Module], Any]] = {
    "language": (Language, lambda g: (torch.randint(1, 11, (3, 7), generator=g),)),
    "vision": (Vision, lambda g: (torch.randn(3, 3, 8, 8, generator=g),)),
    "in_place": (InPlace, lambda g: (torch.randn(3, 8, generator=g),)),
}


def build(name: str) -> nn.Module:
    """A network with fixed weights, in eval mode."""
    torch.manual_seed(0)
    return NETS[name][0]().eval()


def inputs(name: str, seed: int = 0) -> tuple[Tensor, ...]:
    """Inputs of a network."""
    found: tuple[Tensor, ...] = NETS[name][1](torch.Generator().manual_seed(seed))
    return found


def described(model: nn.Module, x: tuple[Tensor, ...] | None) -> list[Operation]:
    """A network as torch.fx sees it, with the shapes of a run."""
    graph = GraphModule(model, Tracer().trace(model))
    follow_in_place(graph)
    return describe(graph, None if x is None else record_shapes(graph, x))


def network(name: str) -> list[Operation]:
    """A network of this file as operations."""
    return described(build(name), inputs(name))


def axis_behind(producer: str) -> int:
    """The channel axis of what a module or function of this name makes, where nothing else tells."""
    value = Value("made")
    return channel_axes([Operation(producer, "module", outputs=(value,))])[value].axis
