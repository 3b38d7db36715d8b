"""A run that only looks leaves no trace."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace

from dqa_plugins.graph.record import record_shapes


class Positions(nn.Module):
    """One row of positions, expanded to the batch as transformers keep them, and a statistic that each call moves."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positions", torch.arange(4.0).expand(3, 4))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(x.mean() + 1)
        return x + self.positions


def test_buffers_are_put_back_expanded_ones_too() -> None:
    """Several elements of an expanded buffer are one number: copying into it failed, and no shape was known."""
    model = Positions()
    traced = symbolic_trace(model)
    seen = record_shapes(traced, (torch.zeros(3, 4),))
    assert {found.shape for found in seen.values() if found.shape} == {(3, 4), (1,)}
    assert traced.calls.item() == 0
    assert traced.positions.stride() == (0, 1)
