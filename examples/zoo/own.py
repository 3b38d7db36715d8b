"""Networks written here: those of the examples, and what the packages have little of (recurrence, two inputs)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.networks import NETWORKS

from .entry import Entry


class Tagger(nn.Module):
    """Embedding, a bidirectional LSTM, a Linear per token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(50, 16), nn.LSTM(16, 16, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(ids))[0])


class Encoder(nn.Module):
    """nn.TransformerEncoderLayer twice, on (B, T, C)."""

    def __init__(self) -> None:
        super().__init__()
        layers = [
            nn.TransformerEncoderLayer(32, 4, 64, 0.0, "gelu", batch_first=True, norm_first=k > 0) for k in (0, 1)
        ]
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean(1))


class Matcher(nn.Module):
    """Two images through one network, their difference and product through another."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ELU()
        )
        self.head = nn.Linear(64, 4)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        a, b = self.body(first).mean((2, 3)), self.body(second).mean((2, 3))
        return self.head(torch.cat([a - b, a * b], 1))


ENTRIES = {
    "resnet32": Entry("cnn", "examples", NETWORKS["resnet32"], shape=(1, 16, 16)),
    "unet": Entry("segmentation", "examples", NETWORKS["unet"], shape=(1, 32, 32)),
    "espcn": Entry("super-resolution", "examples", NETWORKS["espcn"], shape=(1, 24, 24)),
    "digits_vit": Entry("vision transformer", "examples", NETWORKS["vit"], shape=(1, 16, 16)),
    "lstm_tagger": Entry("text", "examples", Tagger, shape=(9,), ids=50),
    "encoder_layers": Entry("text", "examples", Encoder, shape=(9, 32)),
    "matcher": Entry("two inputs", "examples", Matcher, shape=(3, 32, 32), inputs=2),
}
