"""RankTable: for every layer, its channels from the most to the least important one.

A table holds the whole order, not a choice: the same table serves any ratio. It is plain data, written as JSON:

    {"schema": "dqa_plugins.rank_table", "version": 1, "strategy": "greedy", "metric": "accuracy", "seed": 0,
     "strict": false, "layers": [{"name": "relu1", "order": [3, 0, ...], "scores": [...], "losses": [...]}, ...]}
"""

from __future__ import annotations

import math
import numbers
import os
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..quantizer import ActivationQuantizer
from ..sites import iter_quantizers
from .errors import RankingError, RankTableError, RankTableMismatch
from .json_files import read_json, write_json

SCHEMA = "dqa_plugins.rank_table"
VERSION = 1

T = TypeVar("T")


@dataclass(frozen=True)
class LayerRanks:
    """The ranking of one layer's C channels.

    Args:
        name: site name, as `iter_quantizers` yields it.
        order: a permutation of 0..C-1, most important channel first.
        scores: C values, `scores[c]` is that of channel c; higher is more important. greedy: the mean metric with c
            left unquantized; taylor: the mean squared first-order change of the loss; error: the mean squared
            quantization error; random: the number drawn.
        losses: C mean cross-entropies with channel c left unquantized, which broke ties (lower is better), or None.

    Raises:
        RankTableError: the name is no text, order is no permutation, a score is not finite, or the lengths differ.
    """

    name: str
    order: tuple[int, ...]
    scores: tuple[float, ...]
    losses: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise RankTableError(f"the name of a layer is a text; got {reprlib.repr(self.name)}.")
        if sorted(self.order) != list(range(len(self.order))):
            raise RankTableError(f"{self.name!r}: the order must hold each of 0..{len(self.order) - 1} once.")
        for field in ("scores", "losses"):
            values = getattr(self, field)
            if values is None:
                continue
            if len(values) != len(self.order):
                raise RankTableError(f"{self.name!r}: {len(values)} {field} for {len(self.order)} channels.")
            if not all(map(math.isfinite, values)):
                raise RankTableError(f"{self.name!r}: {field} must be finite; got {reprlib.repr(list(values))}.")

    @property
    def channels(self) -> int:
        """C."""
        return len(self.order)

    def important(self, ratio: float) -> tuple[int, ...]:
        """The round(ratio * C) most important channels, best first. ratio: in [0, 1]."""
        return self.order[: round(ratio * self.channels)]


