"""Networks whose layers lower, and what the outputs of a lowered one may differ by."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """A shortcut, a strided and a grouped convolution, a batch norm, pooling, a linear behind a reshape."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.relu0 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.conv1, self.relu1 = nn.Conv2d(16, 20, 3, padding=1), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(20, 16, 1), nn.ReLU()
        self.conv3, self.relu3 = nn.Conv2d(16, 24, 3, 2, groups=4), nn.ReLU()
        self.mean, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu0(self.norm(self.stem(x))))
        x = self.relu2(x + self.conv2(self.relu1(self.conv1(x))))
        x = self.relu3(self.conv3(x))
        return self.fc(self.mean(x).flatten(1))


def net() -> Net:
    """With fixed weights and statistics of its norm, in eval mode."""
    torch.manual_seed(5)
    model = Net()
    nn.init.uniform_(model.norm.running_mean, -0.1, 0.1)
    nn.init.uniform_(model.norm.running_var, 0.5, 1.5)
    return model.eval()


def batches(count: int = 3, size: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    scale = torch.linspace(0.5, 2, size).reshape(-1, 1, 1, 1)
    return [torch.randn(size, 3, 14, 14, generator=generator) * scale for _ in range(count)]


def converted(room: str, method: Any, model: nn.Module | None = None, **settings: Any) -> nn.Module:
    """By the quantize_model of a room."""
    quantize_model = importlib.import_module(f"dqa_plugins.adapters.{room}").quantize_model
    inputs = settings.pop("calibration", batches())
    return quantize_model(net() if model is None else model, method, inputs, **settings)


@torch.no_grad()
def assert_close(found: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the largest; one sample in four may hold a value within rounding of a tie, and be some steps off."""
    off = (found.double() - expected.double()).abs().flatten(1).amax(1) / expected.double().abs().amax()
    assert off.median() <= 1e-5, off
    assert (off > 1e-5).sum() <= len(off) // 4, off
    assert off.max() <= 0.05, off
