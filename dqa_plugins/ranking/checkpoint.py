"""Interrupt and resume: the layers ranked so far, in a file.

The file names what it belongs to (`identity`), so that it is never continued with something else. It is replaced in one
step after every layer.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..processes import Processes
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
        ranks: of which the first reads and writes the file.

    Raises:
        CheckpointMismatch: the file belongs to something else; the message says what differs.
        RankTableError: the file is damaged.
    """

    def __init__(self, path: str | os.PathLike[str] | None, identity: dict[str, Any], ranks: Processes) -> None:
        self.path = None if path is None else Path(path)
        self.identity = json.loads(json.dumps(identity))
        self.done: dict[str, LayerRanks] = {}
        self._ranks = ranks
        if self.path is not None:
            told = ranks.share(self._table, "the checkpoint of a ranking")[0]
            if told is not None:
                self.done = {layer.name: layer for layer in RankTable.from_dict(told, f"{str(path)!r}")}

    def _table(self) -> dict[str, Any] | None:
        """What the file holds, if this process reads it and there is one."""
        if self._ranks.rank or self.path is None or not self.path.exists():
            return None
        path = self.path
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
        return table.to_dict()

    def add(self, layer: LayerRanks) -> None:
        """Remember a ranked layer, on disk too."""
        self.done[layer.name] = layer
        if self.path is not None:
            self._ranks.share(self._write, "the checkpoint of a ranking")

    def _write(self) -> None:
        if self._ranks.rank == 0 and self.path is not None:
            table = RankTable(tuple(self.done.values()), "greedy").to_dict()
            write_json(self.path, {"schema": SCHEMA, "version": VERSION, "identity": self.identity, "table": table})
