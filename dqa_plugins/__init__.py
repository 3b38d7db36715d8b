"""Low-bit activation quantization methods (DQA, NoisyQuant, Dense+Sparse, Direct) for existing frameworks.

The core: methods, the quantizer and the maths. Framework adapters live in `dqa_plugins.adapters.*`, exporters in
`dqa_plugins.export`; neither is imported here.
"""

from typing import TYPE_CHECKING, Any

from . import functional, qpp
from ._version import __version__
from .errors import DQAError, DQAWarning
from .method import Method
from .methods import DQA, DenseSparse, Direct, NoisyQuant, method_from_dict, method_to_dict, register_method
from .prediction import QPP
from .quantizer import ActivationQuantizer
from .ranking import RankTable, rank_channels
from .sites import iter_quantizers

if TYPE_CHECKING:
    from .storage import allocate_bits

__all__ = [
    "DQA",
    "QPP",
    "ActivationQuantizer",
    "DQAError",
    "DQAWarning",
    "DenseSparse",
    "Direct",
    "Method",
    "NoisyQuant",
    "RankTable",
    "__version__",
    "allocate_bits",
    "functional",
    "iter_quantizers",
    "method_from_dict",
    "method_to_dict",
    "qpp",
    "rank_channels",
    "register_method",
]


def __getattr__(name: str) -> Any:
    """`allocate_bits` on first use: it brings numba with it, which the rest does not need."""
    if name == "allocate_bits":
        from .storage import allocate_bits

        return allocate_bits
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
