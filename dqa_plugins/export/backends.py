"""The backends that `compare_backends` can run a converted model on.

Each one compiles a module that torch.export takes, in one or more variants (optimizations on and off where the
backend has a switch), and returns functions from tensors to a list of tensors.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dqa_plugins.errors import UnsupportedCombination, missing

from .onnx import to_onnx
from .openvino import F32, require_openvino, to_openvino
from .program import exportable, to_exported_program

Runner = Callable[..., list[Tensor]]


def _flat(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    return [tensor for part in outputs for tensor in _flat(part)]


def onnxruntime_session(path: str | Path, *, optimize: bool = True, threads: int = 0) -> Runner:
    """A function that runs an ONNX file in ONNX Runtime on the CPU.

    Args:
        path: of the file.
        optimize: False: ORT_DISABLE_ALL; fusions are where QDQ results have been seen to change.
        threads: intra-op threads; 0: ONNX Runtime's default.

    Raises:
        MissingDependency: onnxruntime is not installed.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise missing("onnxruntime", "onnx", "The onnxruntime backend") from error
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        feed = {name: x.detach().cpu().numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(y) for y in session.run(None, feed)]

    return run


def _onnxruntime(module: nn.Module, inputs: tuple[Tensor, ...]) -> Iterator[tuple[str, Runner]]:
    with tempfile.TemporaryDirectory() as folder:
        path = to_onnx(module, inputs, Path(folder) / "model.onnx")
        for optimize in (True, False):
            yield (
                f"onnxruntime, optimizations {'on' if optimize else 'off'}",
                onnxruntime_session(path, optimize=optimize),
            )


def _openvino(module: nn.Module, inputs: tuple[Tensor, ...]) -> Iterator[tuple[str, Runner]]:
    compiled_model = require_openvino().compile_model(to_openvino(module, inputs), "CPU", F32)

    def run(*xs: Tensor) -> list[Tensor]:
        found = compiled_model([x.detach().cpu().numpy() for x in xs])
        return [torch.from_numpy(found[output].copy()) for output in compiled_model.outputs]

    yield "openvino, f32", run


def _torch_export(module: nn.Module, inputs: tuple[Tensor, ...]) -> Iterator[tuple[str, Runner]]:
    program = to_exported_program(module, inputs).module()
    yield "torch.export", lambda *xs: _flat(program(*xs))


def _torch_compile(module: nn.Module, inputs: tuple[Tensor, ...]) -> Iterator[tuple[str, Runner]]:
    torch._dynamo.reset()
    target: Any = exportable(module, inputs)
    if any(getattr(m.forward, "compile_by_export", False) for m in target.modules()):
        # Dynamo cannot enter NNCF's function mode (nncf 3.4): compile what torch.export makes of such a model
        target = to_exported_program(module, inputs).module()
    compiled_module = torch.compile(target, fullgraph=True)

    def run(*xs: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return _flat(compiled_module(*xs))

    yield "torch.compile (inductor)", run


BACKENDS: dict[str, Callable[[nn.Module, tuple[Tensor, ...]], Iterator[tuple[str, Runner]]]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "torch.export": _torch_export,
    "torch.compile": _torch_compile,
}


def compiled(backend: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> Iterator[tuple[str, Runner]]:
    """Compile a module for a backend.

    Args:
        backend: a name in BACKENDS.
        module: what `to_onnx` takes.
        inputs: example inputs.

    Yields:
        (variant, function from input tensors to the flat list of output tensors).

    Raises:
        UnsupportedCombination: no such backend.
    """
    if backend not in BACKENDS:
        raise UnsupportedCombination(f"backend {backend!r}: one of {', '.join(map(repr, BACKENDS))}.")
    yield from BACKENDS[backend](module, inputs)
