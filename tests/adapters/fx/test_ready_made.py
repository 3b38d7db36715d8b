"""The ready-made mappings: fresh ones with the defaults that were measured."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from dqa_plugins import DQA, iter_quantizers
from dqa_plugins.adapters import fx
from dqa_plugins.adapters.fx import get_qconfig
from dqa_plugins.adapters.fx.config import READY_MADE


def chain(layers: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(4, 4), nn.ReLU()))).eval()


@pytest.mark.parametrize("name", READY_MADE)
@pytest.mark.parametrize("layers", [1, 3, 4, 5])
def test_ends_stay_float_where_enough_is_left(name: str, layers: int) -> None:
    x = torch.randn(64, 4)
    prepared = prepare_fx(chain(layers), getattr(fx, name), (x,))
    prepared(x)
    found = dict(iter_quantizers(convert_fx(prepared)))
    inner = range(layers) if layers <= 3 else range(1, layers - 1)
    outputs = [f"{2 * k + 1}" for k in inner]
    assert [site for site in found if site in outputs] == outputs
    assert ("input.0" in found) == (layers <= 3)
    assert {q.method for q in found.values()} == {READY_MADE[name]}


def test_each_access_gives_a_mapping_of_its_own() -> None:
    mine = fx.dqa_qconfig
    mine.set_module_name("1", get_qconfig(DQA(bits=8)))
    x = torch.randn(8, 4)
    bits = {q.method.bits for _, q in iter_quantizers(prepare_fx(chain(2), fx.dqa_qconfig, (x,)))}
    assert bits == {4}
    with pytest.raises(AttributeError, match="no attribute 'dqaa_qconfig'"):
        _ = fx.dqaa_qconfig
