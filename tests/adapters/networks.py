"""Small float networks that every room quantizes, with the sites that the judge gives them.

{name: (network, shape of an input, or of token ids, {site: channel axis})}
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """A residual addition behind batch norms, a max-pool, a mean. (B, 3, 8, 8) -> (B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)) + x)
        return self.fc(self.pool(x).mean((2, 3)))


class Branches(nn.Module):
    """A concatenation of branches of 4 and 6 channels. (B, 3, 8, 8) -> (B, 4, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.join = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(torch.cat([F.relu(self.left(x)), self.right(x)], 1))


class Recurrent(nn.Module):
    """An embedding, a Linear with ReLU, an LSTM of which output and state are read. (B, 6) ids -> (B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc1, self.relu = nn.Embedding(20, 8), nn.Linear(8, 8), nn.ReLU()
        self.lstm, self.fc2 = nn.LSTM(8, 12, batch_first=True), nn.Linear(12, 5)

    def forward(self, ids: Tensor) -> Tensor:
        out, (state, _) = self.lstm(self.relu(self.fc1(self.embed(ids))))
        return self.fc2(out[:, -1] + state[0])


class Attention(nn.Module):
    """A learned position, attention by hand and by torch's module. (B, 6, 16) -> (B, 6, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.position, self.norm = nn.Parameter(torch.randn(1, 6, 16)), nn.LayerNorm(16)
        self.query, self.key, self.value = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.attend, self.out = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.position)
        q, k, v = (f(x).view(-1, 6, 2, 8).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = (torch.softmax(q @ k.transpose(2, 3) * 0.35, -1) @ v).transpose(1, 2).reshape(-1, 6, 16)
        y = self.attend(y, y, y, need_weights=False)[0]
        return self.out(y) + x


class Functional(nn.Module):
    """Functions and operators, no activation modules. (B, 3, 8, 8) -> (B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = F.relu(self.b(x) + x)
        x = F.avg_pool2d(x, 2) * 0.1
        return self.fc(F.gelu(self.c(x)).mean((2, 3)))


class Squeeze(nn.Module):
    """Squeeze and excitation, and a clamp. (B, 3, 8, 8) -> (B, 8, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act, self.pool = nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1)
        self.down, self.relu, self.up = nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1)
        self.gate, self.last = nn.Sigmoid(), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        return self.last(x * self.gate(self.up(self.relu(self.down(self.pool(x))))))


class Tokens(nn.Module):
    """A patch embedding with a transpose, an MLP with GELU on tokens. (B, 3, 8, 8) -> (B, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, 12, 2, 2), nn.LayerNorm(12)
        self.fc1, self.gelu, self.fc2, self.head = nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.fc2(self.gelu(self.fc1(self.norm(x))))
        return self.head(x[:, 0])


def _last(*names: str) -> dict[str, int]:
    return dict.fromkeys(names, -1)


def _first(*names: str) -> dict[str, int]:
    return dict.fromkeys(names, 1)


IMAGE, TOKENS, IDS = (4, 3, 8, 8), (4, 6, 16), (4, 6)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, int]]] = {
    "residual": (Residual, IMAGE, {**_first("input.0", "relu1", "bn2", "relu2", "mean.0"), **_last("fc")}),
    "branches": (Branches, IMAGE, _first("input.0", "relu.0", "right", "cat.0", "join")),
    "recurrent": (Recurrent, IDS, _last("embed", "relu", "lstm", "lstm.part1", "add.0", "fc2")),
    "attention": (
        Attention,
        TOKENS,
        {
            **_last("input.0", "add.0", "norm", "query", "key", "value"),
            **_first("matmul.0", "mul.0", "softmax.0"),  # heads: the last axis of query @ key.T is that of tokens
            **_last("matmul.1", "attend", "out", "add.1"),
        },
    ),
    "functional": (
        Functional,
        IMAGE,
        {
            **_first("input.0", "relu.0", "b", "relu.1", "avg_pool2d.0", "mul.0", "c", "gelu.0", "mean.0"),
            **_last("fc"),
        },
    ),
    "squeeze": (Squeeze, IMAGE, _first("input.0", "act", "pool", "relu", "up", "gate", "mul.0", "last")),
    "tokens": (
        Tokens,
        IMAGE,
        {**_first("input.0", "embed"), **_last("norm", "fc1", "gelu", "fc2", "add.0", "head")},
    ),
}


def build(name: str) -> nn.Module:
    """A network with fixed weights, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = NETWORKS[name][0]().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 2)
                module.running_mean.uniform_(-0.3, 0.3)
    return model


def batches(name: str, count: int = 3, seed: int = 1, scale: float = 1.0) -> list[Any]:
    """Calibration batches of different magnitude; token ids for networks that begin with an embedding."""
    generator = torch.Generator().manual_seed(seed)
    shape = NETWORKS[name][1]
    if len(shape) == 2:
        return [torch.randint(0, 20, shape, generator=generator) for _ in range(count)]
    return [torch.randn(shape, generator=generator) * (1 + 0.5 * k) * scale for k in range(count)]
