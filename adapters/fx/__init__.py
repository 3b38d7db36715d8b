"""torch.ao FX: the host's own prepare_fx, prepare_qat_fx and convert_fx, with our methods in the QConfigMapping.

    prepared = prepare_fx(model, dqa_qconfig, example_inputs)
    for x in calibration: prepared(x)
    quantized = convert_fx(prepared)

Importing this room installs its hooks into torch.ao (see `hooks`).
"""

from dqa_plugins.host.weights import install_reader, quantized_weights

from .config import (
    PluginQConfigMapping,
    dense_sparse_qconfig,
    direct_qconfig,
    dqa_qconfig,
    get_qconfig,
    get_qconfig_mapping,
    noisyquant_qconfig,
    qpp_qconfig,
)
from .convert import quantize_model
from .hooks import install
from .observer import FXObserver
from .weights import read_weights

install()
install_reader("fx", read_weights)

__all__ = [
    "FXObserver",
    "PluginQConfigMapping",
    "dense_sparse_qconfig",
    "direct_qconfig",
    "dqa_qconfig",
    "get_qconfig",
    "get_qconfig_mapping",
    "noisyquant_qconfig",
    "qpp_qconfig",
    "quantize_model",
    "quantized_weights",
]
