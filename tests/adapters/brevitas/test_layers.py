"""Our methods as act_quant of Brevitas layers: the same numbers as a bare quantizer, and every argument checked."""

from __future__ import annotations

from typing import Any

import brevitas.nn as qnn
import pytest
import torch
from brevitas.inject import ExtendedInjector
from torch import Tensor, nn

from dqa_plugins import DQA, DenseSparse, Direct, Method, NoisyQuant, iter_quantizers
from dqa_plugins.adapters.brevitas import DenseSparseAct, DirectAct, DQAAct, NoisyQuantAct, get_act_quant
from dqa_plugins.errors import InvalidMethod, NotAMethod, UnsupportedCombination
from tests.adapters.brevitas.nets import ACTS, METHODS, SOURCES, bare, calibrate, data, label, names

LAYERS: list[tuple[Any, Any, dict[str, float]]] = [
    (qnn.QuantReLU, torch.relu, {}),
    (qnn.QuantIdentity, lambda x: x, {}),
    (qnn.QuantHardTanh, nn.Hardtanh(-0.5, 2.0), {"min_val": -0.5, "max_val": 2.0}),
    (qnn.QuantSigmoid, torch.sigmoid, {}),
    (qnn.QuantTanh, torch.tanh, {}),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda case: case[0].__name__)
@pytest.mark.parametrize("qparams", SOURCES)
@pytest.mark.parametrize("method", METHODS, ids=label)
def test_a_layer_equals_a_bare_quantizer_bit_for_bit(
    method: Method, qparams: str, layer: tuple[Any, Any, dict[str, float]]
) -> None:
    method = method.replace(qparams=qparams)
    kind, function, bounds = layer
    batches = data(4, 8, 6, 6)
    model = calibrate(nn.Sequential(kind(act_quant=ACTS[type(method)], method=method, **bounds)), batches)
    expected = bare(method, [function(x) for x in batches], "0")
    x = data(5, 8, 6, 6, batches=1, seed=9)[0] * 5
    assert torch.equal(model(x), expected(function(x)))
    for name, buffer in expected.state_dict().items():
        if name != "_extra_state":  # the index differs
            assert torch.equal(model[0].act_quant.quantizer.state_dict()[name], buffer), name


