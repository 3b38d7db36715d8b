"""Site names of FX nodes.

Names are taken from the graph as it is before fusion, because a fused ConvReLU2d lives at the path of the convolution
and the ReLU behind it becomes an Identity: afterwards nobody knows what was fused.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

SITE = "dqa_site"  # key in Node.meta
CALLED = "dqa_called"  # key in GraphModule.meta: types called before fusion


@dataclass(frozen=True)
class Seen:
    """What settings can match: classes of modules, functions and methods that are called; names of modules."""

    types: Collection[Any]
    paths: Collection[str]


def fused_into(traced: GraphModule, fused_names: set[str]) -> dict[str, str]:
    """For every node that fusion kept: the last node of its pattern, {node name: last node name}."""
    last = {}
    for node in traced.graph.nodes:
        if node.name in fused_names:
            end = node
            while len(end.users) == 1 and (user := next(iter(end.users))).name not in fused_names:
                end = user
            last[node.name] = end.name
    return last


def mark_sites(fused: GraphModule, sites: dict[str, str], last: dict[str, str]) -> None:
    """Write the site name of each node of the fused graph into its meta.

    Args:
        fused: by torch.ao.
        sites: {node name: site name} of the graph before fusion.
        last: see `fused_into`.
    """
    given: set[str] = set()
    for node in reversed(fused.graph.nodes):
        site = sites.get(last.get(node.name, node.name))
        if site in given:  # onednn fuses an addition into one of its operands: the other keeps its own name
            site = sites.get(node.name)
        if site is not None:
            node.meta[SITE] = site
            given.add(site)


def site_name(node: Node) -> str:
    """The site name of a node of a prepared graph."""
    return str(node.meta.get(SITE, node.name))
