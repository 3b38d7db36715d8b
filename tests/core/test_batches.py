"""What an item of a DataLoader is: the same for every call that runs a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dqa_plugins.batches import ItemReader
from dqa_plugins.errors import UncalibratedQuantizer, UnsupportedInput

X, Y, T = torch.ones(2, 3), torch.full((2, 3), 2.0), torch.tensor([0, 1])


class One(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Masked(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x if mask is None else x * mask


class Optional(nn.Module):  # as of a transformer: no parameter is required
    def forward(self, ids: Tensor | None = None, mask: Tensor | None = None, **more: Any) -> Any:
        return ids


class Anything(nn.Module):
    def forward(self, *args: Any) -> Any:
        return args[0]


def read(model: nn.Module, item: Any, targets_are: Any = "unused", **picks: Any) -> tuple[Any, Any]:
    call = ItemReader(model, "the_call", targets_are, **picks).read(item)
    return call.inputs, call.targets


@pytest.mark.parametrize("wrap", [tuple, list])
@pytest.mark.parametrize(
    ("model", "item", "inputs", "targets"),
    [
        (One(), (X,), (X,), None),
        (One(), (X, T), (X,), T),
        (Two(), (X, Y), (X, Y), None),
        (Two(), (X, Y, T), (X, Y), T),
        (Masked(), (X,), (X,), None),
        (Optional(), (X,), (X,), None),
        (Anything(), (X,), (X,), None),
        (Optional(), ({"ids": X}, T), {"ids": X}, T),
        (One(), ({"x": X}, T), {"x": X}, T),
        (One(), ({"of": "another"}, T), ({"of": "another"},), T),
    ],
)
def test_a_sequence_is_read_by_the_parameters(
    wrap: Any, model: nn.Module, item: Any, inputs: Any, targets: Any
) -> None:
    assert read(model, wrap(item)) == (inputs, targets)


@pytest.mark.parametrize("wrapped", [nn.DataParallel, torch.compile, torch.fx.symbolic_trace])
def test_wrappers_are_looked_through(wrapped: Any) -> None:
    assert read(wrapped(One()), (X, T)) == ((X,), T)
    with pytest.raises(UnsupportedInput, match="2 inputs by position"):
        read(wrapped(Two()), (X,))


@pytest.mark.parametrize(
    ("model", "item", "message"),
    [
        (Masked(), (X, Y), "could be targets or optional parameters"),
        (Optional(), (X, Y), "could be targets or optional parameters"),
        (Anything(), (X, T), "could be targets or optional parameters"),
        (One(), (X, Y, T), "takes 1 input by position"),
        (Two(), (X,), "takes 2 inputs by position"),
        (Masked(), (X, Y, T), "takes 1 to 2 inputs by position"),
        (One(), "photo.png", "is a str, for One: it is no tensor"),
        (One(), None, "is a NoneType, for One"),
    ],
)
def test_what_does_not_fit_says_how_to_settle_it(model: nn.Module, item: Any, message: str) -> None:
    with pytest.raises(UnsupportedInput, match=rf"the_call: batch 7 .*{message}.*Give inputs=") as e:
        ItemReader(model, "the_call").read(item, 7)
    assert "targets=" not in str(e.value)


def test_where_targets_are_needed() -> None:
    for inputs, expected in ((X, (X,)), ((X, Y), (X, Y)), ([X, Y], (X, Y)), ({"x": X}, {"x": X})):
        assert read(Two(), (inputs, T), "needed") == (expected, T)
        assert read(Two(), [inputs, T], "needed") == (expected, T)
    for item in (X, {"x": X}, (X,), (X, Y, T), ("photo.png", T)):
        with pytest.raises(UnsupportedInput, match="targets=, likewise"):
            read(Two(), item, "needed")


def test_where_targets_may_be_there() -> None:
    assert read(One(), X, "optional") == ((X,), None)
    assert read(One(), (X, T), "optional") == ((X,), T)
    assert read(Two(), (X, Y), "optional") == ((X, Y), None)


def test_functions_settle_it() -> None:
    item = {"image": X, "mask": Y, "label": T}
    inputs, targets = (lambda b: (b["image"], b["mask"])), (lambda b: b["label"])
    assert read(Masked(), item, inputs=inputs) == ((X, Y), None)
    assert read(Masked(), item, "needed", inputs=inputs, targets=targets) == ((X, Y), T)
    assert read(One(), (X, Y, T), inputs=lambda b: {"x": b[1]}) == ({"x": Y}, None)
    assert read(One(), X, "needed", targets=lambda b: b.argmax(1))[0] == (X,)
    assert read(One(), ((X, Y), T), "needed", inputs=lambda b: b[0][1]) == ((Y,), T)
    with pytest.raises(UnsupportedInput, match="inputs= made a str"):
        read(One(), item, inputs=lambda b: "x")
    with pytest.raises(UnsupportedInput, match="needs pairs"):
        read(One(), item, "needed", inputs=lambda b: b["image"])


def test_iterables() -> None:
    reader = ItemReader(One(), "the_call")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, T), batch_size=1)
    assert [tuple(c(One()).shape) for c in reader.items(loader)] == [(1, 3), (1, 3)]
    for single in (X, {"x": X}, "photo.png", 3):
        with pytest.raises(UnsupportedInput, match=r"the_call takes an iterable.*give \[batch\]"):
            next(reader.items(single))
    with pytest.raises(UncalibratedQuantizer, match="the_call got no batches"):
        next(reader.items([]))
