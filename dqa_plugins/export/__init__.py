"""Export of converted models, the same calls whichever adapter made them, and the proof of equal numbers."""

from .compare import compare_backends
from .executorch import to_executorch
from .file import ExportedFile
from .onnx import to_onnx
from .openvino import exact_divisions, to_openvino
from .parity import BackendParity, NetworkParity, QuantizerParity
from .program import make_program, to_exported_program
from .runners import onnxruntime_session

__all__ = [
    "BackendParity",
    "ExportedFile",
    "NetworkParity",
    "QuantizerParity",
    "compare_backends",
    "exact_divisions",
    "make_program",
    "onnxruntime_session",
    "to_executorch",
    "to_exported_program",
    "to_onnx",
    "to_openvino",
]
