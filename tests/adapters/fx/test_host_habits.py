"""FX's own switches, custom modules and conversions of a QConfigMapping, with our methods."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.nn import quantizable
from torch.ao.quantization import (
    QConfigMapping,
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
    enable_observer,
    get_default_qconfig_mapping,
)
from torch.ao.quantization.fx.custom_config import ConvertCustomConfig, PrepareCustomConfig
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

from dqa_plugins import Direct, iter_quantizers
from dqa_plugins.adapters.fx import get_qconfig_mapping, quantize_model
from dqa_plugins.errors import UnsupportedCombination, UnsupportedInput

X = (torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0)),)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in iter_quantizers(model)]


def test_switches_of_training() -> None:
    """`apply(disable_observer)` and `apply(disable_fake_quant)` were ignored in silence."""
    prepared = prepare_qat_fx(net().train(), get_qconfig_mapping(Direct(), weight_bits=None), X)
    prepared(*X)
    site = dict(iter_quantizers(prepared))["1"]
    before = site.scale.clone()
    prepared.apply(disable_observer)
    quantized = prepared(10 * X[0])
    assert torch.equal(site.scale, before)
    prepared.apply(disable_fake_quant)
    torch.testing.assert_close(prepared(*X), net()(*X))
    prepared.apply(enable_fake_quant)
    assert torch.equal(prepared(10 * X[0]), quantized)
    prepared.apply(enable_observer)
    prepared(10 * X[0])
    assert site.scale > before


def test_the_observer_switch_while_calibrating() -> None:
    prepared = prepare_fx(net(), get_qconfig_mapping(Direct()), X)
    prepared(*X)
    prepared.apply(disable_observer)
    prepared(100 * X[0])
    reference = prepare_fx(net(), get_qconfig_mapping(Direct()), X)
    reference(*X)
    scales = [[q.scale for _, q in iter_quantizers(convert_fx(p))] for p in (prepared, reference)]
    assert scales[0] == scales[1]


def test_a_mapping_from_a_dict_still_skips() -> None:
    mapping = get_qconfig_mapping(Direct(), skip=("first",))
    for again in (QConfigMapping.from_dict(mapping.to_dict()), mapping.to_dict()):
        assert names(prepare_fx(net(), again, X)) == names(prepare_fx(net(), mapping, X)) == ["1", "2"]


def test_quantized_outputs_are_refused() -> None:
    """The output was float, in silence."""
    custom = PrepareCustomConfig().set_output_quantized_indexes([0])
    with pytest.raises(UnsupportedCombination, match=r"set_output_quantized_indexes\(\[0\]\)"):
        prepare_fx(net(), get_qconfig_mapping(Direct()), X, custom)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.lstm = nn.Linear(4, 6), nn.LSTM(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(self.fc(x))[0]


def test_a_static_lstm_is_refused_with_the_way_out() -> None:
    custom = PrepareCustomConfig().set_float_to_observed_mapping(nn.LSTM, quantizable.LSTM)
    x = (torch.randn(3, 2, 4),)
    with pytest.raises(UnsupportedCombination, match=r"'lstm'.*set_float_to_observed_mapping"):
        prepare_fx(Recurrent().eval(), get_qconfig_mapping(Direct()), x, custom)
    assert names(prepare_fx(Recurrent().eval(), get_qconfig_mapping(Direct()), x)) == ["input.0", "fc"]


class Doubled(nn.Module):
    def __init__(self, conv: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = conv or nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * 2


class Observed(Doubled):
    @classmethod
    def from_float(cls, module: Any) -> Observed:
        found = cls(module.conv)
        found.qconfig = module.qconfig
        return found


class Converted(Doubled):
    @classmethod
    def from_observed(cls, module: Any) -> Converted:
        return cls(module.conv)


def test_the_quantizer_behind_a_custom_module_stays() -> None:
    """It was turned into `x.dequantize()` of a float tensor."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Doubled(), nn.Conv2d(3, 2, 1)).eval()
    custom = PrepareCustomConfig().set_float_to_observed_mapping(Doubled, Observed)
    prepared = prepare_fx(model, get_qconfig_mapping(Direct(bits=8)), X, custom)
    assert names(prepared) == ["input.0", "0", "1", "2"]
    prepared(*X)
    converted = convert_fx(prepared, ConvertCustomConfig().set_observed_to_quantized_mapping(Observed, Converted))
    assert names(converted) == ["input.0", "0", "1", "2"]
    assert type(converted.get_submodule("1")) is Converted
    expected = model(*X)
    assert 0 < float((converted(*X) - expected).norm() / expected.norm()) < 0.03


def test_converted_models_are_traced_and_prepared_again_by_torch() -> None:
    """A quantizer is a leaf; ours refuse to quantize twice."""
    converted = quantize_model(net(), Direct(), [X])
    traced = torch.fx.symbolic_trace(converted)
    assert torch.equal(traced(*X), converted(*X))
    assert names(traced) == names(converted)
    again = prepare_fx(converted, get_default_qconfig_mapping(), X)
    again(*X)
    assert names(convert_fx(again)) == names(converted)
    with pytest.raises(UnsupportedInput, match="quantized already"):
        prepare_fx(converted, get_qconfig_mapping(Direct()), X)
