"""Modules that storage adds get names that no other module has, whatever the model's own are called."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dqa_plugins import DQA, iter_quantizers
from dqa_plugins.storage import convert_stored, prepare_stored, storage_bound, storage_report, stored_edges


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(4, 4, 1, 2)


class Strided(nn.Module):
    """Two strided shortcuts, `b.down` and `b_down`."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 4, 4, 3, 1 + i % 2, 1) for i in range(7))
        self.b, self.b_down = Block(), nn.Conv2d(4, 4, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.convs[0](x))
        y = self.convs[2](torch.relu(self.convs[1](x))) + self.b.down(x)
        z = torch.relu(self.convs[4](y))
        return self.convs[6](torch.relu(self.convs[5](z))) + self.b_down(z)


class Unpacking(nn.Module):
    """Stored values of modules `a` and `a_unpack`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_unpack, self.c, self.d = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.a_unpack(a)
        return self.d(self.c(b)) + a + b


class Added(nn.Module):
    """A Sequential called `add`, whose first module and the functional add are both called add.0."""

    def __init__(self) -> None:
        super().__init__()
        self.add = nn.Sequential(nn.Conv2d(4, 4, 1))
        self.c, self.d = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.add(x)
        b = a + 1
        return self.d(self.c(a) + self.c(b)) + a + b


@torch.no_grad()
def test_names_that_collide_without_their_dots() -> None:
    for network, channels in ((Strided, 3), (Unpacking, 4), (Added, 4)):
        torch.manual_seed(0)
        model, x = network().eval(), torch.randn(4, channels, 16, 16)
        wanted = model(x)
        prepared = prepare_stored(model, DQA(bits=8, extra_bits=8), x)
        torch.testing.assert_close(prepared(x), wanted, rtol=0, atol=1e-5)
        stored = convert_stored(prepared, "joint")
        assert (stored(x) - wanted).abs().max() < 0.01 * wanted.abs().max(), network
        names = [edge.name for edge in stored_edges(stored)]
        assert len(set(names)) == len(names) == len(storage_bound(stored, tuple(x.shape)))
        assert len({name for name, _ in iter_quantizers(stored)}) == len(names)
        assert storage_report(stored, x).elements > 0


@torch.no_grad()
def test_added_names_are_the_same_each_time() -> None:
    """A state_dict of one conversion loads into another."""
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        model, x = Strided().eval(), torch.randn(4, 3, 16, 16)
        prepared = prepare_stored(model, DQA(), x)
        prepared(x)
        states.append(list(convert_stored(prepared).state_dict()))
    assert states[0] == states[1]


class Self(nn.Module):
    """A layer called self, whose value is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("self", nn.Conv2d(3, 3, 1))
        self.last = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.get_submodule("self")(x)
        return self.last(x.relu()) + x


def test_a_layer_called_self() -> None:
    """torch.fx alone writes code for it in which the layer's result hides the model."""
    model, x = Self().eval(), torch.randn(2, 3, 4, 4)
    prepared = prepare_stored(model, DQA(bits=8, extra_bits=8), x)
    prepared(x)
    torch.testing.assert_close(convert_stored(prepared)(x), model(x), rtol=0, atol=0.1)
