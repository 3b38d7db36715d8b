"""OpenVINO models with the numbers of the converted model."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from dqa_plugins.errors import ExportFailed, missing

from .onnx import to_onnx

# On CPUs with AMX or AVX-512 BF16 OpenVINO computes in bfloat16 by default: errors up to 1 were seen on activations,
# and every low-bit code moves. Linear layers whose weights it can compress it runs with int8 activations. Compile with
# this configuration for the numbers of torch.
F32 = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def require_openvino() -> Any:
    """The openvino module.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise missing("openvino", "openvino", "The openvino backend") from error
    return openvino


def exact_divisions(model: Any) -> Any:
    """Let OpenVINO divide where the model divides, as torch does. Changes the model in place, and returns it.

    Left alone it computes x / step as x * (1 / step), a step off at ties (2026.4: up to 15% of the values on a lattice
    of half steps). `to_openvino` returns models that are told so, but files do not keep it: call this on a model that
    `openvino.Core().read_model` has read, before it is compiled.

    Args:
        model: openvino.Model.
    """
    for node in model.get_ops():
        # behind a reduction OpenVINO's division is wrong: there a scale is divided by a power of two, which is exact
        if node.get_type_name() == "Divide" and "Reduce" not in node.input_value(0).get_node().get_type_name():
            node.get_rt_info()["nonconvertable_divide_0"] = ""  # what ov::disable_divide_conversion sets in C++
    return model


def read_onnx(file: Path) -> Any:
    """An ONNX file as an openvino.Model with exact divisions, which owns its weights: the file may go.

    Raises:
        MissingDependency: openvino is not installed.
    """
    # convert_model would have made products of the divisions already
    return exact_divisions(require_openvino().Core().read_model(str(file)).clone())


def to_openvino(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str] | None = None,
    *,
    dynamic_batch: bool = True,
) -> Any:
    """Convert a converted model, or a single frozen ActivationQuantizer, to OpenVINO.

    Goes through ONNX: PT2E models with folded int8 weights fail in OpenVINO's own reader of exported programs.
    Compile the result with `openvino.compile_model(model, "CPU", F32)`: the default precision is bfloat16 on many CPUs.

    Args:
        model: converted by any adapter.
        example_inputs: a tensor or a tuple of them; the first dimension of the first one is the batch.
        path: where to save (an .xml; weights beside it as .bin, float32); None: only return. A model that is read
            from there needs `exact_divisions`.
        dynamic_batch: leave the batch size open.

    Returns:
        openvino.Model.

    Raises:
        UncalibratedQuantizer, ExportFailed, MissingDependency.
    """
    ov = require_openvino()
    if path is not None and Path(path).suffix != ".xml":
        raise ExportFailed(f"{path}: OpenVINO saves a model as .xml (and .bin beside it).")
    with tempfile.TemporaryDirectory() as folder:
        file = to_onnx(model, example_inputs, Path(folder) / "model.onnx", dynamic_batch=dynamic_batch)
        converted = read_onnx(file)
        if path is not None:
            # the default would round weights, and scales, to float16
            ov.save_model(converted, str(path), compress_to_fp16=False)
    return converted
