"""NNCF: a config entry in the shape NNCF's JSON configs had, and the native 3.x call as an opt-in.

    quantized = quantize(model, nncf_dataset, {"compression": {"algorithm": "quantization",
        "activations": {"mode": "dqa", "bits": 4}, "weights": {"bits": 8}}})

    register()   # then nncf.quantize(..., QuantizationParameters(num_bits=4, mode="dqa"))

The judge decides which tensors are quantized, as in the other rooms (see `place`), NNCF which weights are. Nothing of
NNCF is patched unless `register` is called (see `hooks`).

Save and load with NNCF's own functions: `nncf.torch.get_config(model)` and `model.state_dict()`, then
`nncf.torch.load_from_config(float_model, config, allowed_modules=ALLOWED_MODULES)`; or `save` and `load`, which write
a folder with JSON and safetensors.
"""

from dqa_plugins.errors import missing

try:
    import nncf as _nncf  # noqa: F401
except ImportError as error:
    raise missing("nncf", "nncf", "the NNCF adapter") from error

from .host import check_framework

check_framework()

from dqa_plugins.host.weights import install_reader, quantized_weights  # noqa: E402

from .config import InvalidConfig  # noqa: E402 - the check comes before anything that stands on NNCF's internals
from .convert import placement, quantize, quantize_model  # noqa: E402
from .hooks import register, unregister  # noqa: E402
from .observer import NNCFQuantizer  # noqa: E402
from .saving import ALLOWED_MODULES, load, save  # noqa: E402
from .weights import bake_weights, read_weights  # noqa: E402

install_reader("nncf", read_weights)

__all__ = [
    "ALLOWED_MODULES",
    "InvalidConfig",
    "NNCFQuantizer",
    "bake_weights",
    "load",
    "placement",
    "quantize",
    "quantize_model",
    "quantized_weights",
    "register",
    "save",
    "unregister",
]
