"""Sites: where the quantizers of a model are, and what they are called.

A site's name is the same in every adapter, before and after conversion: the original qualified name of the last
module of the fused pattern (`blocks.0.relu1`), `<enclosing module>.<op>.<k>` for functional operations, `input.<k>`
for inputs. Rank tables, QPP sites and error messages use these names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from .quantizer import ActivationQuantizer

# Behind these the channels are the last axis (the names are those of torch modules, functions and aten operators).
LAST_AXIS_PRODUCERS = frozenset(
    "Linear LayerNorm Embedding linear layer_norm embedding matmul bmm baddbmm addmm "
    "scaled_dot_product_attention".split()
)


def default_channel_axis(producer: str) -> int:
    """The channel axis of a tensor made by `producer`, the class or function name of the operation.

    Returns:
        -1 behind Linear, LayerNorm, Embedding or matmul, else 1.
    """
    return -1 if producer in LAST_AXIS_PRODUCERS else 1


# How Python spells an operation must not change its name.
_SPELLINGS = {
    **{f"i{op}": op for op in ("add", "mul", "sub")},
    **{f"r{op}": op for op in ("add", "mul", "sub")},
    "truediv": "div",
    "itruediv": "div",
    "rtruediv": "div",
}

# Operations that only move or select values: their output is not quantized again.
PRESERVING = frozenset(
    "flatten transpose permute reshape view squeeze unsqueeze getitem narrow repeat repeat_interleave contiguous "
    "unflatten pad detach expand chunk split select t clone dropout max_pool1d max_pool2d max_pool3d pixel_shuffle "
    "pixel_unshuffle Identity Flatten Unflatten Dropout "
    "MaxPool1d MaxPool2d MaxPool3d PixelShuffle PixelUnshuffle".split()
)
# Operations that clamp: they get a quantizer of their own, on their output.
CLAMPING = frozenset("relu relu_ relu6 hardtanh hardtanh_ clamp clamp_ ReLU ReLU6 Hardtanh".split())
# Behind these the channels are where they were before: look further up.
ELEMENTWISE = frozenset(
    "add iadd mul imul sub isub truediv relu relu_ relu6 gelu silu hardswish sigmoid tanh softmax dropout layer_norm "
    "clamp hardtanh contiguous ReLU ReLU6 GELU SiLU Hardswish Sigmoid Tanh Softmax Dropout Identity Hardtanh".split()
)


class SiteNames:
    """Hands out site names in order of first execution; a name asked for twice gets a number."""

    def __init__(self) -> None:
        self._operations: Counter[tuple[str, str]] = Counter()
        self._modules: Counter[str] = Counter()

    def module(self, qualified_name: str) -> str:
        """Name of a module call: its qualified name; the k-th repeated call of one module appends `.k`."""
        self._modules[qualified_name] += 1
        calls = self._modules[qualified_name] - 1
        return qualified_name if calls == 0 else f"{qualified_name}.{calls}"

    def operation(self, enclosing: str, op: str) -> str:
        """Name of a functional operation: `<enclosing>.<op>.<k>`, k counting this op in this module."""
        op = op.strip("_")
        op = _SPELLINGS.get(op, op)
        self._operations[enclosing, op] += 1
        index = self._operations[enclosing, op] - 1
        return f"{enclosing}.{op}.{index}" if enclosing else f"{op}.{index}"


def _plain_path(path: str) -> str:
    """The path of an unnamed quantizer without the glue of its adapter: Brevitas holds it in a proxy."""
    return path.removesuffix(".quantizer").removesuffix(".act_quant").removesuffix(".output_quant")


def iter_quantizers(model: nn.Module) -> Iterator[tuple[str, ActivationQuantizer]]:
    """The quantizers of a model, in order of first execution.

    Works on prepared and converted models of any adapter, and on models with quantizers placed by hand (those are
    called by their qualified name).

    Yields:
        (site name, quantizer), each quantizer once.
    """
    from .quantizer import ActivationQuantizer

    found: list[tuple[tuple[float, int], str, ActivationQuantizer]] = []
    for position, (path, module) in enumerate(model.named_modules()):
        if isinstance(module, ActivationQuantizer):
            order = float("inf") if module.index is None else module.index
            found.append(((order, position), module.name or _plain_path(path), module))
    for _, name, quantizer in sorted(found, key=lambda item: item[0]):
        yield name, quantizer
