"""Small networks, calibration and the quantizers to compare with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import brevitas.nn as qnn
import torch
from brevitas.graph.calibrate import calibration_mode
from torch import Tensor, nn

from dqa_plugins import DQA, ActivationQuantizer, DenseSparse, Direct, Method, NoisyQuant, iter_quantizers
from dqa_plugins.adapters.brevitas import DenseSparseAct, DirectAct, DQAAct, NoisyQuantAct

ACTS: dict[type[Method], Any] = {
    Direct: DirectAct,
    DQA: DQAAct,
    NoisyQuant: NoisyQuantAct,
    DenseSparse: DenseSparseAct,
}
METHODS = [Direct(), DQA(bits=3, extra_bits=2), NoisyQuant(seed=3), DenseSparse(density=0.05)]
SOURCES = ["static", "dynamic"]


def label(method: Method) -> str:
    return method.name


def data(*shape: int, batches: int = 3, seed: int = 0) -> list[Tensor]:
    """Batches of growing width: the mean of their maxima is far below the maximum."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) * (i + 1) for i in range(batches)]


def calibrate(model: Any, batches: Iterable[Tensor]) -> Any:
    """Brevitas' own calibration; eval mode afterwards."""
    with torch.no_grad(), calibration_mode(model):
        for batch in batches:
            model(batch)
    return model.eval()


def bare(method: Method, batches: Iterable[Tensor], name: str, axis: int = 1) -> ActivationQuantizer:
    """An ActivationQuantizer outside any framework, calibrated on the same tensors."""
    quantizer = ActivationQuantizer(method, name=name, producer_axis=axis)
    for batch in batches:
        quantizer(batch)
    return quantizer.freeze()


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in iter_quantizers(model)]


class Block(nn.Module):
    """A residual block of float layers: (B, C, H, W) -> the same."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(y)) + x)


class Net(nn.Module):
    """(B, 3, H, W) -> (B, 4), float."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.act = nn.ReLU()
        self.block = Block()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.block(self.act(self.stem(x)))).flatten(1))


def float_net(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return Net().eval()


def quant_net(method: Method, **kwargs: Any) -> Any:
    """Brevitas layers written by hand: quantized weights, our method behind each ReLU. (B, 3, 8, 8) -> (B, 5)."""
    torch.manual_seed(0)
    act = {"act_quant": ACTS[type(method)], "method": method, **kwargs}
    return nn.Sequential(
        qnn.QuantConv2d(3, 8, 3, weight_bit_width=4),
        qnn.QuantReLU(**act),
        qnn.QuantConv2d(8, 8, 3, weight_bit_width=4),
        qnn.QuantReLU(**act),
        nn.Flatten(),
        qnn.QuantLinear(128, 5, True, weight_bit_width=4),
    )
