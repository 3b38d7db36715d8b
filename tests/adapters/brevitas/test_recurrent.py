"""Our act_quant in Brevitas' recurrent and attention layers."""

from __future__ import annotations

import copy

import brevitas.nn as qnn
import pytest
import torch
from brevitas.graph.quantize import LAYERWISE_COMPUTE_LAYER_MAP, layerwise_quantize
from torch import Tensor, nn

from dqa_plugins import DQA, Direct, Method, iter_quantizers
from dqa_plugins.adapters.brevitas import DirectAct, get_act_quant, substitute_layers
from dqa_plugins.errors import ChannelMismatch, UnsupportedCombination
from tests.adapters.brevitas.nets import calibrate, data, names

ACTS = {
    qnn.QuantRNN: ("io_quant", "gate_acc_quant"),
    qnn.QuantLSTM: ("io_quant", "gate_acc_quant", "sigmoid_quant", "tanh_quant", "cell_state_quant"),
}


@pytest.mark.parametrize(
    "method", [Direct(bits=8), DQA(bits=8, channel_axis=-1), Direct(bits=8, qparams="dynamic")], ids=str
)
@pytest.mark.parametrize("kind", [qnn.QuantLSTM, qnn.QuantRNN])
def test_recurrent_layers(kind: type[nn.Module], method: Method) -> None:
    """Every quantizer of a cell is called through `fused_activation_quant_proxy`, not through its proxy.

    That of io_quant sees inputs and hidden states: DQA needs as many of the one as of the other.
    """
    torch.manual_seed(0)
    bias = {} if method.qparams == "static" else {"bias_quant": None}  # that of Brevitas needs one input scale
    layers = 2 if method.qparams == "static" else 1
    model = kind(8, 8, num_layers=layers, **dict.fromkeys(ACTS[kind], get_act_quant(method)), **bias)
    batches = data(5, 2, 8)
    calibrate(model, batches)
    quantizers = [q for _, q in iter_quantizers(model)]
    assert all(q.state == "frozen" for q in quantizers)
    assert len(set(names(model))) == len(quantizers) >= 2
    with torch.no_grad():
        output = model(batches[0])[0]
        assert output.shape == (5, 2, 8)
        assert torch.equal(copy.deepcopy(model)(batches[0])[0], output)
        changed = quantizers[-1].register_forward_hook(lambda _m, _x, y: y * 0)
        assert not torch.equal(model(batches[0])[0], output), "nobody reads the quantized tensor"
        changed.remove()


def test_several_layers_need_an_integer_grid() -> None:
    """Brevitas hands QuantTensors from layer to layer."""
    model = qnn.QuantRNN(4, 8, num_layers=2, io_quant=get_act_quant(Direct(qparams="dynamic")), bias_quant=None)
    with pytest.raises(UnsupportedCombination, match=r"dynamic and predicted scales"):
        calibrate(model, data(5, 2, 4))(data(5, 2, 4)[0])


def test_a_coupled_input_gate_is_refused() -> None:
    model = qnn.QuantLSTM(4, 8, coupled_input_forget_gates=True, sigmoid_quant=DirectAct)
    with pytest.raises(UnsupportedCombination, match="coupled_input_forget_gates"):
        calibrate(model, data(5, 2, 4))


class TwoAttentions(nn.Module):
    """(B, L, 8) -> the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x, x, x)[0]
        return self.second(x, x, x)[0]


def test_two_attention_layers_have_names_of_their_own() -> None:
    layers = dict(LAYERWISE_COMPUTE_LAYER_MAP)
    kind, options = layers[nn.MultiheadAttention]
    quants = {key: None if "bias" in key else value for key, value in options.items()}
    quants |= dict.fromkeys(("attn_output_weights_quant", "q_scaled_quant", "k_transposed_quant", "v_quant"), DirectAct)
    layers[nn.MultiheadAttention] = (kind, quants)
    model = calibrate(layerwise_quantize(TwoAttentions().eval(), layers), data(2, 5, 8))
    found = names(model)
    assert len(found) == 8
    assert len(set(found)) == 8
    assert {name.split(".")[0] for name in found} == {"first", "second"}


class Bottleneck(nn.Module):
    """One ReLU behind layers of 4 and of 8 channels. (B, 3, H, W) -> (B, 8, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.relu = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.b(self.relu(self.a(x))))


def test_a_shared_relu_names_the_cure() -> None:
    from brevitas.graph.standardize import DuplicateSharedStatelessModule

    model = substitute_layers(Bottleneck().eval(), {nn.ReLU: DQA()})
    with pytest.raises(ChannelMismatch, match=r"'relu'.*DuplicateSharedStatelessModule"):
        calibrate(model, data(2, 3, 4, 4))
    cured = DuplicateSharedStatelessModule().apply(torch.fx.symbolic_trace(Bottleneck().eval()))
    calibrate(substitute_layers(cured, {nn.ReLU: DQA()}), data(2, 3, 4, 4))
    assert names(cured) == ["relu", "relu_1"]
