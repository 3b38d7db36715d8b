"""What torch.jit.script and torch.fx make of a quantizer: a module of TorchScript, and a call of the quantizer."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .errors import UnsupportedCombination
from .grid import Grid
from .parameters import QuantizerParameters
from .rounding import nonzero

_FIELDS = ("step", "low", "high", "zero_point", "bias")


def _table(grid: Grid) -> Tensor:
    """The grid's numbers as rows of a (8, C or 1) tensor: step, divisor, low, high, zero point, bias, keep."""
    step, low, high, zero, bias = (getattr(grid, name) for name in _FIELDS)
    rows = [step, nonzero(step), low, high, zero, bias, *(grid.keep or (None, None))]
    laid = [torch.as_tensor(0 if row is None else row, dtype=step.dtype, device=step.device) for row in rows]
    return torch.stack(torch.broadcast_tensors(*(row.reshape(-1) for row in laid)))


class ScriptedQuantizer(nn.Module):
    """`Grid.fake_quantize` of a fixed grid, in what TorchScript has; the same values, without gradient.

    Args:
        single, double: the grid for tensors computed in float32 and in float64; () or (C,) each.
        axis: of the channels.
    """

    table32: Tensor
    table64: Tensor

    def __init__(self, single: Grid, double: Grid, axis: int) -> None:
        super().__init__()
        self.register_buffer("table32", _table(single))
        self.register_buffer("table64", _table(double))
        self.axis = axis
        self.shifted, self.biased, self.keeps = (p is not None for p in (single.zero_point, single.bias, single.keep))

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize x, (B, ...)."""
        if x.dim() == 1:
            return self.quantize(x.unsqueeze(1)).squeeze(1)
        return self.quantize(x)

    def quantize(self, x: Tensor) -> Tensor:
        """Fake-quantize x, (B, ...), of two axes or more."""
        table = self.table64 if x.dtype == torch.float64 else self.table32
        shape = [8] + [1] * x.dim()
        if table.size(1) > 1:
            axis = self.axis + x.dim() if self.axis < 0 else self.axis
            shape[axis + 1] = table.size(1)
        grid = table.view(shape)
        y = x.to(table.dtype)
        shifted = y + grid[5] if self.biased else y
        codes = torch.round(shifted / grid[1])
        if self.shifted:
            codes = codes + grid[4]
        codes = torch.minimum(torch.maximum(codes, grid[2]), grid[3])
        if self.shifted:
            codes = codes - grid[4]
        values = codes * grid[0]
        if self.biased:
            values = values - grid[5]
        # a value that the dtype cannot hold becomes the largest that it can
        if x.dtype == torch.float16:
            values = values.clamp(-65504.0, 65504.0)
        elif x.dtype == torch.bfloat16:
            values = values.clamp(-3.3895313892515355e38, 3.3895313892515355e38)
        values = values.to(x.dtype)
        if self.keeps:
            values = torch.where((y < grid[6]) | (y > grid[7]), x, values)
        return values


def scripted(quantizer: QuantizerParameters) -> ScriptedQuantizer:
    """What torch.jit.script puts in the place of a quantizer, in the model that it is given too: script a copy.

    Raises:
        UnsupportedCombination: it is not frozen, or its qparams are not static.
    """
    if quantizer.state != "frozen" or quantizer.method.qparams != "static":
        raise UnsupportedCombination(
            f"{quantizer.label}: torch.jit.script takes frozen quantizers with static qparams; this one is in state "
            f"{quantizer.state!r} with qparams={quantizer.method.qparams!r}. Convert it first, or use torch.export."
        )
    rank = max(2, quantizer.channel_axis + 1)
    grids = [quantizer.grid(quantizer.scale.new_empty([1] * rank, dtype=d)) for d in (torch.float32, torch.float64)]
    return ScriptedQuantizer(grids[0], grids[1], quantizer.channel_axis)


def traced(quantizer: QuantizerParameters, x: Proxy, prediction: Any) -> Any:
    """A call of the quantizer in a graph that torch.fx records, whose tracers know no leaves but those of torch."""
    arguments = (x,) if prediction is None else (x, prediction)
    tracer: Any = x.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(quantizer), arguments, {})
