"""Networks that the command line is given by reference."""

from __future__ import annotations

from typing import Any

import torch

from dqa_plugins import DQA
from dqa_plugins.adapters import fx
from tests.adapters.networks import batches, build


def network() -> tuple[Any, Any, Any]:
    x = batches("branches", 1)[0]
    expected = build("branches")(x).detach()
    return build("branches"), [x], lambda model: -float((model(x) - expected).square().mean())


def converted() -> tuple[Any, torch.Tensor]:
    data = batches("branches", 1)
    return fx.quantize_model(build("branches"), DQA(bits=4), data), data[0]


def nothing() -> None:
    return None


def broken() -> float:
    return 1 / 0
