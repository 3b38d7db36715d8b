"""Brevitas: our methods as act_quant of its layers, calibrated, trained and exported by Brevitas' own functions.

    layer = qnn.QuantReLU(act_quant=DQAAct, bit_width=4, extra_bits=3)
    substitute_layers(model, {nn.ReLU: DQA(bits=4), "layer3.0.relu": Direct(bits=6)})
    with torch.no_grad(), calibration_mode(model):
        for x in calibration: model(x)

Leaving `calibration_mode` freezes the quantizers; entering it again starts over. A model that is trained without
having been calibrated collects its statistics while it trains. Importing this room registers export handlers in
Brevitas and wraps `calibration_mode` (see `hooks`).

What cannot be had (brevitas 0.13.4):
- QuantTensors from NoisyQuant, Dense+Sparse, dynamic or per-channel scales: a typed error says why (see `grid`). In
  the maps of `quantize` such a layer takes return_quant_tensor=False, and the layers behind it bias_quant=None too.
- A convolution that returns a QuantTensor behind a zero point (Direct(symmetric=False)): Brevitas computes none.
- NoisyQuant(objective="output"): a layer does not know the next one.
- One quantizer for each call of a module that is called several times: Brevitas has one quantizer per module.
- BREVITAS_JIT=1: loading a state_dict into a deepcopy, and exports; stock layers cannot either.
"""

from dqa_plugins.errors import missing

try:
    import brevitas as _brevitas  # noqa: F401
except ImportError as error:
    raise missing("brevitas", "brevitas", "dqa_plugins.adapters.brevitas") from error

from dqa_plugins.host.weights import install_reader, quantized_weights

from .config import DenseSparseAct, DirectAct, DQAAct, NoisyQuantAct, get_act_quant
from .convert import quantize_model, start_qat
from .hooks import install
from .proxy import PluginActProxy
from .substitute import substitute_layers
from .weights import read_weights

install()
install_reader("brevitas", read_weights)

__all__ = [
    "DQAAct",
    "DenseSparseAct",
    "DirectAct",
    "NoisyQuantAct",
    "PluginActProxy",
    "get_act_quant",
    "quantize_model",
    "quantized_weights",
    "start_qat",
    "substitute_layers",
]
