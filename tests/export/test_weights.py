"""Quantized weights in one form: what quantized_weights gives equals what the converted model computes with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dqa_plugins import Direct
from dqa_plugins.errors import FrameworkMismatch
from dqa_plugins.export import make_program, to_exported_program
from dqa_plugins.host.weights import QuantizedWeight, install_reader, quantized_weights
from dqa_plugins.operators import DEQUANTIZE

CASES = [
    (room, scheme, bits) for room in ("fx", "pt2e", "brevitas") for scheme in ("channel", "tensor") for bits in (8, 3)
]
CASES += [("pt2e, not folded", "channel", 4), ("nncf", "channel", 8), ("nncf", "tensor", 8)]
CASES += [("nncf, asymmetric", "channel", 8), ("nncf, asymmetric", "tensor", 8)]
WIDTHS = {"conv": (6, 3, 3, 3), "up": (6, 4, 2, 2), "fc": (5, 64)}


class Net(nn.Module):
    """A convolution, a transposed one (channels along axis 1) and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.up = nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, 2)
        self.relu2, self.fc = nn.ReLU(), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.relu2(self.up(self.relu(self.conv(x)))).flatten(1)[:, ::4])


def net() -> Net:
    torch.manual_seed(1)
    return Net().eval()


def data(batch: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def fx(scheme: str, bits: int) -> nn.Module:
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    from dqa_plugins.adapters.fx import get_qconfig_mapping

    options: Any = {"weight_bits": bits, "weight_scheme": "channel" if scheme == "channel" else "qpp"}
    prepared = prepare_fx(net(), get_qconfig_mapping(Direct(bits=6), **options), (data(),))
    prepared(data())
    return convert_fx(prepared)


def pt2e(scheme: str, bits: int, fold: bool = True) -> nn.Module:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    from dqa_plugins.adapters.pt2e import PluginQuantizer

    quantizer = PluginQuantizer(weight_bits=bits, weight_scheme="channel" if scheme == "channel" else "qpp")
    batch = ({0: torch.export.Dim("batch", min=1, max=64)},)
    exported = torch.export.export(net(), (data(),), dynamic_shapes=batch).module()
    prepared = prepare_pt2e(exported, quantizer.set_global(Direct(bits=6)))
    prepared(data())
    return convert_pt2e(prepared, fold_quantize=fold)


def brevitas(scheme: str, bits: int) -> nn.Module:
    import brevitas.nn as qnn
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.quant import Int8WeightPerChannelFloat, ShiftedUint8WeightPerTensorFloat

    from dqa_plugins.adapters.brevitas import DirectAct

    kind = Int8WeightPerChannelFloat if scheme == "channel" else ShiftedUint8WeightPerTensorFloat
    weight = {"weight_quant": kind, "weight_bit_width": bits}
    model, plain = Net(), net()
    model.conv, model.up = qnn.QuantConv2d(3, 6, 3, 2, 1, **weight), qnn.QuantConvTranspose2d(6, 4, 2, 2, **weight)
    model.fc = qnn.QuantLinear(64, 5, bias=True, **weight)
    model.relu = qnn.QuantReLU(act_quant=DirectAct, bit_width=6)
    model.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad(), calibration_mode(model):
        model(data())
    return model.eval()


def nncf(scheme: str, mode: str) -> nn.Module:
    import nncf as host

    from dqa_plugins.adapters.nncf import quantize

    weights = {"bits": 8, "mode": mode, "per_channel": scheme == "channel"}
    entry = {"algorithm": "quantization", "activations": {"mode": "direct", "bits": 6}, "weights": weights}
    return quantize(net(), host.Dataset([data()]), {"compression": entry})


ROOMS: dict[str, Callable[[str, int], nn.Module]] = {
    "fx": fx,
    "pt2e": pt2e,
    "pt2e, not folded": lambda scheme, bits: pt2e(scheme, bits, fold=False),
    "brevitas": brevitas,
    "nncf": lambda scheme, _: nncf(scheme, "symmetric"),
    "nncf, asymmetric": lambda scheme, _: nncf(scheme, "asymmetric"),
}


@functools.cache
def converted(room: str, scheme: str, bits: int) -> nn.Module:
    return ROOMS[room](scheme, bits)


def computed_with(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The weights that convolutions and linears are called with in a forward, in order of execution."""
    found: list[Tensor] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten.convolution.default:
                found.append(args[1])
            elif function is torch.ops.aten.addmm.default:
                found.append(args[2].t())
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        model(x)
    return found


@pytest.mark.parametrize(("room", "scheme", "bits"), CASES)
def test_weights_equal_those_the_model_computes_with(room: str, scheme: str, bits: int) -> None:
    model = converted(room, scheme, bits)
    weights, seen = quantized_weights(model), computed_with(model, data())
    assert list(weights) == ["conv.weight", "up.weight", "fc.weight"]
    assert len(seen) == 3
    for (name, weight), value in zip(weights.items(), seen, strict=True):
        assert torch.equal(weight.dequantize(), value), name
        assert weight.codes.shape == WIDTHS[name.removesuffix(".weight")]
        assert weight.codes.dtype in (torch.int8, torch.uint8)
        codes = weight.codes.int()
        assert 1 < len(codes.unique()) <= 2**bits
        if scheme == "tensor":
            assert weight.axis is None
        else:
            axis = 1 if name == "up.weight" else 0
            assert weight.axis == axis
            assert weight.scale.shape == weight.zero_point.shape == (weight.codes.shape[axis],)


@pytest.mark.parametrize(("room", "scheme", "bits"), CASES)
def test_programs_hold_each_weight_once(room: str, scheme: str, bits: int) -> None:
    """Unexpanded: integers and one dequantize per weight. Expanded: the dequantized numbers and nothing of ours."""
    model = converted(room, scheme, bits)
    expected = [weight.dequantize() for weight in quantized_weights(model).values()]
    program = make_program(model, data())
    assert sum(node.target is DEQUANTIZE for node in program.graph.nodes) == 3
    x = data(3, seed=8)
    with torch.no_grad():
        assert torch.equal(program.module()(x), model(x))
    plain = to_exported_program(model, data())
    called = {str(node.target) for node in plain.graph.nodes if node.op == "call_function"}
    assert all(target.startswith("aten.") for target in called), called
    assert all(t.dtype == torch.float32 for t in plain.state_dict.values()), "integers are left in the program"
    for weight in expected:
        assert sum(t.shape == weight.shape and torch.equal(t, weight) for t in plain.state_dict.values()) == 1
    with torch.no_grad():
        assert torch.equal(plain.module()(x), model(x))


def test_float64_scales_give_the_quotient() -> None:
    """NNCF divides codes by 1 / step: every code of 2,000 scales, bit for bit."""
    inverse = torch.rand(2000, generator=torch.Generator().manual_seed(0)) * 1000 + 1e-3
    codes = torch.arange(-128, 128).to(torch.int8).expand(2000, -1)
    zero = torch.zeros(2000, dtype=torch.int8)
    weight = QuantizedWeight(codes, inverse.double().reciprocal(), zero, 0)
    assert torch.equal(weight.dequantize(), codes.float() / inverse.unsqueeze(1))
    assert not torch.equal(codes.float() * inverse.reciprocal().unsqueeze(1), codes.float() / inverse.unsqueeze(1))


def test_float_models_have_no_quantized_weights() -> None:
    assert quantized_weights(net()) == {}


def test_a_room_has_one_reader() -> None:
    import dqa_plugins.adapters.fx  # noqa: F401

    with pytest.raises(FrameworkMismatch, match="'fx'"):
        install_reader("fx", lambda model: [])


def test_scales_along_two_axes_have_no_such_form() -> None:
    codes, scale = torch.zeros(4, 3, dtype=torch.int8), torch.rand(4, 3)
    assert QuantizedWeight.laid_out(codes, scale, torch.zeros(()), torch.float32) is None
