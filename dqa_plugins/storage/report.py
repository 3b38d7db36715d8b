"""What a stored model really holds: per edge and in total, measured on inputs.

`storage_report` runs the model and adds up `PackedActivation.nbytes`; nothing is estimated.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ChannelMismatch
from .format.errors import NothingToStore
from .model.sites import Pack
from .packed import PackedActivation


@dataclass(frozen=True)
class EdgeReport:
    """One stored value.

    Args:
        name: of the site.
        elements: values packed, over all calls.
        nbytes: bytes held, all side information included, without the codebook.
        codebook_nbytes: bytes of the codebook, which is held once.
        float_nbytes: bytes that the floats would take.
        lifetime: compute layers that run while the value waits.
    """

    name: str
    elements: int
    nbytes: int
    codebook_nbytes: int
    float_nbytes: int
    lifetime: int

    @property
    def bits_per_activation(self) -> float:
        """Bits per value, without the codebook."""
        return 8 * self.nbytes / self.elements if self.elements else 0.0


@dataclass(frozen=True)
class StorageReport:
    """All stored values of a model for some inputs."""

    edges: tuple[EdgeReport, ...]

    @property
    def elements(self) -> int:
        """Values packed."""
        return sum(e.elements for e in self.edges)

    @property
    def nbytes(self) -> int:
        """Bytes held, without the codebooks."""
        return sum(e.nbytes for e in self.edges)

    @property
    def codebook_nbytes(self) -> int:
        """Bytes of all codebooks."""
        return sum(e.codebook_nbytes for e in self.edges)

    @property
    def float_nbytes(self) -> int:
        """Bytes that the floats would take."""
        return sum(e.float_nbytes for e in self.edges)

    @property
    def bits_per_activation(self) -> float:
        """Stored bits: bytes held and codebooks, over the values."""
        return 8 * (self.nbytes + self.codebook_nbytes) / self.elements if self.elements else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible."""
        names = ("elements", "nbytes", "codebook_nbytes", "float_nbytes", "bits_per_activation")
        rows = [{"name": e.name, "lifetime": e.lifetime, **{k: getattr(e, k) for k in names}} for e in self.edges]
        return {"edges": rows, **{k: getattr(self, k) for k in names}}

    def __str__(self) -> str:
        lines = [f"{'stored value':36s} {'elements':>10s} {'bytes':>10s} {'tables':>7s} {'bits':>7s} {'of float':>9s}"]
        rows: tuple[EdgeReport | StorageReport, ...] = (*self.edges, self)
        for e in rows:
            name = e.name if isinstance(e, EdgeReport) else "total (tables included)"
            share = e.nbytes / max(e.float_nbytes, 1)
            lines.append(
                f"{name:36s} {e.elements:10d} {e.nbytes:10d} {e.codebook_nbytes:7d} {e.bits_per_activation:7.3f} "
                f"{share:8.1%}"
            )
        return "\n".join(lines)


def _arguments(inputs: Any) -> tuple[Any, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


@torch.no_grad()
def storage_report(model: nn.Module, inputs: Any) -> StorageReport:
    """Run a converted stored model and report what it held.

    Args:
        model: from `convert_stored`.
        inputs: a tensor or a tuple of positional inputs.

    Raises:
        NothingToStore: the model packs nothing.
    """
    packers = [m for m in model.modules() if isinstance(m, Pack)]
    if not packers:
        raise NothingToStore("storage_report takes what convert_stored returned; this model packs nothing.")
    held: dict[Pack, list[tuple[int, int, int]]] = {m: [] for m in packers}

    def add(module: nn.Module, _: Any, packed: Any) -> None:
        if isinstance(module, Pack) and isinstance(packed, PackedActivation):
            held[module].append((packed.numel, packed.nbytes, packed.numel * packed.dtype.itemsize))

    hooks = [m.register_forward_hook(add) for m in packers]
    try:
        model(*_arguments(inputs))
    finally:
        for hook in hooks:
            hook.remove()
    edges = []
    for module in packers:
        elements, nbytes, float_nbytes = (sum(c[k] for c in held[module]) for k in range(3))
        tables = len(module.get_extra_state())
        edges.append(EdgeReport(module.edge.name, elements, nbytes, tables, float_nbytes, module.edge.lifetime))
    return StorageReport(tuple(edges))


@torch.no_grad()
def edge_shapes(model: nn.Module, shape: tuple[int, ...]) -> dict[Pack, tuple[int, ...]]:
    """The shape of each stored value for an input of this shape: run without data.

    Raises:
        NothingToStore: the model packs nothing.
        ChannelMismatch: the model does not take this shape.
    """
    packers = {name: m for name, m in model.named_modules() if isinstance(m, Pack)}
    if not packers:
        raise NothingToStore("storage_bound of a model takes what convert_stored returned; this one packs nothing.")
    twin = copy.deepcopy(model).to("meta")
    found: dict[Pack, tuple[int, ...]] = {}

    def recorder(module: Pack) -> Any:
        return lambda _, inputs: found.__setitem__(module, tuple(inputs[0].shape))

    for name, module in packers.items():
        twin.get_submodule(name).register_forward_pre_hook(recorder(module))
    try:
        twin(torch.empty(shape, device="meta"))
    except Exception as error:
        raise ChannelMismatch(f"the model does not take an input of shape {shape}: {error}") from error
    return found
