"""Torch operators of ours: what a quantized model computes, as single nodes of a torch.export program.

    dqa_plugins::fake_quantize(x, grid, site)     an activation on its Grid
    dqa_plugins::dequantize(codes, scale, ...)    a quantized weight
    dqa_plugins::module(tensors, key, ...)        a whole module, inside `modules_as_nodes` only (the runtime)

torch.export does not expand them, so an exporter that has something better for them finds each as one node with all of
its numbers among the arguments; `export.program.expand` writes them out as plain aten operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from .grid import Grid


def _fake_quantize(
    x: Tensor,
    step: Tensor,
    divisor: Tensor | None,
    zero_point: Tensor | None,
    bias: Tensor | None,
    low: Tensor | None,
    high: Tensor | None,
    ends: Sequence[int],
    keep: Sequence[Tensor],
    site: str,
) -> Tensor:
    """Quantize and dequantize x, (B, ...).

    Args:
        x: floating point.
        step, divisor, zero_point, bias: of a Grid, laid out to broadcast against x.
        low, high: smallest and largest code where they are tensors; None: those in `ends`.
        ends: (low, high) as integers; empty where they are tensors.
        keep: (a, b), or empty.
        site: the quantizer's name, unique in its program.
    """
    return grid_of(step, divisor, zero_point, bias, low, high, ends, keep).fake_quantize(x)


def grid_of(
    step: Tensor,
    divisor: Tensor | None,
    zero_point: Tensor | None,
    bias: Tensor | None,
    low: Tensor | None,
    high: Tensor | None,
    ends: Sequence[int],
    keep: Sequence[Tensor],
) -> Grid:
    """The Grid that the arguments of fake_quantize describe."""
    first, last = (low, high) if low is not None and high is not None else ends
    return Grid(step, first, last, zero_point, bias, tuple(keep) if keep else None, None, divisor)  # type: ignore[arg-type]


def plain_dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, dtype: torch.dtype) -> Tensor:
    """(codes - zero_point) * scale.

    Args:
        codes: integers of any shape.
        scale: () or (C,) float32 or float64, in which the product is computed; then it is rounded to `dtype`.
        zero_point: the shape of scale, in codes.
        axis: of the C channels in codes; None where scale is ().
        dtype: of the result.
    """
    shape = [] if axis is None else [-1 if i == axis else 1 for i in range(codes.ndim)]
    steps = codes.to(scale.dtype) - zero_point.to(scale.dtype).reshape(shape)
    return (steps * scale.reshape(shape)).to(dtype)


fake_quantize_operator: Any = torch.library.custom_op("dqa_plugins::fake_quantize", _fake_quantize, mutates_args=())
dequantize_operator: Any = torch.library.custom_op("dqa_plugins::dequantize", plain_dequantize, mutates_args=())


@fake_quantize_operator.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@dequantize_operator.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(codes, dtype=dtype)


FAKE_QUANTIZE = torch.ops.dqa_plugins.fake_quantize.default
DEQUANTIZE = torch.ops.dqa_plugins.dequantize.default


def fake_quantize(x: Tensor, grid: Grid, site: str) -> Tensor:
    """`grid.fake_quantize(x)` as one operator; it has no gradient."""
    laid: list[Tensor | None] = [None, None]
    ends: list[int] = []
    if isinstance(grid.low, int) and isinstance(grid.high, int):
        ends = [grid.low, grid.high]
    else:
        laid = [v if isinstance(v, Tensor) else torch.full_like(grid.step, v) for v in (grid.low, grid.high)]
    found: Tensor = FAKE_QUANTIZE(
        x, grid.step, grid.divisor, grid.zero_point, grid.bias, *laid, ends, list(grid.keep or ()), site
    )
    return found


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, dtype: torch.dtype) -> Tensor:
    """A weight from its codes, see `plain_dequantize`, as one operator."""
    found: Tensor = DEQUANTIZE(codes, scale, zero_point, axis, dtype)
    return found


# ------------------------------------------------------------ modules that tracing does not enter

_modules: ContextVar[dict[str, Callable[..., Tensor]] | None] = ContextVar("modules", default=None)


@torch.library.custom_op("dqa_plugins::module", mutates_args=())
def _call_module(tensors: Sequence[Tensor], key: str, tail: Sequence[int], dtype: torch.dtype) -> Tensor:
    raise RuntimeError("a node of modules_as_nodes is replaced by its module before the program runs")


@_call_module.register_fake
def _(tensors: Sequence[Tensor], key: str, tail: Sequence[int], dtype: torch.dtype) -> Tensor:
    return tensors[0].new_empty((tensors[0].shape[0], *tail), dtype=dtype)


MODULE = torch.ops.dqa_plugins.module.default


@contextmanager
def modules_as_nodes() -> Iterator[dict[str, Callable[..., Tensor]]]:
    """Inside, what depends on a sample (features, predictions, dynamic qparams) is traced as one node for each module.

    Yields:
        {key of the nodes: the module}, filled while tracing.
    """
    modules: dict[str, Callable[..., Tensor]] = {}
    token = _modules.set(modules)
    try:
        yield modules
    finally:
        _modules.reset(token)


def as_node(
    module: Callable[..., Tensor], tensors: Sequence[Tensor], tail: Sequence[int], dtype: torch.dtype
) -> Tensor | None:
    """A node that stands for module(*tensors), (B, *tail) of a dtype; None outside of `modules_as_nodes`."""
    modules = _modules.get()
    if modules is None or not torch.compiler.is_exporting():
        return None
    # while it traces, torch 2.13 hands out proxies of modules, which make their children anew at each look
    module = getattr(module, "get_base", lambda: module)()
    key = f"{type(module).__name__}.{id(module)}"
    modules[key] = module
    found: Tensor = MODULE(list(tensors), key, list(tail), dtype)
    return found