@pytest.mark.parametrize("batch_dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(batch_dtype: torch.dtype) -> None:
    batches = [x.to(batch_dtype) for x in data(4, 8, 6, 6)]
    model = calibrate(nn.Sequential(qnn.QuantIdentity(act_quant=DQAAct)), batches)
    expected = bare(DQA(), batches, "0")
    assert torch.equal(model(batches[0]), expected(batches[0]))
    assert model(batches[0]).dtype == batch_dtype


@pytest.mark.parametrize(
    ("act", "arguments", "method"),
    [
        (DQAAct, {}, DQA()),
        (DQAAct, {"bit_width": 4, "extra_bits": 3}, DQA(bits=4, extra_bits=3)),
        (DQAAct, {"ratio": 0.1, "signed": True, "clip": 0.99}, DQA(ratio=0.1, signed=True, clip=0.99)),
        (DirectAct, {"bit_width": 6, "symmetric": False}, Direct(bits=6, symmetric=False)),
        (DirectAct, {"bits": 6, "granularity": "channel"}, Direct(bits=6, granularity="channel")),
        (NoisyQuantAct, {"seed": 7, "amplitude": 0.5, "mean": None}, NoisyQuant(seed=7, amplitude=0.5, mean=None)),
        (DenseSparseAct, {"density": 0.1, "qparams": "dynamic"}, DenseSparse(density=0.1, qparams="dynamic")),
        (DenseSparseAct, {"channel_axis": -1, "reduce": "max"}, DenseSparse(channel_axis=-1, reduce="max")),
        (DirectAct, {"qparams": "dynamic", "scope": "batch"}, Direct(qparams="dynamic", scope="batch")),
        (get_act_quant(DQA(bits=2, ratio=0.7)), {"extra_bits": 1}, DQA(bits=2, ratio=0.7, extra_bits=1)),
    ],
)
def test_arguments_become_fields(act: type[ExtendedInjector], arguments: dict[str, Any], method: Method) -> None:
    assert qnn.QuantReLU(act_quant=act, **arguments).act_quant.quantizer.method == method


@pytest.mark.parametrize(
    ("act", "arguments", "words"),
    [
        (DQAAct, {"extra_bit": 3}, "extra_bit"),  # a slip of the pen
        (DirectAct, {"extra_bits": 3}, "extra_bits"),  # a field of another method
        (DQAAct, {"scaling_impl_type": "const"}, "scaling_impl_type"),  # of a stock quantizer: would be ignored
        (DQAAct, {"bit_width": 4, "extra_bits": 5}, "extra_bits=5"),
        (DQAAct, {"bit_width": 9}, "bits=9"),
        (DQAAct, {"bit_width": 4, "bits": 4}, "bit_width"),
        (DQAAct, {"min_val": 0.0}, "min_val"),  # a ReLU has no lower bound to move
    ],
)
def test_a_wrong_argument_is_named(act: type[ExtendedInjector], arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidMethod, match=words):
        qnn.QuantReLU(act_quant=act, **arguments)


def test_output_objective_is_refused() -> None:
    with pytest.raises(UnsupportedCombination, match=r"next linear layer.*FX or PT2E"):
        qnn.QuantReLU(act_quant=NoisyQuantAct, objective="output")
    with pytest.raises(UnsupportedCombination, match=r"objective='activation'"):
        qnn.QuantIdentity(act_quant=get_act_quant(NoisyQuant.official()))


def test_get_act_quant_takes_methods_only() -> None:
    with pytest.raises(NotAMethod, match=r"did you mean DQA"):
        get_act_quant(DQA)


def test_bounds_are_applied_not_turned_into_a_scale() -> None:
    """Stock QuantHardTanh leaves its Hardtanh out, and QuantReLU(max_val=6) stands for ReLU6 in Brevitas' own map."""
    x = torch.linspace(-20, 20, 64).reshape(2, 8, 4)
    wide = calibrate(nn.Sequential(qnn.QuantReLU(act_quant=DirectAct, bit_width=8, max_val=6.0)), [x])
    assert float(wide(x).max()) <= 6
    assert torch.equal(wide(x), bare(Direct(bits=8), [nn.functional.relu6(x)], "0")(nn.functional.relu6(x)))


def test_input_and_output_quant_of_weight_layers() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = qnn.QuantConv2d(
                3, 8, 3, input_quant=DQAAct, input_bit_width=3, output_quant=DenseSparseAct, output_density=0.1
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    model = calibrate(Two(), data(2, 3, 8, 8))
    found = {name: quantizer.method for name, quantizer in iter_quantizers(model)}
    assert found == {"conv.input_quant": DQA(bits=3), "conv": DenseSparse(density=0.1)}


def test_layers_can_share_a_proxy() -> None:
    first = qnn.QuantIdentity(act_quant=DirectAct, return_quant_tensor=True)
    model = nn.Sequential(first, qnn.QuantIdentity(act_quant=first.act_quant))
    x = data(2, 8, 4)
    calibrate(model, x)
    ((name, quantizer),) = iter_quantizers(model)
    assert (name, quantizer.calibrated) == ("0", True)
    assert torch.equal(model(x[0]), bare(Direct(), x, "0")(x[0]))
    noisy = qnn.QuantIdentity(act_quant=NoisyQuantAct)
    with pytest.raises(UnsupportedCombination, match="noise of each channel"):
        qnn.QuantIdentity(act_quant=noisy.act_quant, return_quant_tensor=True)


def test_one_model_mixes_methods_bits_and_float_layers() -> None:
    model = nn.Sequential(
        *(qnn.QuantIdentity(act_quant=get_act_quant(m.replace(bits=2 + i))) for i, m in enumerate(METHODS) if i != 1),
        nn.ReLU(),
        qnn.QuantReLU(act_quant=DQAAct, bit_width=8, qparams="dynamic"),
        qnn.QuantReLU(bit_width=8),
    )
    calibrate(model, data(2, 8, 4, 4))
    assert names(model) == ["0", "1", "2", "4"]
    assert [q.method.bits for _, q in iter_quantizers(model)] == [2, 4, 5, 8]
    assert torch.isfinite(model(data(2, 8, 4, 4)[0])).all()
