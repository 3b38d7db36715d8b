"""Small networks that between them hold every placement rule, each with its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dqa_plugins import iter_quantizers


class Residual(nn.Module):
    """conv-bn-relu blocks with module ReLUs and a projected shortcut."""

    class Block(nn.Module):
        def __init__(self, channels: int, out: int) -> None:
            super().__init__()
            self.conv1, self.bn1, self.relu1 = nn.Conv2d(channels, out, 3, 1, 1), nn.BatchNorm2d(out), nn.ReLU()
            self.conv2, self.bn2, self.relu2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()
            self.shortcut: nn.Module = nn.Identity()
            if channels != out:
                self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1), nn.BatchNorm2d(out))

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
            return self.relu2(y + self.shortcut(x))

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn, self.relu = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(self.Block(4, 4), self.Block(4, 6))
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.blocks(self.relu(self.bn(self.stem(x)))))
        return self.fc(torch.flatten(x, 1))


class Bottleneck(nn.Module):
    """MobileNetV2's block: ReLU6, a depthwise convolution, a linear output."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.depth = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
        self.project, self.bn = nn.Conv2d(8, 3, 1), nn.BatchNorm2d(3)
        self.pool, self.drop, self.fc = nn.MaxPool2d(2), nn.Dropout(0.2), nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.project(self.depth(self.expand(x)))) + x
        return self.fc(self.drop(self.pool(y).flatten(1)))


class Concat(nn.Module):
    """cat of tensors with the same and with other channels, a transposed convolution, a narrow slice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(3, 2, 1)
        self.up, self.relu, self.out = nn.ConvTranspose2d(14, 6, 2, 2), nn.ReLU(), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        left = torch.cat([self.a(x), F.relu(self.b(x))], 1)
        both = torch.cat([left, left[:, :4], self.c(x)], 1)
        return self.out(self.relu(self.up(both)))


class SharedReLU(nn.Module):
    """One ReLU module called three times, once behind an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.relu = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv1(x))
        y = self.relu(self.conv2(x))
        return self.relu(x + y)


class Functional(nn.Module):
    """Everything as functions, methods and operators."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, 1, 1), nn.Linear(4, 3)
        self.weight, self.offset = nn.Parameter(torch.randn(4, 4, 1, 1)), nn.Parameter(torch.randn(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        y = F.relu(F.conv2d(x, self.weight) + x)
        y += x
        y = F.relu6(y) * 2
        y = F.avg_pool2d(y + self.offset, 2) - 1
        y = F.interpolate(torch.sigmoid(y) * y, scale_factor=2.0)
        return self.fc(F.relu(y.mean((2, 3)) / 3)).softmax(-1)


class Tokens(nn.Module):
    """(B, T, C): LayerNorm, GELU, attention by hand, a position embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(5, 8), nn.Parameter(torch.randn(1, 6, 8))
        self.norm1, self.qkv, self.proj = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm2, self.up, self.act, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        attention = torch.softmax(torch.matmul(q, k.transpose(1, 2)) / 2.8, dim=-1)
        x = x + self.proj(attention @ v)
        x = x + self.down(self.act(self.up(self.norm2(x))))
        return self.head(x.mean(1))


class TokenIds(nn.Module):
    """Integer inputs, an Embedding, torch's own attention layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.attend, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embed(ids))
        x = x + self.attend(x, x, x, need_weights=False)[0]
        return self.head(x[:, 0])


class TwoInputs(nn.Module):
    """Two inputs; a block that is called twice."""

    class Mix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 3, 1), nn.Hardswish()

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.act(self.conv(x)) + x)

    def __init__(self) -> None:
        super().__init__()
        self.mix = self.Mix()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.mix(x) + self.mix(y)


class Norms(nn.Module):
    """Batch norms that no convolution takes in, alone and with a ReLU; a linear layer with one; a padded shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.relu1, self.norm2 = nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)
        self.fc, self.norm3, self.relu3 = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm2(self.relu1(self.norm1(x)))
        x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)).mean((2, 3))
        return self.relu3(self.norm3(self.fc(x)))


def image(seed: int, batch: int = 3) -> tuple[Tensor, ...]:
    """(batch, 3, 8, 8) and nothing else."""
    return (torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed)),)


def tokens(seed: int, batch: int = 3) -> tuple[Tensor, ...]:
    """(batch, 6, 5)."""
    return (torch.randn(batch, 6, 5, generator=torch.Generator().manual_seed(seed)),)


def ids(seed: int, batch: int = 3) -> tuple[Tensor, ...]:
    """(batch, 7) int64."""
    return (torch.randint(0, 11, (batch, 7), generator=torch.Generator().manual_seed(seed)),)


def pair(seed: int, batch: int = 3) -> tuple[Tensor, ...]:
    """Two images."""
    return image(seed, batch) + image(seed + 1000, batch)


ZOO: dict[str, tuple[type[nn.Module], Callable[..., tuple[Tensor, ...]]]] = {
    "residual": (Residual, image),
    "bottleneck": (Bottleneck, image),
    "concat": (Concat, image),
    "shared_relu": (SharedReLU, image),
    "functional": (Functional, image),
    "tokens": (Tokens, tokens),
    "token_ids": (TokenIds, ids),
    "two_inputs": (TwoInputs, pair),
    "norms": (Norms, image),
}
# a batch norm left in the graph costs convert_pt2e ten seconds of pattern matching (torchao 0.18): a test of its own
CONVERTED = [name for name in ZOO if name != "norms"]


def build(name: str, seed: int = 0) -> nn.Module:
    """A network of the zoo in eval mode, batch norms with statistics of their own."""
    torch.manual_seed(seed)
    model = ZOO[name][0]().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)  # type: ignore[union-attr, operator]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr, operator]
    return model


def inputs(name: str, seed: int = 1, batch: int = 3) -> tuple[Tensor, ...]:
    """Inputs for a network of the zoo."""
    return ZOO[name][1](seed, batch)


def calibrate(prepared: Any, name: str, batches: int = 3) -> None:
    """Run batches of random inputs."""
    for seed in range(batches):
        prepared(*inputs(name, seed=10 + seed))


def exported(name: str, *, train: bool = False, dynamic: bool = False, strict: bool = False) -> Any:
    """The network as torch.export sees it, ready for prepare_pt2e."""
    batch = torch.export.Dim("batch", min=2, max=64)
    sample = inputs(name)
    shapes = tuple({0: batch} for _ in sample) if dynamic else None
    return torch.export.export(build(name).train(train), sample, dynamic_shapes=shapes, strict=strict).module()


def sites(model: Any) -> list[str]:
    """Names of the quantizers in order; observers that FX left behind without a call have none."""
    return [quantizer.name for _, quantizer in iter_quantizers(model) if quantizer.name]
