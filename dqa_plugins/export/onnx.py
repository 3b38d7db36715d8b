"""ONNX files with the numbers of the converted model."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dqa_plugins.errors import ExportFailed, missing

from .program import to_exported_program
from .qdq import to_qdq

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
        path: of the file; replaced only when the export succeeded.
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
    path = Path(path)
    if not path.parent.is_dir():
        raise ExportFailed(f"{path}: the folder {path.parent} does not exist.")
    finish = (lambda ready: to_qdq(ready, opset)) if form == "qdq" else None
    program = to_exported_program(model, example_inputs, dynamic_batch=dynamic_batch, finish=finish)
    return write_onnx(program, path, opset)


def write_onnx(program: Any, path: Path, opset: int = 21) -> Path:
    """Write an ExportedProgram as an ONNX file, or nothing at all.

    Raises:
        ExportFailed: the ONNX exporter failed.
        MissingDependency: onnx or onnxscript is not installed.
    """
    _require_onnxscript()
    partial = path.with_name(path.name + ".part")
    try:
        with _quiet(), torch.no_grad():
            exported = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False)
            exported.save(str(partial))  # type: ignore[union-attr]
        os.replace(partial, path)
    except Exception as error:
        raise ExportFailed(f"the ONNX exporter failed: {type(error).__name__}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return path
