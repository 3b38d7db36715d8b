"""Interrupt and resume: the layers ranked so far, in a file.

The file names what it belongs to (settings, layers, and a digest of the model's tensors and of the batches), so that it
is never continued with something else. It is replaced in one step after every layer.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..methods import method_to_dict
from ..quantizer import ActivationQuantizer
from .errors import CheckpointMismatch, RankTableError
from .table import LayerRanks, RankTable, read_json, write_json

SCHEMA = "dqa_plugins.ranking_checkpoint"
VERSION = 1
_WRITTEN = ("extra_bits", "_extra_state")  # what a ranking changes: a model ranked before is still the same model


class Checkpoint:
    """Layers that were ranked already.

    Args:
        path: of the file, or None: nothing is kept.
        identity: what the ranking belongs to, JSON-compatible, as `identity` made it.

    Raises:
        CheckpointMismatch: the file belongs to something else; the message says what differs.
        RankTableError: the file is damaged.
    """

    def __init__(self, path: str | os.PathLike[str] | None, identity: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.identity = json.loads(json.dumps(identity))
        self.done: dict[str, LayerRanks] = {}
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        data = read_json(path)
        if not isinstance(data, dict) or data.get("schema") != SCHEMA or data.get("version") != VERSION:
            raise RankTableError(
                f"{str(path)!r} is no ranking checkpoint of version {VERSION}; give another file name."
            )
        found = data.get("identity")
        found = found if isinstance(found, dict) else {}
        differing = [key for key in self.identity if found.get(key) != self.identity[key]]
        if differing:
            raise CheckpointMismatch(
                f"the checkpoint {str(path)!r} was made with other {', '.join(differing)}. Delete it, or give another "
                "file name."
            )
        for layer in RankTable.from_dict(data.get("table"), f"{str(path)!r}"):
            self.done[layer.name] = layer

    def add(self, layer: LayerRanks) -> None:
        """Remember a ranked layer, on disk too."""
        self.done[layer.name] = layer
        if self.path is not None:
            table = RankTable(tuple(self.done.values()), "greedy")
            write_json(
                self.path,
                {"schema": SCHEMA, "version": VERSION, "identity": self.identity, "table": table.to_dict()},
            )


def identity(
    model: nn.Module, rankable: dict[str, ActivationQuantizer], batches: list[Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """What a checkpoint belongs to.

    Args:
        model: the prepared model.
        rankable: its quantizers by site name.
        batches: (inputs, targets).
        settings: strategy, metric, strict, seed.
    """
    layers = [[name, q.num_channels, method_to_dict(q.method)] for name, q in rankable.items()]
    kept = [value for key, value in sorted(model.state_dict().items()) if not key.endswith(_WRITTEN)]
    return {**settings, "layers": layers, "model": _digest(kept), "batches": _digest(batches)}


def _digest(value: Any) -> str:
    digest = hashlib.sha256()
    for part in _parts(value):
        digest.update(part)
    return digest.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, dict):
        for key, item in value.items():
            yield repr(key).encode()
            yield from _parts(item)
    elif isinstance(value, tuple | list):
        yield f"{len(value)}".encode()
        for item in value:
            yield from _parts(item)
    else:
        yield repr(value).encode()
