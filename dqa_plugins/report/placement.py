"""Which tensors are quantized, along which axis, what stays float, which settings did nothing: with the reasons."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from dqa_plugins.graph.operations import QUANTIZED, facts
from dqa_plugins.host.placement import NO_METHOD
from dqa_plugins.host.sites import Summary, summaries
from dqa_plugins.host.skip import within
from dqa_plugins.quantizer import ActivationQuantizer
from dqa_plugins.sites import iter_quantizers

from .tables import Table, described

UNPLACED = "no quantizer was put behind it"
BY_HAND = "nothing is known of the network around it: the quantizer was put there by name or by hand"
GONE = "its quantizer was taken out after it was placed"


@dataclass(frozen=True)
class PlacementRow:
    """A quantized tensor.

    Attributes:
        site: its name.
        method: of its quantizer, with bits and the fields that are no defaults.
        axis: of its channels, -1 for the last.
        axis_reason: what told it.
        axis_told: False where nothing did, and the axis is a default: set `channel_axis` if it is wrong.
        producer: the operation that makes it.
        readers: sites of the operations that read it quantized.
        shared_with: the site whose quantizer it has; "" for its own.
    """

    site: str
    method: str
    axis: int
    axis_reason: str
    axis_told: bool
    producer: str
    readers: tuple[str, ...]
    shared_with: str


@dataclass(frozen=True)
class PlacementReport:
    """Where quantizers are.

    Attributes:
        sites: in order of execution.
        floats: (name, reason) of layers and operations that stay float.
        unmatched: (setting, reason) of settings that changed nothing.
    """

    sites: tuple[PlacementRow, ...]
    floats: tuple[tuple[str, str], ...]
    unmatched: tuple[tuple[str, str], ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible."""
        return {
            "sites": [asdict(row) for row in self.sites],
            "floats": [{"name": name, "reason": reason} for name, reason in self.floats],
            "unmatched": [{"setting": name, "reason": reason} for name, reason in self.unmatched],
        }

    def tables(self) -> list[Table]:
        """The tables that it prints as; those without rows are left out."""
        rows = [
            (
                row.site,
                row.method,
                str(row.axis) if row.axis_told else f"{row.axis} (default)",
                row.axis_reason,
                row.producer,
                ", ".join(row.readers) + (f" (quantizer of {row.shared_with})" if row.shared_with else ""),
            )
            for row in self.sites
        ]
        guessed = sum(not row.axis_told for row in self.sites)
        title = f"{len(rows)} quantized tensors" + (f", {guessed} with a default channel axis" if guessed else "")
        found = [
            Table(title, ("site", "method", "axis", "because", "made by", "read by"), rows),
            Table("left float", ("name", "reason"), self.floats),
            Table("settings without effect", ("setting", "reason"), self.unmatched),
        ]
        return [table for table in found if table.rows]

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.tables())) or "nothing is quantized"

    def __rich__(self) -> Any:
        """Its tables, one below the other."""
        from rich.console import Group

        return Group(*self.tables())


def placement_report(model: nn.Module) -> PlacementReport:
    """Where the quantizers of a model are, what stays float, and which settings matched nothing.

    Args:
        model: prepared or converted by any adapter, or with quantizers put in by hand.
    """
    quantizers = dict(iter_quantizers(model))
    placements = list(summaries(model)) or [Summary(floats=tuple(_without_quantizer(model, quantizers)))]
    return report_of(placements, quantizers)


def _without_quantizer(model: nn.Module, quantizers: dict[str, ActivationQuantizer]) -> Iterator[tuple[str, str]]:
    """The layers of a model whose results nobody quantizes; what functions make is not known."""
    quantized: list[str] = []
    for name, module in model.named_modules():
        kind = facts(type(module).__name__.removeprefix("Quant")).kind
        if (kind in QUANTIZED or kind == "opaque") and not within(name, quantized):
            if name in quantizers or any(isinstance(part, ActivationQuantizer) for part in module.modules()):
                quantized.append(name)
            else:
                yield name, UNPLACED


def report_of(placements: list[Summary], quantizers: dict[str, ActivationQuantizer] | None = None) -> PlacementReport:
    """The report of placements, and of the quantizers that stand for them now.

    Args:
        placements: of a model.
        quantizers: by site name; None: nothing is prepared yet.
    """
    rows, named = [], set()
    floats: dict[str, str] = {}
    unmatched: dict[str, str] = {}
    for summary in placements:
        floats.update(summary.floats)
        unmatched.update(summary.unmatched)
        for site in summary.sites:
            quantizer = None if quantizers is None else quantizers.get(site.quantizer)
            named.add(site.quantizer)
            if quantizers is not None and quantizer is None:
                floats[site.name] = GONE
                continue
            method = site.method if quantizer is None else quantizer.method
            given = method.channel_axis is not None
            rows.append(
                PlacementRow(
                    site.name,
                    described(method),
                    site.channel_axis if method.channel_axis is None else method.channel_axis,
                    "the method's channel_axis" if given else site.axis_reason,
                    given or site.axis_told,
                    site.producer,
                    site.readers,
                    "" if site.quantizer == site.name else site.quantizer,
                )
            )
    for name, quantizer in (quantizers or {}).items():
        if name not in named:
            method, axis = quantizer.method, quantizer.channel_axis
            rows.append(
                PlacementRow(name, described(method), axis, BY_HAND, method.channel_axis is not None, "", (), "")
            )
    placed = {row.site for row in rows}  # by a second quantizer of the host, which left other layers out
    left = tuple((name, reason) for name, reason in floats.items() if reason != NO_METHOD or name not in placed)
    return PlacementReport(tuple(rows), left, tuple(unmatched.items()))
