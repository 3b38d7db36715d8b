"""What the judge says: sites, what stays float and why, and the same in names for reports."""

from __future__ import annotations

from dataclasses import dataclass, field

from dqa_plugins.graph.operations import Operation, Value
from dqa_plugins.methods import Method

from .patterns import Pattern

PLACEMENT = "dqa_placement"  # key in GraphModule.meta where a room keeps a prepared model's Summary


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
    """

    sites: list[Site] = field(default_factory=list)
    patterns: list[Pattern] = field(default_factory=list)
    floats: list[tuple[str, str]] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)

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
                    "" if site.value.producer is None else site.value.producer.op or site.value.producer.how,
                    tuple(r.site or r.how for r in (site.value.readers if site.readers is None else site.readers)),
                    shared[site.group],
                )
                for site in self.sites
            ),
            tuple(self.floats),
            tuple(self.unmatched),
        )


@dataclass(frozen=True)
class SiteSummary:
    """A site in names: what makes it, what reads it quantized, and the site whose quantizer it has."""

    name: str
    method: Method
    channel_axis: int
    axis_reason: str
    producer: str
    readers: tuple[str, ...]
    quantizer: str


@dataclass(frozen=True)
class Summary:
    """A placement in names: sites, (name, reason) of what stays float, settings that name nothing."""

    sites: tuple[SiteSummary, ...]
    floats: tuple[tuple[str, str], ...]
    unmatched: tuple[str, ...]
