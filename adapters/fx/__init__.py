"""torch.ao FX: the host's own prepare_fx, prepare_qat_fx and convert_fx, with our methods in the QConfigMapping.

    prepared = prepare_fx(model, dqa_qconfig, example_inputs)
    for x in calibration: prepared(x)
    quantized = convert_fx(prepared)

Importing this room installs its hooks into torch.ao (see `hooks`).
"""

from typing import TYPE_CHECKING, Any

from dqa_plugins.host.weights import install_reader, quantized_weights

from .config import READY_MADE, PluginQConfigMapping, get_qconfig, get_qconfig_mapping, ready_made
from .convert import quantize_model
from .hooks import install
from .observer import FXObserver
from .weights import read_weights

if TYPE_CHECKING:
    dense_sparse_qconfig: PluginQConfigMapping
    direct_qconfig: PluginQConfigMapping
    dqa_qconfig: PluginQConfigMapping
    noisyquant_qconfig: PluginQConfigMapping
    qpp_qconfig: PluginQConfigMapping

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


def __getattr__(name: str) -> Any:
    """The ready-made mappings, each a fresh one."""
    if name in READY_MADE:
        return ready_made(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
