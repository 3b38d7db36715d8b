"""A small vision transformer on digits: 16 tokens of 64 channels, three blocks, about 100 k parameters.

Dosovitskiy et al., "An image is worth 16x16 words" (2021), pre-norm, with the mean over the tokens in the
place of a class token. Attention is written out (Linear, matmul, softmax, matmul), so that every tensor a
quantizer may want has a node of its own. Sizes come from the constructor: nothing reads a shape, so the
network traces at any batch.

Activations between blocks are (N, T, C): channels are the last axis.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Multi-head self-attention: (N, T, C) -> (N, T, C).

    Args:
        channels: C, a multiple of ``heads``.
        heads: number of heads, C / heads channels each.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"channels must be a multiple of heads: {channels}, {heads}")
        self.split = (heads, channels // heads)
        self.temperature = (channels // heads) ** -0.5
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.softmax = nn.Softmax(dim=-1)
        self.project = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x).unflatten(2, self.split).transpose(1, 2)  # (N, heads, T, C / heads)
        key = self.key(x).unflatten(2, self.split).transpose(1, 2)
        value = self.value(x).unflatten(2, self.split).transpose(1, 2)
        scores = torch.matmul(query, key.transpose(2, 3)) * self.temperature  # (N, heads, T, T)
        weights = self.softmax(scores)
        return self.project(torch.matmul(weights, value).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """``x = x + attention(norm1(x)); x = x + fc2(gelu(fc1(norm2(x))))``: (N, T, C) -> (N, T, C)."""

    def __init__(self, channels: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attention = SelfAttention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, hidden)
        self.gelu = nn.GELU()
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(self.gelu(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Patches as tokens, blocks, the mean over the tokens, a linear classifier.

    Args:
        size: height and width of the image.
        patch: height and width of a patch, a divisor of ``size``; T = (size / patch) ** 2 tokens.
        in_channels: channels of the image.
        classes: number of outputs.
        channels: C of the tokens.
        depth: number of blocks.
        heads: heads of the attention.
        hidden: channels inside the MLP.

    Shapes: (N, in_channels, size, size) -> (N, classes) logits.
    """

    def __init__(
        self,
        size: int = 16,
        patch: int = 4,
        in_channels: int = 1,
        classes: int = 10,
        channels: int = 64,
        depth: int = 3,
        heads: int = 4,
        hidden: int = 128,
    ) -> None:
        super().__init__()
        if size % patch:
            raise ValueError(f"patch must divide size: {size}, {patch}")
        self.grid = (size // patch, patch)
        self.embed = nn.Linear(in_channels * patch * patch, channels)
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, channels))
        self.blocks = nn.Sequential(*(TransformerBlock(channels, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(channels)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        # (N, c, rows, patch, columns, patch) -> (N, rows, columns, c, patch, patch) -> (N, T, c * patch ** 2)
        x = x.unflatten(3, self.grid).unflatten(2, self.grid).permute(0, 2, 4, 1, 3, 5)
        tokens = self.embed(x.flatten(3).flatten(1, 2)) + self.position
        tokens = self.norm(self.blocks(tokens))
        return self.fc(tokens.mean(1))


def vit() -> VisionTransformer:
    """The network whose weights are shipped."""
    return VisionTransformer()