@dataclass(frozen=True)
class RankTable:
    """The ranking of every layer of a model, in order of execution.

    Args:
        layers: one entry per quantizer whose method has important channels.
        strategy: "greedy", "taylor", "error" or "random".
        metric: name of the metric that greedy maximised, "" for other strategies.
        seed, strict: as given to `rank_channels`.
    """

    layers: tuple[LayerRanks, ...]
    strategy: str
    metric: str = ""
    seed: int = 0
    strict: bool = False

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[LayerRanks]:
        return iter(self.layers)

    def __getitem__(self, name: str) -> LayerRanks:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"the rank table has no layer {name!r}; it has {_listed([layer.name for layer in self.layers])}")

    # ------------------------------------------------------------ use

    def apply(self, model: nn.Module, ratio: float | None = None) -> None:
        """Give the most important channels of each layer their extra bits, in place.

        Works on prepared and on converted models. Every check comes first: a refused table changes nothing.

        Args:
            model: with the layers that the table was made for.
            ratio: share of important channels, in [0, 1]; None: each method's own.

        Raises:
            RankTableMismatch: layers or numbers of channels differ.
            RankingError: ratio is not in [0, 1].
        """
        if ratio is not None and (
            isinstance(ratio, bool) or not isinstance(ratio, numbers.Real) or not 0 <= ratio <= 1
        ):
            raise RankingError(f"ratio={ratio!r}: the share of important channels is a number in [0, 1], or None.")
        quantizers = self._matching(model)
        for layer in self.layers:
            quantizer = quantizers[layer.name]
            quantizer.set_extra_bits(extra_bits(layer, quantizer.method, ratio))

    def _matching(self, model: nn.Module) -> dict[str, ActivationQuantizer]:
        found = {name: q for name, q in iter_quantizers(model) if q.method.has_important_channels}
        missing = [layer.name for layer in self.layers if layer.name not in found]
        names = {layer.name for layer in self.layers}
        unranked = [name for name in found if name not in names]
        if missing or unranked:
            parts = []
            if missing:
                parts.append(f"the table ranks {_listed(missing)}, which the model does not quantize by DQA")
            if unranked:
                parts.append(f"the model has {_listed(unranked)}, which the table does not rank")
            raise RankTableMismatch(
                f"this rank table belongs to another model: {'; '.join(parts)}. Rank the channels of this model."
            )
        for layer in self.layers:
            channels = found[layer.name].num_channels
            if channels is not None and channels != layer.channels:
                raise RankTableMismatch(
                    f"this rank table belongs to another model: {layer.name!r} has {channels} channels, the table "
                    f"ranks {layer.channels}. Rank the channels of this model."
                )
        return found

    # ------------------------------------------------------------ JSON

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON-compatible values; `from_dict` is the inverse."""
        layers = [
            {
                "name": layer.name,
                "order": list(layer.order),
                "scores": list(layer.scores),
                "losses": None if layer.losses is None else list(layer.losses),
            }
            for layer in self.layers
        ]
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "strategy": self.strategy,
            "metric": self.metric,
            "seed": self.seed,
            "strict": self.strict,
            "layers": layers,
        }

    @classmethod
    def from_dict(cls, data: Any, source: str = "rank table") -> RankTable:
        """Build a table from what `to_dict` returned.

        Args:
            data: the values.
            source: what error messages call it.

        Raises:
            RankTableError: another schema or version, or a field is missing or has the wrong type.
        """
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise RankTableError(f"{source}: no rank table (the field 'schema' must be {SCHEMA!r}).")
        if type(data.get("version")) is not int or data["version"] != VERSION:
            raise RankTableError(
                f"{source}: schema version {reprlib.repr(data.get('version'))}; this version of dqa-plugins reads "
                f"{VERSION}."
            )
        try:
            layers = tuple(
                LayerRanks(
                    layer["name"],
                    tuple(_of_type(int, c) for c in _of_type(list, layer["order"])),
                    _numbers(layer["scores"]),
                    None if layer["losses"] is None else _numbers(layer["losses"]),
                )
                for layer in _of_type(list, data["layers"])
            )
            table = cls(
                layers,
                _of_type(str, data["strategy"]),
                _of_type(str, data["metric"]),
                _of_type(int, data["seed"]),
                _of_type(bool, data["strict"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            if isinstance(error, RankTableError):
                raise RankTableError(f"{source}: {error}") from error
            raise RankTableError(
                f"{source}: damaged rank table ({type(error).__name__}: {error}). Save it again."
            ) from error
        names = [layer.name for layer in layers]
        if len(set(names)) != len(names):
            raise RankTableError(f"{source}: a layer is ranked twice.")
        return table

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON. The file appears whole or not at all."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RankTable:
        """Read a table that `save` wrote.

        Raises:
            RankTableError: the file is no rank table of this version.
            OSError: it cannot be read.
        """
        return cls.from_dict(read_json(path), f"{os.fspath(path)!r}")

    # ------------------------------------------------------------ print

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [5])
        header = f"{self.strategy} ranking" + (f" by {self.metric}" if self.metric else "")
        lines = [header, f"{'layer':<{width}}  channels  best to worst (score of the best, of the worst)"]
        for layer in self.layers:
            shown = " ".join(map(str, layer.order[:12])) + (" ..." if layer.channels > 12 else "")
            ends = (
                f"  ({layer.scores[layer.order[0]]:.5g}, {layer.scores[layer.order[-1]]:.5g})" if layer.channels else ""
            )
            lines.append(f"{layer.name:<{width}}  {layer.channels:>8}  {shown}{ends}")
        return "\n".join(lines)


def extra_bits(layer: LayerRanks, method: Any, ratio: float | None = None) -> Tensor:
    """m on the round(ratio * C) best channels, 0 elsewhere.

    Args:
        layer: the order of the channels.
        method: one with important channels; gives m (`extra`), and the ratio where none is given.
        ratio: in [0, 1], or None.

    Returns:
        (C,) int64.
    """
    extra = torch.zeros(layer.channels, dtype=torch.int64)
    extra[list(layer.important(method.ratio if ratio is None else ratio))] = method.extra
    return extra


def _of_type(kind: type[T], value: Any) -> T:
    """`value` if its type is `kind` exactly: JSON's true is no number."""
    if type(value) is not kind:
        raise TypeError(f"{reprlib.repr(value)} where {kind.__name__} is expected")
    return value


def _numbers(values: Any) -> tuple[float, ...]:
    return tuple(float(v) if type(v) is int else _of_type(float, v) for v in _of_type(list, values))


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
