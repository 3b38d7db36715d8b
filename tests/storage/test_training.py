"""Gradients pass through packed values as they pass through the quantizer, and the floats still go."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dqa_plugins import DQA, DenseSparse, Direct, Method
from dqa_plugins.storage import convert_stored, prepare_stored, storage_report
from tests.storage.test_pipeline import fake_quantized, network


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c0, self.c1, self.c2 = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.c0(x)
        return self.c2(F.relu(self.c1(F.relu(y)))) + y


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


METHODS = [DQA(bits=3), DQA(bits=3, qparams="dynamic"), Direct(bits=4, symmetric=False, clip=0.9), DenseSparse(bits=3)]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{m.qparams}")
def test_gradients_equal_those_of_the_fake_quantized_model(method: Method) -> None:
    torch.manual_seed(0)
    for model, x in ((Residual(), torch.randn(2, 4, 8, 8)), network()):
        prepared = prepare_stored(model.train(), method, x)
        prepared(x)
        stored, wanted = convert_stored(prepared), fake_quantized(prepared)
        fresh = 1.3 * x  # beyond the calibrated range: no gradient there
        found, expected = gradients(stored, fresh), gradients(wanted, fresh)
        assert set(found) == set(expected) == {name for name, _ in model.named_parameters()}
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, msg=lambda m, name=name: f"{name}: {m}")


def test_a_stored_value_takes_no_memory_for_its_gradient() -> None:
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(2, 4, 8, 8)
    prepared = prepare_stored(model, DQA(), x)
    prepared(x)
    stored = convert_stored(prepared)
    (pack,) = (m for m in stored.modules() if type(m).__name__ == "Pack")
    packed = pack(stored.c0(x))
    assert packed.anchor.shape == (2, 4, 8, 8)
    assert packed.anchor.untyped_storage().nbytes() == 4
    assert storage_report(stored, x).elements == packed.numel
    twice = copy.deepcopy(stored)
    assert gradients(twice, x).keys() == gradients(stored, x).keys()
