"""ONNX files with the numbers of the converted model."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dqa_plugins.errors import ExportFailed, missing

from .expand import expand
from .program import make_program
from .qdq import qdq_forms

MIN_OPSET, MAX_OPSET = 18, 23


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints progress and logs what it did not need; errors still raise."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _require_onnxscript() -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise missing("onnxscript", "onnx", "to_onnx") from error


def to_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = True,
    opset: int = 21,
    form: str = "float",
) -> Path:
    """Write a converted model, or a single frozen ActivationQuantizer, as an ONNX file.

    form="float" is plain arithmetic (Div, Round, Max, Min, Mul; TopK for dynamic quantiles): the same numbers as torch
    for every method, static or dynamic, with the optimizations of ONNX Runtime on or off. form="qdq" is QuantizeLinear
    and DequantizeLinear with int4 or int8 codes: compact, for static Direct, DQA (n + m <= 8) and NoisyQuant.

    Args:
        model: converted by any adapter.
        example_inputs: a tensor or a tuple of them; the first dimension of the first one is the batch.
        path: of the file; what is there is replaced only when the export succeeded. A symbolic link stays one.
        dynamic_batch: leave the batch size open.
        opset: 18 to 23; int4 codes need 21 (below it form="qdq" writes int8).
        form: "float" or "qdq".

    Returns:
        the path.

    Raises:
        UncalibratedQuantizer: a quantizer is not frozen.
        UnsupportedCombination: form="qdq" and a quantizer that has no such form, by name.
        ExportFailed: torch.export or the ONNX exporter failed; nothing was written.
        MissingDependency: onnx or onnxscript is not installed.
    """
    if not isinstance(opset, int) or not MIN_OPSET <= opset <= MAX_OPSET:
        raise ExportFailed(f"opset={opset!r}: torch's exporter writes opset {MIN_OPSET} to {MAX_OPSET}.")
    if form not in ("float", "qdq"):
        raise ExportFailed(f"form={form!r}: one of 'float', 'qdq'.")
    _require_onnxscript()
    file = target(path)
    program = make_program(model, example_inputs, dynamic_batch=dynamic_batch)
    write_onnx(expand(program, qdq_forms(program, opset)) if form == "qdq" else expand(program), file, opset)
    return Path(path)


def target(path: str | os.PathLike[str]) -> Path:
    """The file that a path stands for, behind symbolic links.

    Raises:
        ExportFailed: its folder does not exist, or something other than a regular file is there.
    """
    try:
        file = Path(path).resolve()
    except (OSError, RuntimeError) as error:
        raise ExportFailed(f"{path}: {error}") from error
    if not file.parent.is_dir():
        raise ExportFailed(f"{path}: the folder {file.parent} does not exist.")
    if file.exists() and not file.is_file():
        raise ExportFailed(f"{path} is no regular file; give a path that is free, or a file to replace.")
    return file


def write_onnx(program: Any, path: Path, opset: int = 21) -> Path:
    """Write an ExportedProgram as an ONNX file, or nothing at all.

    It is written in a new folder beside the file and moved into place: no other file is touched.

    Args:
        program: of `expand`.
        path: of `target`.

    Raises:
        ExportFailed: the ONNX exporter failed.
        MissingDependency: onnx or onnxscript is not installed.
    """
    _require_onnxscript()
    try:
        with _quiet(), torch.no_grad(), tempfile.TemporaryDirectory(prefix=".onnx-", dir=path.parent) as folder:
            exported: Any = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False)
            _anonymous(exported.model)
            exported.save(str(Path(folder) / path.name))
            for part in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):
                os.replace(part, path.with_name(part.name))  # the weights of large models first, then the file itself
    except Exception as error:
        raise ExportFailed(f"the ONNX exporter failed: {type(error).__name__}: {error}") from error
    return path


def _anonymous(model: Any) -> None:
    """Take out where nodes came from: lines of code, local paths, addresses."""
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in graph.all_nodes():
            for entry in [key for key in node.metadata_props if "stack_trace" in key or "fx_node" in key]:
                del node.metadata_props[entry]
