"""Low-bit activation quantization methods (DQA, NoisyQuant, Dense+Sparse, Direct) for existing frameworks.

The core: methods, the quantizer and the maths. Framework adapters live in `dqa_plugins.adapters.*`, exporters in
`dqa_plugins.export`; neither is imported here.
"""

from . import functional
from ._version import __version__
from .errors import DQAError, DQAWarning
from .methods import DQA, DenseSparse, Direct, Method, NoisyQuant, method_from_dict, method_to_dict
from .quantizer import ActivationQuantizer
from .sites import iter_quantizers

__all__ = [
    "DQA",
    "ActivationQuantizer",
    "DQAError",
    "DQAWarning",
    "DenseSparse",
    "Direct",
    "Method",
    "NoisyQuant",
    "__version__",
    "functional",
    "iter_quantizers",
    "method_from_dict",
    "method_to_dict",
]
