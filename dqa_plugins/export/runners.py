"""The backends that `compare_backends` can run a converted model on.

Each one compiles the program that `export.program` makes of it, in one or more variants (optimizations on and off
where the backend has a switch), and returns functions from tensors to a list of tensors.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from dqa_plugins.errors import missing

from ..options import check_option
from .executorch import executorch_method, write_pte
from .expand import expand
from .onnx import write_onnx
from .openvino import F32, read_onnx, require_openvino
from .program import make_program

Runner = Callable[..., list[Tensor]]


class Target:
    """A module for several backends. What they share (the programs, the ONNX file) is made once.

    Args:
        module: what `to_onnx` takes.
        inputs: the tensors that it will run on. No size is left open: with predicted qparams that takes minutes.
        more: a Target whose module gives the outputs of this one first, and others: its ONNX file serves both.
    """

    def __init__(self, module: nn.Module, inputs: tuple[Tensor, ...], more: Target | None = None) -> None:
        self.module, self.inputs, self.more = module, inputs, more

    @cached_property
    def unexpanded(self) -> ExportedProgram:
        """The program of `make_program`."""
        return make_program(self.module, self.inputs, dynamic_batch=False)

    @cached_property
    def program(self) -> ExportedProgram:
        """It in plain aten operations."""
        return expand(self.unexpanded)

    @cached_property
    def onnx(self) -> Path:
        """The ONNX file, as `to_onnx` writes it; it lives as long as the target."""
        self._folder = tempfile.TemporaryDirectory()
        file = Path(self._folder.name) / "model.onnx"
        if self.more is None:
            return write_onnx(self.program, file)
        import onnx

        model = onnx.load(self.more.onnx)
        del model.graph.output[len(flat_outputs(self.module(*self.inputs))) :]
        onnx.save(model, file)
        return file


def flat_outputs(outputs: Any) -> list[Tensor]:
    """The tensors of a model's output: a tensor, or sequences and dicts of them and of other things."""
    return [value for value in tree_leaves(outputs) if isinstance(value, Tensor)]


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


def _onnxruntime(target: Target) -> Iterator[tuple[str, Runner]]:
    for optimize in (True, False):
        name = f"onnxruntime, optimizations {'on' if optimize else 'off'}"
        yield name, onnxruntime_session(target.onnx, optimize=optimize)


def _openvino(target: Target) -> Iterator[tuple[str, Runner]]:
    compiled_model = require_openvino().compile_model(read_onnx(target.onnx), "CPU", F32)

    def run(*xs: Tensor) -> list[Tensor]:
        found = compiled_model([x.detach().cpu().numpy() for x in xs])
        return [torch.from_numpy(found[output].copy()) for output in compiled_model.outputs]

    yield "openvino, f32", run


def _torch_export(target: Target) -> Iterator[tuple[str, Runner]]:
    program: Any = target.program.module()
    yield "torch.export", lambda *xs: flat_outputs(program(*xs))


def _torch_compile(target: Target) -> Iterator[tuple[str, Runner]]:
    torch._dynamo.reset()
    compiled_module = torch.compile(target.program.module(), fullgraph=True)

    def run(*xs: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return flat_outputs(compiled_module(*xs))

    yield "torch.compile (inductor)", run


def _executorch(target: Target) -> Iterator[tuple[str, Runner]]:
    with tempfile.TemporaryDirectory() as folder:
        file = write_pte(target.program, Path(folder) / "model.pte", "xnnpack")
        yield "executorch, xnnpack", executorch_method(file)


BACKENDS: dict[str, Callable[[Target], Iterator[tuple[str, Runner]]]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "torch.export": _torch_export,
    "torch.compile": _torch_compile,
    "executorch": _executorch,
}


# what compare_backends holds a backend to: one tensor through each quantizer, and the whole network
PROMISES = {
    "onnxruntime": "every value on torch's step; a network differs at rounding ties only",
    "openvino": "with F32 (no bfloat16, no dynamic quantization) torch's step but at rounding ties; a network "
    "differs at ties only",
    "torch.export": "torch's numbers, bit for bit",
    "torch.compile": "every value on torch's step; a network differs at rounding ties only",
    "executorch": "every value on torch's step; a network differs at rounding ties only",
}


def check_backend(backend: str) -> str:
    """The name of a backend.

    Raises:
        InvalidArgument: there is none of this name.
    """
    check_option("compare_backends", "backend", backend, tuple(BACKENDS))
    return backend


def compiled(backend: str, target: Target) -> Iterator[tuple[str, Runner]]:
    """Compile a module for a backend.

    Args:
        backend: a name in BACKENDS.
        target: the module and its example inputs.

    Yields:
        (variant, function from input tensors to the flat list of output tensors).

    Raises:
        UnsupportedCombination: no such backend.
    """
    yield from BACKENDS[check_backend(backend)](target)
