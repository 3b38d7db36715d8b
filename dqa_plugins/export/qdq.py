"""The compact form: QuantizeLinear / DequantizeLinear with 4-bit or 8-bit codes instead of float arithmetic.

A backend sees integers it can keep. DQA is a per-channel scale and a per-channel clip range, so it fits: a float Max
and Min (ONNX Clip takes scalar bounds only) and then one QuantizeLinear along the channel axis. Only static parameters:
a scale per sample leaves no axis for the channels (and OpenVINO 2026.4 fails on QuantizeLinear along axis 0). The rest
stays arithmetic.

What ONNX Runtime 1.31 asks for, so that it computes in integers and else as fast as with float weights:

- One type of codes for the input and the output of a convolution. A file has one: int8 if all codes are signed, else
  uint8, in which signed codes are moved by 128. Codes of fewer bits clip in it; int4 it computes with nowhere, and is
  written only where no weight is integer.
- DequantizeLinear of weights only where the activation has one scale, and the output of a convolution, too. Elsewhere
  it would dequantize a convolution's weights in each run, and quantize the activation of a MatMul by itself
  (MatMulNBits): there Cast and Mul stand, which it computes once, when it loads the file. Weights of 4 bits are cast to
  int8 before, which it does then, too.
- No integers beside float weights, which it would quantize by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map_only

from dqa_plugins.grid import Grid
from dqa_plugins.operators import DEQUANTIZE, FAKE_QUANTIZE, grid_of, plain_dequantize
from dqa_plugins.rounding import code_range

from .expand import calls, constant_of, integer_weights, plain_fake_quantize

_ONNX_TYPE = {"int4": 22, "uint4": 21, "int8": 3, "uint8": 2}  # onnx.TensorProto
_TORCH_TYPE = {"int8": torch.int8, "uint8": torch.uint8}
_MOVING = (
    *("t", "transpose", "permute", "numpy_T", "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *("clone", "contiguous", "slice", "select", "expand", "max_pool2d"),
)
_CLAMPING = ("relu", "relu_", "hardtanh", "hardtanh_", "relu6", "clamp")
INT4_OPSET = 21


def unsupported(grid: Grid | None, dtype: torch.dtype = torch.float32) -> str | None:
    """Why a quantizer has no QuantizeLinear form; None if it has one.

    Args:
        grid: of constants; None: it depends on the input.
        dtype: of the tensor.
    """
    if grid is None:
        return "its qparams are dynamic or predicted, one scale per sample"
    if dtype != torch.float32:
        return f"its tensor is {dtype}"
    if grid.keep is not None:
        return "outliers stay in float"
    if grid.width() > 8:
        return f"its important channels have {grid.width()}-bit codes, and QuantizeLinear along an axis runs up to int8"
    zero = grid.zero_point
    if zero is not None and (zero.numel() > 1 or not _end(grid.low, min) <= float(zero) <= _end(grid.high, max)):
        return "its zero point is not that of QuantizeLinear where the range excludes zero"
    return None


def _end(codes: Tensor | int, which: Any) -> int:
    return int(which(torch.as_tensor(codes).reshape(-1).tolist()))


class Forms:
    """What `expand` shall make of the quantizers and the weights of a program, for the ONNX exporter only.

    Args:
        program: of `make_program`.
        opset: of the file; int4 codes need 21, below it they are int8.

    Attributes:
        sites, weights: what was chosen for each, see `ExportedFile`.
        closed: parts of the names of operators that compute in integers only if their output is integers, too.
        signed: whether 8-bit codes are int8; None: see above.
    """

    closed: tuple[str, ...] = ("conv",)
    signed: bool | None = None

    def __init__(self, program: ExportedProgram, opset: int) -> None:
        self.version = 21 if opset >= 21 else 19 if opset >= 19 else 13
        self.sites: dict[str, str] = {}
        self.forms: dict[tuple[str, int], QDQForm] = {}
        grids: dict[tuple[str, int], Grid] = {}
        codes = integer_weights(program)
        for node in calls(program, FAKE_QUANTIZE):
            x, *arguments, site = node.args
            value = x.meta["val"]  # type: ignore[union-attr]
            values = tree_map_only(Node, lambda argument: constant_of(program, argument), arguments)
            static = all(constant_of(program, a) is not None for a in tree_leaves(arguments) if isinstance(a, Node))
            grid = grid_of(*values) if static else None
            reason = (
                unsupported(grid, value.dtype)
                or _beside_float_weights(program, node)
                or (_of_tokens(grid) if codes else None)
            )
            if grid is None or reason:
                self.sites[str(site)] = f"float: {reason}"
            else:
                grids[str(site), value.ndim] = grid
        signed = all(_end(grid.low, min) < 0 for grid in grids.values()) if self.signed is None else self.signed
        for (site, rank), grid in grids.items():
            form = self.forms[site, rank] = QDQForm(grid, signed, compact=opset >= INT4_OPSET and not codes)
            self.sites.setdefault(site, form.type + ("" if form.axis is None else " per channel"))
        self.weights = {name: weight_type(found, opset) for name, found in codes.items()}
        self.beside_integers = {w.name for w in calls(program, DEQUANTIZE) if self._beside_integers(program, w)}

    def _beside_integers(self, program: ExportedProgram, weight: Node) -> bool:
        """Whether all that a weight meets is integers with one scale, and what a closed operator makes of them, too."""
        readers = _readers(weight)
        met = {_origin(source) for reader in readers for source in reader.all_input_nodes} - {weight}
        closed = [reader for reader in readers if any(part in str(reader.target) for part in self.closed)]
        made = [node for reader in closed for node in _readers(reader, *_CLAMPING)]
        return all(self._scalar(node) for node in [*met, *made] if constant_of(program, node) is None)

    def _scalar(self, node: Node) -> bool:
        if node.target is not FAKE_QUANTIZE:
            return False
        form = self.forms.get((str(node.args[-1]), node.meta["val"].ndim))
        return form is not None and self._integer(form)

    def _integer(self, form: QDQForm) -> bool:
        return form.scalar

    def quantizer(self, x: Tensor, *arguments: Any) -> Tensor:
        """A fake_quantize call: traced by the exporter, not computed."""
        form = self.forms.get((arguments[-1], x.ndim))
        if form is None:
            return plain_fake_quantize(x, *arguments)
        return form(x, grid_of(*arguments[:-1]), self.version)

    def weight(self, node: Node) -> Callable[..., Tensor] | None:
        """What a dequantize call becomes; None: a float constant."""
        return self._dequantize_linear if node.name in self.beside_integers else plain_dequantize

    def _dequantize_linear(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, dtype: torch.dtype
    ) -> Tensor:
        """A float64 scale is rounded to float32: half a unit in the last place of the weight."""
        inputs = (codes, scale.to(dtype), zero_point.to(codes.dtype))
        attributes = {} if axis is None else {"axis": axis}
        return _symbolic("DequantizeLinear", inputs, dtype, codes.shape, self.version, attributes)


def _moves(node: Node, *others: str) -> bool:
    """Whether a node only moves the values of one tensor, or chooses among them; or is one of some others."""
    return str(node.target).split(".")[-2:][0] in (*_MOVING, *others) and len(node.all_input_nodes) == 1


def _origin(node: Node) -> Node:
    while _moves(node):
        node = node.all_input_nodes[0]
    return node


def _readers(node: Node, *others: str) -> list[Node]:
    """The nodes that compute with a tensor, behind those that only move it."""
    return [r for user in node.users for r in (_readers(user, *others) if _moves(user, *others) else [user])]


def _beside_float_weights(program: ExportedProgram, node: Node) -> str | None:
    """Why an activation must not look like integers: ONNX Runtime would quantize the float weight that it meets."""
    sources = [_origin(source) for reader in _readers(node) for source in reader.all_input_nodes]
    weights = [found for source in sources if (found := constant_of(program, source)) is not None and found.ndim > 1]
    return "the weights that it meets are float" if any(w.is_floating_point() for w in weights) else None


def _of_tokens(grid: Grid | None) -> str | None:
    """Why an activation with a scale for each channel of its last axis must not look like integers."""
    if grid is None or grid.step.ndim == 0 or grid.step.shape[-1] == 1:
        return None
    return "OpenVINO 2026.4 computes matrix products beside per-channel integers wrongly"


def weight_type(codes: Tensor, opset: int) -> str:
    """int4 or int8, uint4 or uint8: the narrowest type of the file that holds the codes of a weight."""
    signed = codes.dtype == torch.int8
    low, high = code_range(4, signed)
    small = opset >= INT4_OPSET and bool((codes >= low).all() & (codes <= high).all())
    return ("" if signed else "u") + ("int4" if small else "int8")


class QDQForm:
    """A quantizer as QuantizeLinear and DequantizeLinear.

    Args:
        grid: of constants, laid out to broadcast against x.
        signed: whether 8-bit codes are int8 in this file.
        compact: whether the operator names its type, so that codes of up to 4 bits are int4.
    """

    def __init__(self, grid: Grid, signed: bool, compact: bool) -> None:
        low, high = _end(grid.low, min), _end(grid.high, max)
        self.width = 4 if compact and grid.zero_point is None and grid.width() <= 4 else 8
        self.axis = next((i for i in range(-grid.step.ndim, 0) if grid.step.shape[i] > 1), None)
        self.signed = signed if self.width == 8 and self.axis is None else low < 0
        self.type = f"{'' if self.signed else 'u'}int{self.width}"
        full = code_range(self.width, self.signed)
        self.moved = full[0] - code_range(self.width, low < 0)[0]
        self.zero = self.moved + (0 if grid.zero_point is None else int(grid.zero_point))
        same = all(torch.as_tensor(end).unique().numel() == 1 for end in (grid.low, grid.high))
        self.bounds = (low + self.moved, high + self.moved) if same and self.width == 8 else None
        # the integer type clips by itself
        self.saturates = same and (low + self.moved, high + self.moved) == full
        self.compact = compact
        self.scalar = self.axis is None and grid.bias is None
        self.step = float(grid.step.min())

    def __call__(self, x: Tensor, grid: Grid, version: int) -> Tensor:
        """Fake-quantize x, (B, ...): traced by the exporter, not computed.

        Args:
            grid: the same, as the exported program has it.
            version: of the two operators.
        """
        y = x if grid.bias is None else x + grid.bias
        if not self.saturates:
            if self.bounds is None:
                y = torch.minimum(torch.maximum(y, grid.low * grid.step), grid.high * grid.step)
        attributes: dict[str, Any] = {} if self.axis is None else {"axis": self.axis + x.ndim}
        scale = grid.step.reshape([] if self.axis is None else [-1])
        divisor = scale if self.step > 0 else torch.where(scale > 0, scale, 1.0)
        kind: Any = _ONNX_TYPE[self.type]
        zero: tuple[Tensor, ...] = ()
        typed = attributes
        if self.compact and not self.zero:
            typed = attributes | {"output_dtype": kind}
        else:  # not both: where ONNX Runtime 1.31 makes uint8 of int8 it forgets the attribute
            zero = (torch.full_like(scale, self.zero, dtype=_TORCH_TYPE[self.type]),)
        codes = _symbolic("QuantizeLinear", (y, divisor, *zero), kind, x.shape, version, typed)
        if not self.saturates and self.bounds is not None:  # of the codes: what follows still sees integers
            ends = (torch.full([], end, dtype=_TORCH_TYPE[self.type]) for end in self.bounds)
            codes = _symbolic("Clip", (codes, *ends), kind, x.shape, 13, {})
        value = _symbolic("DequantizeLinear", (codes, scale, *zero), x.dtype, x.shape, version, attributes)
        return value if grid.bias is None else value - grid.bias


def _symbolic(
    name: str, inputs: tuple[Tensor, ...], dtype: Any, shape: Any, version: int, attributes: dict[str, Any]
) -> Tensor:
    found: Tensor = torch.onnx.ops.symbolic(name, inputs, attrs=attributes, dtype=dtype, shape=shape, version=version)
    return found
