"""calibration_mode: statistics, states, names and channel axes."""

from __future__ import annotations

from typing import Any

import brevitas.nn as qnn
import pytest
import torch
from brevitas.graph.calibrate import calibration_mode
from torch import Tensor, nn

from dqa_plugins import DQA, Direct, Method, NoisyQuant, iter_quantizers
from dqa_plugins.adapters.brevitas import DirectAct, DQAAct, get_act_quant
from dqa_plugins.errors import NonFiniteInput, UncalibratedQuantizer
from tests.adapters.brevitas.nets import METHODS, Net, bare, calibrate, data, label, names, quant_net


def only(model: nn.Module) -> Any:
    ((_, quantizer),) = iter_quantizers(model)
    return quantizer


def test_statistics_are_maxima_not_means_of_maxima() -> None:
    batches = data(4, 8, 6, 6)
    model = calibrate(nn.Sequential(qnn.QuantReLU(act_quant=DirectAct, bit_width=4)), batches)
    maxima = [float(x.max()) for x in batches]
    assert float(only(model).scale) * 16 == max(maxima)
    assert max(maxima) > 1.2 * sum(maxima) / len(maxima), "the data cannot tell the two apart"


def test_activations_pass_unquantized_while_calibrating() -> None:
    x = data(4, 8, 6, 6)[0]
    model = nn.Sequential(qnn.QuantReLU(act_quant=DQAAct, bit_width=2))
    with torch.no_grad(), calibration_mode(model):
        assert torch.equal(model(x), x.relu())


@pytest.mark.parametrize("method", METHODS, ids=label)
def test_leaving_the_mode_freezes(method: Method) -> None:
    batches = data(2, 3, 8, 8)
    model = calibrate(quant_net(method), batches)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert {q.state for _, q in iter_quantizers(model)} == {"frozen"}
    model.train()
    model(batches[-1] * 100)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_entering_again_starts_over() -> None:
    large, small = data(4, 8, 6, 6, batches=1)[0] * 10, data(4, 8, 6, 6, batches=1, seed=1)[0]
    model = calibrate(nn.Sequential(qnn.QuantReLU(act_quant=DirectAct)), [large])
    calibrate(model, [small])
    assert torch.equal(model(small), bare(Direct(), [small.relu()], "0")(small.relu()))


def test_entering_again_keeps_a_ranking_and_an_empty_visit_changes_nothing() -> None:
    x = data(4, 8, 6, 6)[0]
    model = calibrate(nn.Sequential(qnn.QuantReLU(act_quant=DQAAct)), [x])
    extra = torch.tensor([3, 0, 0, 0, 0, 0, 0, 3])
    only(model).set_extra_bits(extra)
    expected = model(x)
    calibrate(model, [])
    assert torch.equal(model(x), expected)
    calibrate(model, [x])
    assert torch.equal(only(model).extra_bits, extra)
    assert torch.equal(model(x), expected)


def test_a_disabled_mode_calibrates_nothing() -> None:
    model = nn.Sequential(qnn.QuantReLU(act_quant=DirectAct)).eval()
    with calibration_mode(model, enabled=False):
        pass
    assert only(model).state == "observe"


def test_an_uncalibrated_quantizer_raises_by_name() -> None:
    model: Any = Net()
    model.block.relu2 = qnn.QuantReLU(act_quant=DQAAct, bit_width=4)
    with pytest.raises(UncalibratedQuantizer, match=r"'block.relu2' \(DQA, 4 bits\).*calibration_mode"):
        model.eval()(torch.randn(2, 3, 8, 8))
    with torch.no_grad(), pytest.raises(UncalibratedQuantizer, match=r"'block.relu2'"):
        model.train()(torch.randn(2, 3, 8, 8))  # training mode, but nothing can be trained
    with pytest.raises(UncalibratedQuantizer, match=r"'block.relu2'"):
        model.block.relu2.act_quant.scale()


def test_a_layer_that_calibration_never_ran_raises_when_it_runs() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always = qnn.QuantReLU(act_quant=DirectAct)
            self.rare = qnn.QuantReLU(act_quant=DirectAct)

        def forward(self, x: Tensor, rare: bool = False) -> Any:
            return self.rare(x) if rare else self.always(x)

    model = calibrate(Branches(), data(2, 8, 4))
    model(torch.randn(2, 8, 4))
    with pytest.raises(UncalibratedQuantizer, match=r"'rare'"):
        model(torch.randn(2, 8, 4), rare=True)


