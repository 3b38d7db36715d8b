"""What the judge says: sites, what stays float and why, and the same in names for reports."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from dqa_plugins.graph.names import require_unique
from dqa_plugins.graph.operations import Operation, Value
from dqa_plugins.method import Method
from dqa_plugins.methods import method_from_dict, method_to_dict
from dqa_plugins.quantizer import ActivationQuantizer

from .patterns import Pattern

PLACEMENT = "dqa_placement"  # where a room keeps a Summary: key in GraphModule.meta, attribute of modules
UNKNOWN_NAME = "no module or site of that name"


@dataclass(eq=False)
class Group:
    """One quantizer: what its sites share."""

    method: Method


@dataclass(eq=False)
class Site:
    """A tensor that is quantized.

    Args:
        value: the tensor.
        name: of the site.
        group: the quantizer; another site of the same group shares it.
        readers: the operations that read the quantized value; None: all that read the value.
        channel_axis: from the front, -1 for the last.
        axis_reason: what told the axis.
        axis_told: False where nothing did.
    """

    value: Value
    name: str
    group: Group
    readers: list[Operation] | None = None
    channel_axis: int = 1
    axis_reason: str = ""
    axis_told: bool = True

    @property
    def method(self) -> Method:
        """The method of the quantizer."""
        return self.group.method

    def reaches(self, operation: Operation) -> bool:
        """True if the operation reads the quantized value."""
        return self.readers is None or operation in self.readers


@dataclass
class Placement:
    """What the judge says.

    Args:
        sites: in order of execution.
        patterns: the quantized ones, for weights and a host's own annotations; operations that only move values and
            have a method are among them.
        floats: (name, reason) of what stays float.
        unmatched: settings that name nothing in the network.
        idle: (setting, reason) of those that name something and change nothing.
    """

    sites: list[Site] = field(default_factory=list)
    patterns: list[Pattern] = field(default_factory=list)
    floats: list[tuple[str, str]] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    idle: list[tuple[str, str]] = field(default_factory=list)

    def summary(self) -> Summary:
        """The same without the graph."""
        shared = {
            site.group: site.name
            for site in reversed(self.sites)  # the first site of each group gives it its name
        }
        return Summary(
            tuple(
                SiteSummary(
                    site.name,
                    site.method,
                    site.channel_axis,
                    site.axis_reason,
                    site.axis_told,
                    "" if site.value.producer is None else site.value.producer.op or site.value.producer.how,
                    tuple(r.site or r.how for r in (site.value.readers if site.readers is None else site.readers)),
                    shared[site.group],
                )
                for site in self.sites
            ),
            tuple(self.floats),
            (*((name, UNKNOWN_NAME) for name in self.unmatched), *self.idle),
        )


@dataclass(frozen=True)
class SiteSummary:
    """A site in names: what makes it, what reads it quantized, and the site whose quantizer it has."""

    name: str
    method: Method
    channel_axis: int
    axis_reason: str
    axis_told: bool
    producer: str
    readers: tuple[str, ...]
    quantizer: str


@dataclass(frozen=True)
class Summary:
    """A placement in names: sites, (name, reason) of what stays float, (setting, reason) of what has no effect."""

    sites: tuple[SiteSummary, ...] = ()
    floats: tuple[tuple[str, str], ...] = ()
    unmatched: tuple[tuple[str, str], ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Summary:
        """Itself: every quantizer of a model holds it, and it never changes."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible."""
        sites = [{**vars(site), "method": method_to_dict(site.method)} for site in self.sites]
        return {"sites": sites, "floats": self.floats, "unmatched": self.unmatched}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Summary:
        """Inverse of `to_dict`, from JSON."""
        sites = (
            SiteSummary(**{**s, "method": method_from_dict(s["method"]), "readers": tuple(s["readers"])})
            for s in found["sites"]
        )
        floats, unmatched = (tuple((a, b) for a, b in found[key]) for key in ("floats", "unmatched"))
        return cls(tuple(sites), floats, unmatched)

    def inside(self, path: str) -> Summary:
        """The same with the names of a model whose module `path` this was placed in."""

        def name(inner: str) -> str:
            return f"{path}.{inner}"

        sites = (
            replace(s, name=name(s.name), readers=tuple(map(name, s.readers)), quantizer=name(s.quantizer))
            for s in self.sites
        )
        floats, unmatched = (tuple((name(a), b) for a, b in pairs) for pairs in (self.floats, self.unmatched))
        return Summary(tuple(sites), floats, unmatched)


def keep_summary(summary: Summary, model: nn.Module, quantizers: Iterable[ActivationQuantizer]) -> None:
    """Let a model and its quantizers know their placement; hosts drop one or the other when they convert.

    Raises:
        DuplicateSites: two quantizers have one name.
    """
    quantizers = list(dict.fromkeys(quantizers))
    require_unique(quantizer.name for quantizer in quantizers)
    meta = getattr(model, "meta", None)
    if isinstance(meta, dict):
        meta[PLACEMENT] = summary
    for module in (model, *quantizers):
        setattr(module, PLACEMENT, summary)


def summaries(model: nn.Module) -> Iterator[Summary]:
    """What is known of the placements in a model, each once."""
    found: dict[int, Summary] = {}
    for module in model.modules():
        for summary in (getattr(module, "meta", {}).get(PLACEMENT), module.__dict__.get(PLACEMENT)):
            if isinstance(summary, Summary):
                found[id(summary)] = summary
    yield from found.values()
