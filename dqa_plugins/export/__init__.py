"""Export of converted models, the same calls whichever adapter made them, and the proof of equal numbers."""

from .backends import onnxruntime_session
from .bake import bake
from .compare import BackendParity, NetworkParity, QuantizerParity, compare_backends
from .onnx import to_onnx
from .openvino import to_openvino
from .program import to_exported_program

__all__ = [
    "BackendParity",
    "NetworkParity",
    "QuantizerParity",
    "bake",
    "compare_backends",
    "onnxruntime_session",
    "to_exported_program",
    "to_onnx",
    "to_openvino",
]
