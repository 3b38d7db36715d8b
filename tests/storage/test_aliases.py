"""Values that are changed in place, directly or through another name for their memory, while they are stored."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dqa_plugins import DQA
from dqa_plugins.storage import NothingToStore, convert_stored, prepare_stored
from tests.storage.test_pipeline import fake_quantized


class Changed(nn.Module):
    """a(x) is changed, read at once and read again behind two more layers."""

    def __init__(self, change: Callable[[Changed, Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.drop, self.same, self.relu = nn.Dropout(), nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        h = self.change(self, y)
        return self.b(self.b(h)) + y


def through_slice(_: Changed, y: Tensor) -> Tensor:
    y[:, :2].mul_(0)
    return y


def through_flatten(_: Changed, y: Tensor) -> Tensor:
    y.flatten(1).relu_()
    return y


def through_output(_: Changed, y: Tensor) -> Tensor:
    h = torch.relu(y)
    torch.add(y, 1, out=y)
    return h


def through_augmented_assignment(_: Changed, y: Tensor) -> Tensor:
    h = y
    h **= 2
    h *= 0.5
    return h


def after_a_late_reader(net: Changed, y: Tensor) -> Tensor:
    h = net.b(torch.relu(y)) + y
    y.mul_(2)
    return h


def view_of_a_late_reader(net: Changed, y: Tensor) -> Tensor:
    late = net.b(torch.relu(y))
    y.view(y.shape).mul_(0.5)  # a late reader, whose copy would be changed instead of y
    return late


CHANGES: dict[str, Callable[[Changed, Tensor], Tensor]] = {
    "directly": lambda net, y: y.relu_(),
    "view": lambda net, y: y.view(y.shape).relu_(),
    "Identity": lambda net, y: net.relu(net.same(y)),
    "eval Dropout": lambda net, y: net.relu(net.drop(y)),
    "contiguous": lambda net, y: y.contiguous().relu_(),
    "to": lambda net, y: y.to(torch.float32).relu_(),
    "functional, by position": lambda net, y: F.relu(y, True),
    "operator": lambda net, y: operator.imul(y.detach(), 0.5),
    "slice": through_slice,
    "flatten": through_flatten,
    "out": through_output,
    "augmented assignment": through_augmented_assignment,
    "after a late reader": after_a_late_reader,
    "view of a late reader": view_of_a_late_reader,
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_a_stored_value_is_the_changed_one(change: str) -> None:
    torch.manual_seed(0)
    model, x = Changed(CHANGES[change]).eval(), torch.randn(4, 4, 16, 16)
    try:
        prepared = prepare_stored(model, DQA(bits=8, extra_bits=8), x)
    except NothingToStore:
        assert change in ("out", "view of a late reader")
        return
    wanted = model(x)
    assert torch.equal(prepared(x), wanted)
    stored = convert_stored(prepared, "joint")
    assert torch.equal(stored(x), fake_quantized(prepared)(x))
    assert (stored(x) - wanted).abs().max() < 0.01 * wanted.abs().max()


@torch.no_grad()
def test_exported_programs_too() -> None:
    torch.manual_seed(0)
    for name in ("directly", "view", "slice", "flatten", "eval Dropout", "augmented assignment"):
        model, x = Changed(CHANGES[name]).eval(), torch.randn(4, 4, 16, 16)
        wanted = model(x)
        exported = torch.export.export(model, (x,)).module()
        prepared = prepare_stored(exported, DQA(bits=8, extra_bits=8), x)
        prepared(x)
        assert (convert_stored(prepared)(x) - wanted).abs().max() < 0.01 * wanted.abs().max(), name
