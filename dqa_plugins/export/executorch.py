"""ExecuTorch programs (.pte) with the numbers of the converted model."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from dqa_plugins.errors import ExportFailed, missing
from dqa_plugins.operators import DEQUANTIZE, grid_of
from dqa_plugins.progress import busy
from dqa_plugins.rounding import bound, cast, narrow, nonzero

from ..options import FileForm, check_option
from .expand import calls, expand, integer_weights, parameter_name, plain_fake_quantize
from .file import ExportedFile, in_one_sentence, move, target
from .frozen import sites
from .program import make_program
from .qdq import Forms, QDQForm
from .quiet import quiet

BACKENDS = ("xnnpack", "portable")
# float32 from 2^23 to 2^24 are the integers: to add this rounds to one, half to even, and to subtract it is exact
_INTEGERS = 1.5 * 2.0**23


def require_executorch() -> None:
    """Import what lowers programs.

    Raises:
        MissingDependency: executorch is not installed.
    """
    try:
        with quiet():
            import executorch.exir  # noqa: F401
    except ImportError as error:
        raise missing("executorch", "executorch", "to_executorch") from error


@busy("exporting to ExecuTorch")
def to_executorch(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    backend: Literal["xnnpack", "portable"] = "xnnpack",
    form: FileForm = "float",
    dynamic_shapes: Any = None,
) -> ExportedFile:
    """Write a converted model, or a single frozen ActivationQuantizer, as an ExecuTorch program.

    form="float" has float32 weights and plain arithmetic: every method, static, dynamic or predicted. form="qdq" (for
    XNNPACK only) has int8 weights where the activation has one scale, and XNNPACK computes them in int8; it multiplies
    by 1 / step where torch divides, so that ties may fall on the other side.

    Args:
        model: converted by any adapter.
        example_inputs: a tensor or a tuple of them.
        path: of the file, usually .pte; what is there is replaced only when the export succeeded.
        backend: "xnnpack": what XNNPACK has is computed by it, the rest by portable kernels; "portable": these alone.
        form: "float" or "qdq".
        dynamic_shapes: which sizes are open, as torch.export takes them. None: none is, since ExecuTorch plans memory
            for the largest; give each Dim a max.

    Returns:
        the path, with what became of each quantizer and each quantized weight.

    Raises:
        UncalibratedQuantizer: a quantizer is not frozen.
        ExportFailed: torch.export or ExecuTorch failed; nothing was written.
        MissingDependency: executorch is not installed.
    """
    check_option("to_executorch", "backend", backend, BACKENDS)
    check_option("to_executorch", "form", form, get_args(FileForm) if backend == "xnnpack" else ("float",))
    require_executorch()
    file, written = target(path), ExportedFile(path)
    program = make_program(model, example_inputs, dynamic_batch=False, dynamic_shapes=dynamic_shapes)
    written.sites = dict.fromkeys(sites(model), "float")
    weights = dict.fromkeys(integer_weights(program), "float32")
    if form == "qdq":
        forms = XnnpackForms(program)
        expanded, written.sites, weights = expand(program, forms.quantizer, forms.weight), forms.sites, forms.weights
    else:
        expanded = expand(program, QUANTIZERS[backend])
    written.weights = {parameter_name(name): kind for name, kind in weights.items()}
    write_pte(expanded, file, backend)
    return written


def xnnpack_fake_quantize(x: Tensor, *arguments: Any) -> Tensor:
    """What `plain_fake_quantize` computes, in operators that XNNPACK has.

    It has no round. Around one that stays outside a network is cut in two, and each activation leaves XNNPACK, is laid
    out anew and rounded by a slow portable kernel (MobileNetV2: 44 ms, and 10 ms like this). Codes are clamped first,
    which is the same since the ends are integers; then they are small enough for a sum to round them.
    """
    grid = grid_of(*arguments[:-1])
    if grid.step.dtype != torch.float32:
        return plain_fake_quantize(x, *arguments)
    y = cast(x, torch.float32)
    y = (y if grid.bias is None else y + grid.bias) / (nonzero(grid.step) if grid.divisor is None else grid.divisor)
    low, high = grid.low, grid.high
    if grid.zero_point is not None:
        low, high = low - grid.zero_point, high - grid.zero_point
    x_hat = (bound(y, low, high) + _INTEGERS - _INTEGERS) * grid.step
    x_hat = narrow(x_hat if grid.bias is None else x_hat - grid.bias, x.dtype)
    outside = grid.outside(x)
    return x_hat if outside is None else torch.where(outside, x, x_hat)


QUANTIZERS = {"xnnpack": xnnpack_fake_quantize, "portable": plain_fake_quantize}


def write_pte(program: ExportedProgram, path: Path, backend: str) -> Path:
    """Lower an ExportedProgram and write it, or nothing at all.

    Args:
        program: of `expand`.
        path: of `target`.
        backend: one of BACKENDS.

    Raises:
        ExportFailed: ExecuTorch failed.
        MissingDependency: executorch is not installed.
    """
    require_executorch()
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    try:
        with quiet(), torch.no_grad(), tempfile.TemporaryDirectory(prefix=".pte-", dir=path.parent) as folder:
            partitioners = []
            if backend == "xnnpack":
                from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

                partitioners.append(XnnpackPartitioner())
            # its check knows aten's core operators only; ours are searchsorted, quantiles and the like
            unchecked = EdgeCompileConfig(_check_ir_validity=False)
            lowered = to_edge_transform_and_lower(program, partitioner=partitioners, compile_config=unchecked)
            (Path(folder) / path.name).write_bytes(lowered.to_executorch().buffer)
            executorch_method(Path(folder) / path.name)  # XNNPACK refuses some integers only when a file is loaded
            move(folder, path)
    except Exception as error:
        raise ExportFailed(f"ExecuTorch failed: {in_one_sentence(error)}.") from error
    return path


def executorch_method(path: str | os.PathLike[str]) -> Callable[..., list[Tensor]]:
    """A function that runs a .pte file in ExecuTorch's Python runtime.

    Raises:
        MissingDependency: executorch is not installed.
    """
    require_executorch()
    from executorch.runtime import Runtime

    with contextlib.suppress(ImportError):
        import executorch.kernels.quantized  # noqa: F401  # registers the kernels of quantize and dequantize
    program = Runtime.get().load_program(Path(path))
    method = program.load_method("forward")
    # the results lie in the method's own memory, which the next call overwrites
    return lambda *xs: [y.clone() for y in method.execute([x.contiguous() for x in xs]) if isinstance(y, Tensor)]


class XnnpackForms(Forms):
    """What `expand` shall make of a program for XNNPACK: 8-bit codes with one scale, in PT2E's operators.

    Codes of fewer bits and per-channel activations are arithmetic, and the weights that they meet are float: the
    runtime would compute them from integers in every run.
    """

    closed = ("conv", "linear", "mm")
    signed = True  # XNNPACK has no other activations

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__(program, opset=0)
        self.sites |= {site: "float" for (site, _), form in self.forms.items() if not self._integer(form)}
        kept = {str(node.args[0]) for node in calls(program, DEQUANTIZE) if self.weight(node) is not None}
        names = program.graph_signature.inputs_to_buffers
        floats = {name for node, name in names.items() if name in self.weights and node not in kept}
        self.weights |= dict.fromkeys(floats, "float32")

    def _integer(self, form: QDQForm) -> bool:
        return form.scalar and form.saturates and form.step > 0

    def quantizer(self, x: Tensor, *arguments: Any) -> Tensor:
        """A fake_quantize call."""
        form = self.forms.get((arguments[-1], x.ndim))
        if form is None or not self._integer(form):
            return xnnpack_fake_quantize(x, *arguments)
        operators, described = torch.ops.quantized_decomposed, (form.step, form.zero, -128, 127, torch.int8)
        codes = operators.quantize_per_tensor.default(x, *described)
        found: Tensor = operators.dequantize_per_tensor.default(codes, *described)
        return found

    def weight(self, node: Node) -> Callable[..., Tensor] | None:
        """What a dequantize call becomes; None: a float constant."""
        codes = node.args[0].meta["val"]  # type: ignore[union-attr]
        if node.name not in self.beside_integers or codes.dtype != torch.int8 or node.args[3] is None:
            return None
        return _per_channel


def _per_channel(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int, dtype: torch.dtype) -> Tensor:
    described = (scale.to(dtype), zero_point.to(torch.int64), axis, -127, 127, torch.int8)
    found: Tensor = torch.ops.quantized_decomposed.dequantize_per_channel.default(codes, *described)
    return found
