"""QPP where tensors have other rows than samples, with several inputs, keyword inputs, both modes: in every room."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dqa_plugins import QPP, DenseSparse, Direct, iter_quantizers
from dqa_plugins.errors import DQAWarning

ROOMS = ("fx", "pt2e", "brevitas", "nncf")
rooms = pytest.mark.parametrize("room", ROOMS)


def predicted(**fields: Any) -> DenseSparse:
    return DenseSparse(bits=6, density=0.05, qparams=QPP(**fields))


def data(*shapes: tuple[int, ...], seed: int = 0) -> list[tuple[Tensor, ...]]:
    """Six batches of samples of different magnitude."""
    g = torch.Generator().manual_seed(seed)

    def batch(shape: tuple[int, ...]) -> Tensor:
        scale = 0.5 + 3 * torch.rand(shape[0], *[1] * (len(shape) - 1), generator=g)
        return torch.randn(shape, generator=g) * scale

    return [tuple(batch(shape) for shape in shapes) for _ in range(6)]


def quantize(room: str, model: nn.Module, method: Any, items: list[Any]) -> tuple[nn.Module, list[str]]:
    """(the quantized model, what QPP warned of)."""
    run = importlib.import_module(f"dqa_plugins.adapters.{room}").quantize_model
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = run(model, method, items)
    messages = [str(w.message) for w in caught if issubclass(w.category, DQAWarning)]
    return found, [m for m in messages if m.startswith("QPP")]


def sources(model: nn.Module) -> dict[str, bool]:
    """{site: whether its parameters are predicted}."""
    return {n: q.predictor is not None and not q.predictor.reason for n, q in iter_quantizers(model)}


class Windows(nn.Module):
    """Linears on patches, then on windows of 2 x 2, which are rows of a larger batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x)).view(-1, 2, 2, 2, 2, 8).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 8)
        y = torch.relu(self.b(y)).view(-1, 2, 2, 2, 2, 8).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 4, 8)
        return self.c(y)


@rooms
def test_windows_keep_static_parameters_and_one_warning_names_them(room: str) -> None:
    torch.manual_seed(0)
    model, items = Windows().eval(), data((8, 4, 4, 8))
    found, said = quantize(room, model, predicted(sites=("input",)), items)
    assert sources(found) == {"input.0": True, "relu.0": True, "relu.1": False, "c": True}
    assert len(said) == 1
    assert "'relu.1'" in said[0]
    with torch.no_grad():
        x, expected = items[0][0], model(items[0][0])
        y = found(x)
        assert float((y - expected).norm() / expected.norm()) < 0.1
        assert torch.equal(found(x[:3]), y[:3]) or torch.allclose(found(x[:3]), y[:3], atol=1e-5)
        # a quantizer behind the windows is predicted as if they were not there: nothing of theirs is read
        behind = dict(iter_quantizers(found))["c"].predictor
        assert behind is not None
        assert behind.history == ("input.0", "relu.0")


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.c(torch.relu(self.a(first)) + torch.relu(self.b(second)))


@rooms
@pytest.mark.parametrize("quantized_input", [True, False])
def test_two_inputs_given_in_any_way(room: str, quantized_input: bool) -> None:
    """A second input failed in Brevitas; keyword inputs were counted in the order in which they came."""
    torch.manual_seed(0)
    model, items = Two().eval(), data((8, 8), (8, 6))
    method = {"": predicted(sites=("input",)), **({} if quantized_input else {"input": None})}
    found, _ = quantize(room, model, method, items)
    static = {name for name, ok in sources(found).items() if not ok}
    assert static == (set() if quantized_input else {"relu.1"}), "the first input says nothing of the second"
    named: list[Any] = [{"second": second, "first": first} for first, second in items]
    other, _ = quantize(room, model, method, named)
    assert list(sources(other)) == list(sources(found))
    with torch.no_grad():
        first, second = items[0]
        expected = found(first, second)
        torch.testing.assert_close(other(second=second, first=first), expected, rtol=1e-5, atol=1e-5)
        exact = model(first, second)
        assert float((expected - exact).norm() / exact.norm()) < 0.25


@rooms
def test_an_input_with_other_rows(room: str) -> None:
    torch.manual_seed(0)

    class Shared(Two):
        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return self.c(torch.relu(self.a(first)) + torch.relu(self.b(second)).sum(0, keepdim=True))

    items = data((8, 8), (3, 6))
    found, said = quantize(room, Shared().eval(), predicted(sites=("input",)), items)
    assert [name for name, ok in sources(found).items() if not ok] == ["relu.1", "sum.0"]
    assert len(said) == 1
    assert "'relu.1', 'sum.0'" in said[0]
    with torch.no_grad():
        assert found(*items[0]).shape == (8, 4)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.r1 = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.b, self.r2, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.r2(self.b(self.r1(self.a(x)))).mean((2, 3)))


@rooms
@pytest.mark.parametrize("modes", [("paper", "extended"), ("extended", "paper")], ids=str)
def test_both_modes_and_other_methods_in_one_model(room: str, modes: tuple[Any, Any]) -> None:
    torch.manual_seed(0)
    model, items = Plain().eval(), data((8, 3, 6, 6))
    method = {"": predicted(mode=modes[0]), "r2": predicted(mode=modes[1]), "fc": Direct(bits=8)}
    found, _ = quantize(room, model, method, items)
    with torch.no_grad():
        expected = model(*items[0])
        assert float((found(*items[0]) - expected).norm() / expected.norm()) < 0.1
    assert sources(found)["r2"]
