"""The compact form: QuantizeLinear / DequantizeLinear with int4 or int8 codes instead of float arithmetic.

A backend sees integers it can keep, and the file says how many bits an activation has. DQA is a per-channel scale and
a per-channel clip range, so it fits: a float Max and Min (ONNX Clip takes scalar bounds only) and then one
QuantizeLinear along the channel axis. Only static parameters: a scale per sample leaves no axis for the channels (and
OpenVINO 2026.4 fails on QuantizeLinear along axis 0).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map_only

from dqa_plugins.errors import UnsupportedCombination
from dqa_plugins.grid import Grid
from dqa_plugins.operators import FAKE_QUANTIZE, grid_of
from dqa_plugins.rounding import code_range

from .expand import calls, constant_of

_ONNX_TYPE = {(4, True): 22, (4, False): 21, (8, True): 3, (8, False): 2}  # onnx.TensorProto: INT4, UINT4, INT8, UINT8
_TORCH_TYPE = {True: torch.int8, False: torch.uint8}
INT4_OPSET = 21


def unsupported(grid: Grid | None) -> str | None:
    """Why a quantizer has no QuantizeLinear form; None if it has one.

    Args:
        grid: of constants; None: it depends on the input.
    """
    if grid is None:
        return "its qparams are dynamic or predicted, one scale per sample"
    if grid.keep is not None:
        return "outliers stay in float"
    if grid.zero_point is not None:
        return "its zero point is not that of QuantizeLinear where the range excludes zero"
    if grid.width() > 8:
        return f"its important channels have {grid.width()}-bit codes, and QuantizeLinear along an axis runs up to int8"
    return None


def qdq_forms(program: ExportedProgram, opset: int) -> Callable[..., Tensor]:
    """What `expand` shall make of the fake_quantize calls: QuantizeLinear and DequantizeLinear.

    Args:
        program: of `make_program`.
        opset: of the file; int4 needs 21, below it codes are int8.

    Raises:
        UnsupportedCombination: a quantizer has no such form; the message names it and says why.
    """
    forms: dict[tuple[str, int], QDQForm] = {}
    for node in calls(program, FAKE_QUANTIZE):
        x, *arguments, site = node.args
        values = tree_map_only(Node, lambda argument: constant_of(program, argument), arguments)
        static = all(constant_of(program, a) is not None for a in tree_leaves(arguments) if isinstance(a, Node))
        grid = grid_of(*values) if static else None
        reason = unsupported(grid)
        if grid is None or reason:
            raise UnsupportedCombination(f"'{site}' has no QuantizeLinear form: {reason}. Use form='float'.")
        forms[str(site), x.meta["val"].ndim] = QDQForm(grid, opset)  # type: ignore[union-attr]

    def quantizer(x: Tensor, *arguments: Any) -> Tensor:
        return forms[arguments[-1], x.ndim](x, grid_of(*arguments[:-1]))

    return quantizer


class QDQForm:
    """A quantizer as QuantizeLinear and DequantizeLinear, for the ONNX exporter only.

    Args:
        grid: of constants, laid out to broadcast against x.
        opset: of the file.
    """

    def __init__(self, grid: Grid, opset: int) -> None:
        self.opset = opset
        self.signed = bool(torch.as_tensor(grid.low).min() < 0)
        self.width = 4 if opset >= INT4_OPSET and grid.width() <= 4 else 8
        self.axis = next((i for i in range(-grid.step.ndim, 0) if grid.step.shape[i] > 1), None)
        full = code_range(self.width, self.signed)
        ends = (torch.as_tensor(grid.low), torch.as_tensor(grid.high))
        # the integer type clips by itself
        self.saturates = all(bool((end == limit).all()) for end, limit in zip(ends, full, strict=True))

    def __call__(self, x: Tensor, grid: Grid) -> Tensor:
        """Fake-quantize x, (B, ...): traced by the exporter, not computed.

        Args:
            grid: the same, as the exported program has it.
        """
        y = x if grid.bias is None else x + grid.bias
        if not self.saturates:
            y = torch.minimum(torch.maximum(y, grid.low * grid.step), grid.high * grid.step)
        version = 21 if self.opset >= 21 else 19 if self.opset >= 19 else 13
        scale = grid.step.reshape([] if self.axis is None else [-1])
        divisor = torch.where(scale > 0, scale, 1.0)
        attributes: dict[str, Any] = {} if self.axis is None else {"axis": self.axis + x.ndim}
        inputs: tuple[Tensor, ...] = (y, divisor)
        quantize: dict[str, Any] = dict(attributes)
        if self.opset >= INT4_OPSET:
            quantize["output_dtype"] = _ONNX_TYPE[self.width, self.signed]
        else:
            inputs = (*inputs, torch.zeros_like(divisor, dtype=_TORCH_TYPE[self.signed]))
        codes = torch.onnx.ops.symbolic(
            "QuantizeLinear",
            inputs,
            attrs=quantize,
            dtype=_ONNX_TYPE[self.width, self.signed],
            shape=x.shape,
            version=version,
        )
        value = torch.onnx.ops.symbolic(
            "DequantizeLinear", (codes, scale), attrs=attributes, dtype=x.dtype, shape=x.shape, version=version
        )
        return value if grid.bias is None else value - grid.bias
