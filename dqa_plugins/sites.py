"""The quantizers of a model, by the names of their sites (see `graph.names`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

from .graph.axes import default_channel_axis
from .graph.names import SiteNames

if TYPE_CHECKING:
    from .quantizer import ActivationQuantizer

__all__ = ["ELEMENTWISE", "LAST_AXIS_PRODUCERS", "SiteNames", "default_channel_axis", "iter_quantizers"]

# For the rooms and parts that find axes by themselves (Brevitas, storage).
LAST_AXIS_PRODUCERS = frozenset(
    "Linear LayerNorm Embedding linear layer_norm embedding matmul bmm baddbmm addmm "
    "scaled_dot_product_attention".split()
)
# Behind these the channels are where they were before: look further up.
ELEMENTWISE = frozenset(
    "add iadd mul imul sub isub truediv relu relu_ relu6 gelu silu hardswish sigmoid tanh softmax dropout layer_norm "
    "clamp hardtanh contiguous leaky_relu elu ReLU ReLU6 GELU SiLU Hardswish Sigmoid Tanh Softmax Dropout Identity "
    "Hardtanh LeakyReLU ELU".split()
)


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
