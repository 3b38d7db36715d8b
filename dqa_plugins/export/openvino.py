"""OpenVINO models with the numbers of the converted model."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from dqa_plugins.errors import ExportFailed, missing
from dqa_plugins.progress import busy

from ..options import FileForm
from .onnx import to_onnx
from .program import to_exported_program

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
    of half steps). A division of float64 by a constant it leaves alone, and computes it in float32 where the model is
    compiled for float32, with no conversion: static steps get that form, and files keep it. The steps of dynamic and
    predicted quantizers need a mark which files do not keep. `to_openvino` returns models that have both: call this on
    a model that `openvino.Core().read_model` has read, before it is compiled; on what it has changed it does nothing.

    Args:
        model: openvino.Model.
    """
    rounded = [node for node in model.get_ops() if node.get_type_name() == "Divide" and _is_rounded(node)]
    steps = [step for node in rounded for step in _divisions_behind(node.input_value(1).get_node())]
    # of what is rounded, and of its step; elsewhere behind reductions (means, features) OpenVINO's division is wrong
    for node in (*rounded, *steps):
        x, step = (value.get_node() for value in node.input_values())
        if "Reduce" in x.get_type_name():
            continue
        if step.get_type_name() == "Constant" and step.get_element_type().get_type_name() == "f32":
            _divide_wide(node, step)
        else:
            node.get_rt_info()["nonconvertable_divide_0"] = ""  # what ov::disable_divide_conversion sets in C++
    return model


def _divide_wide(node: Any, step: Any) -> None:
    """Replace a division of float32 by a constant by one of float64, rounded to float32: the same number."""
    from openvino import opset13

    readers = node.output(0).get_target_inputs()
    x = opset13.convert(node.input_value(0), "f64")
    exact = opset13.convert(opset13.divide(x, opset13.constant(step.data.astype("float64"))), "f32")
    exact.set_friendly_name(node.get_friendly_name())
    for reader in readers:
        reader.replace_source_output(exact.output(0))


def _is_rounded(node: Any) -> bool:
    return any(reader.get_node().get_type_name() == "Round" for reader in node.output(0).get_target_inputs())


def _divisions_behind(node: Any, hops: int = 4) -> list[Any]:
    """The first divisions that a step comes from."""
    if node.get_type_name() == "Divide":
        return [node]
    values = node.input_values() if hops else []
    return [found for value in values for found in _divisions_behind(value.get_node(), hops - 1)]


def read_onnx(file: Path) -> Any:
    """An ONNX file as an openvino.Model with exact divisions, which owns its weights: the file may go.

    Raises:
        MissingDependency: openvino is not installed.
    """
    # convert_model would have made products of the divisions already
    return exact_divisions(require_openvino().Core().read_model(str(file)).clone())


@busy("exporting to OpenVINO")
def to_openvino(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str] | None = None,
    *,
    dynamic_batch: bool = True,
    dynamic_shapes: Any = None,
    form: FileForm = "float",
) -> Any:
    """Convert a converted model, or a single frozen ActivationQuantizer, to OpenVINO.

    Goes through the ONNX file of that form (see `to_onnx`; "qdq": int8 weights, and int8 arithmetic where OpenVINO has
    it): OpenVINO's reader of exported programs multiplies by 1 / step where the program divides, which is a step off at
    ties. Where the way through ONNX fails, form="float" is read from the exported program all the same. The result says
    which way it took: `model.get_rt_info("dqa_plugins").astype(str)` is "onnx" or "torch.export".

    Compile it with `openvino.compile_model(model, "CPU", F32)`: the default precision is bfloat16 on many CPUs.

    Args:
        model: converted by any adapter.
        example_inputs: a tensor or a tuple of them; the first dimension of the first one is the batch.
        path: where to save (an .xml; weights beside it as .bin); None: only return. A model that is read from there
            needs `exact_divisions`.
        dynamic_batch, dynamic_shapes: see `to_onnx`.
        form: "float" or "qdq", see `to_onnx`.

    Returns:
        openvino.Model.

    Raises:
        UncalibratedQuantizer, ExportFailed, MissingDependency.
    """
    ov = require_openvino()
    if path is not None and Path(path).suffix != ".xml":
        raise ExportFailed(f"{path}: OpenVINO saves a model as .xml (and .bin beside it).")
    sizes = {"dynamic_batch": dynamic_batch, "dynamic_shapes": dynamic_shapes}
    way = "onnx"
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = to_onnx(model, example_inputs, Path(folder) / "model.onnx", form=form, **sizes)
            converted = read_onnx(file)
    except (ExportFailed, RuntimeError):
        if form != "float":
            raise
        way, converted = "torch.export", _read_program(to_exported_program(model, example_inputs, **sizes))
    converted.set_rt_info(way, "dqa_plugins")
    if path is not None:
        # the default would round weights, and scales, to float16
        ov.save_model(converted, str(path), compress_to_fp16=False)
    return converted


def _read_program(program: ExportedProgram) -> Any:
    """An ExportedProgram as an openvino.Model, with the sizes of its inputs, which OpenVINO leaves open."""
    converted = require_openvino().convert_model(program)
    inputs = [node.meta["val"] for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    shapes = [[size if isinstance(size, int) else -1 for size in value.shape] for value in inputs]
    converted.reshape(dict(zip(converted.inputs, shapes, strict=True)))
    return converted