def test_bad_data_names_the_layer_and_is_not_taken_for_a_calibration() -> None:
    model = quant_net(DQA())
    good, bad = data(2, 3, 8, 8, batches=2)
    bad[0, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteInput, match=r"'1' \(DQA, 4 bits\) saw \d+ NaN"):
        calibrate(model, [good, bad])
    assert {q.state for _, q in iter_quantizers(model)} == {"observe"}
    with pytest.raises(UncalibratedQuantizer, match=r"complete calibration, which an error cut short after 2 samples"):
        model.eval()(good)
    calibrate(model, [good])
    assert torch.equal(model(good), calibrate(quant_net(DQA()), [good])(good))


def test_calibration_inside_an_except_block_is_complete() -> None:
    """An exception that is being handled around calibration_mode is not one that interrupts it."""
    model = nn.Sequential(qnn.QuantReLU(act_quant=DirectAct))
    try:
        raise MemoryError
    except MemoryError:
        calibrate(model, data(2, 8, 4))
    assert only(model).state == "frozen"


def test_names_are_those_of_the_activation_modules() -> None:
    model = Net()
    model.block.relu2 = qnn.QuantReLU(act_quant=DQAAct)
    model.act = qnn.QuantReLU(act_quant=DirectAct)
    calibrate(model, data(2, 3, 8, 8))
    assert names(model) == ["act", "block.relu2"]  # in order of execution, not of registration
    wrapped = nn.DataParallel(Net())
    wrapped.module.act = qnn.QuantReLU(act_quant=DirectAct)
    calibrate(wrapped, data(2, 3, 8, 8))
    assert names(wrapped) == ["act"]


def test_the_noise_is_that_of_the_site_in_every_framework() -> None:
    model = Net()
    model.block.relu2 = qnn.QuantReLU(act_quant=get_act_quant(NoisyQuant(amplitude=0.5)))
    calibrate(model, data(2, 3, 8, 8))
    assert torch.equal(only(model).noise, bare(NoisyQuant(amplitude=0.5), data(2, 8, 4, 4), "block.relu2").noise)


class Tokens(nn.Module):
    """(B, T, 6) -> (B, T, 8): channels last behind Linear and LayerNorm, through what is elementwise."""

    def __init__(self, *behind: nn.Module, channel_axis: int | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), *behind)
        self.act = qnn.QuantIdentity(act_quant=DQAAct, channel_axis=channel_axis)

    def forward(self, x: Tensor) -> Any:
        y = self.body(x)
        return self.act(y + y)


@pytest.mark.parametrize("behind", [[], [nn.GELU()], [nn.LayerNorm(8)], [nn.Dropout(), nn.SiLU()]])
def test_channels_are_last_behind_linear(behind: list[nn.Module]) -> None:
    model = calibrate(Tokens(*behind).eval(), data(2, 5, 6))
    assert (only(model).channel_axis, only(model).num_channels) == (-1, 8)
    assert model(data(2, 7, 6)[0]).shape == (2, 7, 8), "another number of tokens"


def test_channels_are_first_behind_convolutions_and_where_told() -> None:
    model = calibrate(nn.Sequential(nn.Conv1d(6, 8, 1), nn.ReLU(), qnn.QuantIdentity(act_quant=DQAAct)), data(2, 6, 5))
    assert (only(model).channel_axis, only(model).num_channels) == (1, 8)
    model = calibrate(Tokens(channel_axis=1).eval(), data(2, 5, 6))
    assert (only(model).channel_axis, only(model).num_channels) == (1, 5)
    quantized = nn.Sequential(qnn.QuantLinear(6, 8, True), qnn.QuantReLU(act_quant=DQAAct))
    assert only(calibrate(quantized, data(2, 5, 6))).channel_axis == -1


def test_a_module_that_is_called_twice_contributes_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = qnn.QuantReLU(act_quant=DirectAct)

        def forward(self, x: Tensor) -> Any:
            return self.act(self.act(x) * 3)

    batches = data(2, 8, 4)
    model = calibrate(Twice(), batches)
    assert float(only(model).scale) * 16 == max(float(x.max() * 3) for x in batches)
