"""torchao PT2E: the host's own prepare_pt2e, prepare_qat_pt2e and convert_pt2e, with our methods in a Quantizer.

    exported = torch.export.export(model, example_inputs)
    prepared = prepare_pt2e(exported.module(), PluginQuantizer().set_global(DQA(bits=4)))
    for x in calibration: prepared(x)
    quantized = convert_pt2e(prepared)

Importing this room installs its hooks into torchao (see `hooks`).
"""

from dqa_plugins.host.weights import install_reader, quantized_weights

from .config import PluginQuantizer
from .convert import quantize_model
from .hooks import install
from .observer import PT2EObserver
from .weights import read_weights

install()
install_reader("pt2e", read_weights)

__all__ = ["PT2EObserver", "PluginQuantizer", "quantize_model", "quantized_weights"]
