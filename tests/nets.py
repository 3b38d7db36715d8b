"""Small networks, one per placement question, with inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """conv-bn-relu, a residual add with one ReLU module called twice, pool, flatten, Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(x + self.bn2(self.conv2(x)))
        return self.fc(torch.flatten(self.pool(x), 1))


class Bottleneck(nn.Module):
    """ReLU6 modules and a signed linear bottleneck, as MobileNetV2."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(3, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6())
        self.depth = nn.Sequential(nn.Conv2d(12, 12, 3, 1, 1, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU6())
        self.project = nn.Sequential(nn.Conv2d(12, 3, 1, bias=False), nn.BatchNorm2d(3))
        self.head = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.project(self.depth(self.expand(x)))).mean((2, 3))


class Concat(nn.Module):
    """Branches of 8 and 9 channels, a concatenation, a transpose in between, max-pool."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 9, 1), nn.Conv2d(17, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([F.relu(self.left(x)), self.right(x)], 1)
        return self.last(F.max_pool2d(both.transpose(2, 3), 2)).mean((2, 3))


class Transposed(nn.Module):
    """(B, 8, 9) and (B, 9, 8): a transpose of which both sides feed a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(9, 9), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)).transpose(1, 2)).mean(1)


class Tokens(nn.Module):
    """Linear on (B, T, C), LayerNorm, GELU, residual add, mean over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 10), nn.LayerNorm(10)
        self.up, self.act, self.down = nn.Linear(10, 20), nn.GELU(), nn.Linear(20, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.down(self.act(self.up(self.norm(x))))
        return self.head(x.mean(1))


class TwoInputs(nn.Module):
    """Two inputs of different shape, added after a layer each."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.vector, self.out = nn.Conv2d(3, 6, 3, 2), nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        return self.out(F.relu(self.image(image).mean((2, 3)) + self.vector(vector)))


NETS: dict[str, tuple[type[nn.Module], tuple[tuple[int, ...], ...]]] = {
    "residual": (Residual, ((3, 12, 12),)),
    "bottleneck": (Bottleneck, ((3, 10, 10),)),
    "concat": (Concat, ((3, 8, 8),)),
    "transposed": (Transposed, ((8, 9),)),
    "tokens": (Tokens, ((7, 6),)),
    "two_inputs": (TwoInputs, ((3, 9, 9), (5,))),
}


def build(name: str) -> nn.Module:
    """A network with fixed weights and plausible batch-norm statistics, in eval mode."""
    generator = torch.Generator().manual_seed(0)
    net = NETS[name][0]()
    with torch.no_grad():
        for parameter in net.parameters():
            spread = 0.5 if parameter.ndim == 1 else 1 / parameter[0].numel() ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
                module.running_mean.copy_(torch.randn(module.bias.shape, generator=generator) * 0.2)
    return net.eval()


def inputs(name: str, batch: int = 4, seed: int = 1) -> tuple[Tensor, ...]:
    """A batch of inputs with samples of different size: per-sample and per-batch qparams differ."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.linspace(0.5, 2, batch)
    return tuple(
        torch.randn(batch, *shape, generator=generator) * sizes.reshape(-1, *[1] * len(shape))
        for shape in NETS[name][1]
    )
