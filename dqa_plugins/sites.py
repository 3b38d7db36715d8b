"""The quantizers of a model, by the names of their sites (see `graph.names`)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .quantizer import ActivationQuantizer


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
    found: list[tuple[tuple[float, int], str, ActivationQuantizer]] = []
    for position, (path, module) in enumerate(model.named_modules()):
        if isinstance(module, ActivationQuantizer):
            order = float("inf") if module.index is None else module.index
            found.append(((order, position), module.name or _plain_path(path), module))
    for _, name, quantizer in sorted(found, key=lambda item: item[0]):
        yield name, quantizer
