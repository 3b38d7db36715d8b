"""ONNX files with the numbers of the converted model."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from torch.export import ExportedProgram

from dqa_plugins._version import __version__
from dqa_plugins.errors import ExportFailed, missing
from dqa_plugins.methods import method_to_dict
from dqa_plugins.progress import busy

from ..errors import InvalidArgument
from ..options import FileForm, check_option
from .expand import expand, integer_weights, parameter_name
from .file import ExportedFile, in_one_sentence, move, target
from .frozen import sites
from .program import make_program
from .qdq import Forms
from .quiet import quiet

# below 18 the exporter writes 18 in silence; 26 is the newest that it converts to and that ONNX Runtime 1.31 reads
MIN_OPSET, MAX_OPSET = 18, 26


def _require_onnxscript() -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise missing("onnxscript", "onnx", "to_onnx") from error


@busy("exporting to ONNX")
def to_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = True,
    dynamic_shapes: Any = None,
    opset: int = 21,
    form: FileForm = "float",
) -> ExportedFile:
    """Write a converted model, or a single frozen ActivationQuantizer, as an ONNX file.

    form="float" is plain arithmetic (Div, Round, Max, Min, Mul; TopK for dynamic quantiles) and float32 weights: the
    same numbers as torch for every method, static or dynamic, with the optimizations of ONNX Runtime on or off.
    form="qdq" has int8 or int4 weights behind DequantizeLinear, and QuantizeLinear and DequantizeLinear for static
    Direct, DQA (n + m <= 8) and NoisyQuant; the others are arithmetic. A runtime then computes in integers what it
    can, and rounds as it does: see docs/deployment.md.

    Args:
        model: converted by any adapter.
        example_inputs: a tensor or a tuple of them; the first dimension of the first one is the batch.
        path: of the file; what is there is replaced only when the export succeeded. A symbolic link stays one. More
            than 1.5 GB of weights go to a second file beside it, with `.data` behind its name.
        dynamic_batch: leave the batch size open.
        dynamic_shapes: which sizes are open, as torch.export takes them; dynamic_batch does not count then.
        opset: 18 to 26; int4 codes need 21 (below it form="qdq" writes int8).
        form: "float" or "qdq".

    Returns:
        the path, with what became of each quantizer and each quantized weight. The file says so too: its metadata have
        an entry `dqa_plugins`, a JSON object with version, form, sites (method and its fields) and weights.

    Raises:
        UncalibratedQuantizer: a quantizer is not frozen.
        ExportFailed: torch.export or the ONNX exporter failed; nothing was written.
        MissingDependency: onnx or onnxscript is not installed.
    """
    if not isinstance(opset, int) or not MIN_OPSET <= opset <= MAX_OPSET:
        raise InvalidArgument(f"to_onnx(opset={opset!r}): torch's exporter writes opset {MIN_OPSET} to {MAX_OPSET}.")
    check_option("to_onnx", "form", form, get_args(FileForm))
    _require_onnxscript()
    file, written = target(path), ExportedFile(path)
    program = make_program(model, example_inputs, dynamic_batch=dynamic_batch, dynamic_shapes=dynamic_shapes)
    methods = {site: method_to_dict(quantizer.method) for site, quantizer in sites(model).items()}
    if form == "qdq":
        forms = Forms(program, opset)
        expanded = expand(program, forms.quantizer, forms.weight)
        written.sites, weights = forms.sites, forms.weights
    else:
        expanded = expand(program)
        written.sites = dict.fromkeys(methods, "float")
        weights = dict.fromkeys(integer_weights(program), "float32")
    written.weights = {parameter_name(name): kind for name, kind in weights.items()}
    about = {
        "version": __version__,
        "form": form,
        "sites": {site: methods[site] | {"form": chosen} for site, chosen in written.sites.items()},
        "weights": dict(written.weights),
    }
    write_onnx(expanded, file, opset, weights, {"dqa_plugins": json.dumps(about)})
    return written


def write_onnx(
    program: ExportedProgram,
    path: Path,
    opset: int = 21,
    weights: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write an ExportedProgram as an ONNX file, or nothing at all.

    It is written in a new folder beside the file and moved into place: no other file is touched.

    Args:
        program: of `expand`.
        path: of `target`.
        weights: {buffer with the codes of a weight: its type in the file}, such as int4.
        metadata: of the file.

    Raises:
        ExportFailed: the ONNX exporter failed.
        MissingDependency: onnx or onnxscript is not installed.
    """
    _require_onnxscript()
    try:
        with quiet(), torch.no_grad(), tempfile.TemporaryDirectory(prefix=".onnx-", dir=path.parent) as folder:
            exported: Any = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False)
            if exported.model.opset_imports[""] != opset:
                raise ExportFailed(f"the model cannot be written as opset {opset}; 18 is what torch's exporter writes")
            _anonymous(exported.model)
            _pack_weights(exported.model, weights or {})
            exported.model.metadata_props.update(metadata or {})
            exported.save(str(Path(folder) / path.name))
            move(folder, path)
    except Exception as error:
        raise ExportFailed(f"the ONNX exporter failed: {in_one_sentence(error)}.") from error
    return path


def _anonymous(model: Any) -> None:
    """Take out where nodes came from: modules, lines of code, local paths."""
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in graph.all_nodes():
            node.metadata_props.clear()


def _pack_weights(model: Any, weights: Mapping[str, str]) -> None:
    """Name integer weights as their parameters; those that fit become int4, which torch does not have.

    Args:
        weights: {initializer: its type}.
    """
    import onnx_ir as ir

    for value in [value for name, value in model.graph.initializers.items() if name in weights]:
        if weights[value.name].endswith("int4"):
            wide, kind = value.dtype, ir.DataType[weights[value.name].upper()]
            value.const_value = ir.tensor(value.const_value.numpy().astype(kind.numpy()), dtype=kind)
            value.dtype = kind
            readers = [use.node for use in value.uses() if use.node.op_type == "DequantizeLinear"]
            if readers:
                cast = ir.node("Cast", [value], {"to": wide})
                cast.outputs[0].name, cast.outputs[0].dtype, cast.outputs[0].shape = (
                    f"{value.name}_8",
                    wide,
                    value.shape,
                )
                model.graph.insert_before(readers[0], cast)
                for node in readers:
                    node.replace_input_with(0, cast.outputs[0])
        value.name = parameter_name(value.name)
