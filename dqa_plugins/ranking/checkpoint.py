"""Interrupt and resume: the layers ranked so far, in a file.

The file names what it belongs to (`identity`), so that it is never continued with something else. It is replaced in one
step after every layer.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .errors import CheckpointMismatch, RankTableError
from .json_files import read_json, write_json
from .table import LayerRanks, RankTable

SCHEMA = "dqa_plugins.ranking_checkpoint"
VERSION = 1


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
        table = RankTable.from_dict(data.get("table"), f"{str(path)!r}")
        expected = [(name, channels) for name, channels, *_ in self.identity.get("layers", [])]
        done = [(layer.name, layer.channels) for layer in table]
        if done != expected[: len(done)]:
            raise RankTableError(
                f"{str(path)!r}: its table ranks {done[:3]}, the search goes through {expected[:3]}; the file is "
                "damaged. Delete it."
            )
        self.done = {layer.name: layer for layer in table}

    def add(self, layer: LayerRanks) -> None:
        """Remember a ranked layer, on disk too."""
        self.done[layer.name] = layer
        if self.path is not None:
            table = RankTable(tuple(self.done.values()), "greedy")
            write_json(
                self.path,
                {"schema": SCHEMA, "version": VERSION, "identity": self.identity, "table": table.to_dict()},
            )
