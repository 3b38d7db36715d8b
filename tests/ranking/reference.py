"""Algorithm 3 of the DQA paper, written down once more: full forward passes, formulas of its own, nothing shared.

Only the qparams come from the quantizers (frozen copies); rounding, clamping and leaving out are done here.
"""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dqa_plugins import DQA, ActivationQuantizer, iter_quantizers


class Layer(NamedTuple):
    order: list[int]
    scores: list[float]
    losses: list[float]


def direct(quantizer: ActivationQuantizer, x: Tensor) -> Tensor:
    """scale * clamp(round(x / scale)) with n-bit codes."""
    scale = quantizer.runtime_qparams(x).scale
    bits = quantizer.method.bits
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if quantizer.signed else (0, 2**bits - 1)
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    return torch.clamp(torch.round(x / safe), low, high) * scale


def algorithm_3(model: nn.Module, batches: list[Any], metric: Any = None, strict: bool = False) -> dict[str, Layer]:
    """One full forward pass per channel and batch."""
    model = copy.deepcopy(model)
    for module in model.modules():
        module.training = False
    quantizers = list(iter_quantizers(model))
    mode: dict[str, Any] = {name: "float" for name, _ in quantizers}
    for name, quantizer in quantizers:
        quantizer.freeze()
        own = quantizer.fake_quantize

        def replaced(x: Tensor, name: str = name, q: Any = quantizer, own: Any = own) -> Tensor:
            if mode[name] == "float":
                return x
            if not isinstance(q.method, DQA):
                return own(x)
            y = direct(q, x)
            axis = q.channel_axis % x.ndim
            keep = torch.zeros(x.shape[axis], dtype=torch.bool)
            keep[mode[name]] = True
            return torch.where(keep.reshape([-1 if i == axis else 1 for i in range(x.ndim)]), x, y)

        object.__setattr__(quantizer, "forward", replaced)

    table = {}
    for name, quantizer in quantizers:
        if not isinstance(quantizer.method, DQA):
            mode[name] = "quantized"
            continue
        scores, losses = [], []
        for channel in range(quantizer.num_channels):
            mode[name] = channel
            found: list[float] = []
            loss: list[float] = []
            for inputs, targets in batches:
                with torch.no_grad():
                    given = inputs if isinstance(inputs, tuple) else (inputs,)
                    outputs = model(**inputs) if isinstance(inputs, dict) else model(*given)
                if metric is None:
                    hits = (outputs.argmax(1) == targets).double().reshape(len(targets), -1).mean(1)
                else:
                    hits = metric(outputs, targets).double()
                found += hits.tolist()
                entropy = nn.functional.cross_entropy(outputs.double(), targets, reduction="none")
                loss += entropy.reshape(len(targets), -1).mean(1).tolist()
            scores.append(math.fsum(found) / len(found))
            losses.append(math.fsum(loss) / len(loss))
        keys = [(-s, 0.0 if strict else e, c) for c, (s, e) in enumerate(zip(scores, losses, strict=True))]
        order = [c for *_, c in sorted(keys)]
        table[name] = Layer(order, scores, losses)
        mode[name] = order[0]
    return table


def assert_same(table: Any, expected: dict[str, Layer], *, exact: bool) -> None:
    """Same layers, same order, same scores; same losses bit for bit (exact) or to 1e-6."""
    assert [layer.name for layer in table] == list(expected)
    for layer in table:
        order, scores, losses = expected[layer.name]
        assert list(layer.order) == order, layer.name
        assert list(layer.scores) == pytest_approx(scores), layer.name
        difference = max(abs(a - b) for a, b in zip(layer.losses, losses, strict=True))
        assert difference <= (1e-14 if exact else 1e-6), (layer.name, difference)


def pytest_approx(values: list[float]) -> Any:
    import pytest

    return pytest.approx(values, rel=1e-14, abs=1e-15)
