"""Between an NNCF graph and the judge of placement.

The rules are the judge's (`host.placement`), as in FX and PT2E: NNCF's own quantizer propagation only serves weights.
A quantizer is hooked behind its tensor, or in front of the operations that read it where not all do.

Where the host differs:

- The outputs of the model are float, as in NNCF (`quantize_outputs` quantizes them).
- What an ignored operation reads stays float on that edge, as in NNCF: a tensor that only ignored operations read has
  no quantizer. In FX a layer without a QConfig reads what the layer before it quantized.
- NNCF hooks inputs of the model that are tensors themselves: what is inside a list or dict of inputs has no name.
- An operation that calls no function of torch leaves no trace: nn.Identity, a custom autograd.Function.
- `k` of `<module>.<op>.<k>` counts what runs: a branch that the example input does not take is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from nncf.common.graph.transformations.commands import TargetType
from nncf.torch.graph.transformations.commands import PTTargetPoint

from dqa_plugins.graph.operations import Operation
from dqa_plugins.host.placement import Group, Placement, judge
from dqa_plugins.host.placement import Site as JudgedSite
from dqa_plugins.host.quantize import methods_by_name
from dqa_plugins.method import Method

from .config import InvalidConfig
from .describe import Described, Tensor
from .observer import NNCFQuantizer
from .scopes import PATTERN, matcher, unmatched

OVERRIDES = "compression.scope_overrides.activations"
IGNORED = "only ignored operations read it"


@dataclass
class Site:
    """One quantizer and where NNCF calls it.

    Args:
        quantizer: in the observe state.
        tensors: the points of each tensor that it quantizes: one tensor, or several which share it.
    """

    quantizer: NNCFQuantizer
    tensors: list[list[PTTargetPoint]]

    @property
    def points(self) -> list[PTTargetPoint]:
        """Every point where the quantizer is called."""
        return [point for points in self.tensors for point in points]


def place(
    described: Described,
    method: Method | None,
    overrides: Iterable[tuple[str, Method | None]],
    ignored: Collection[str] = (),
    *,
    quantize_outputs: bool = False,
) -> Placement:
    """Ask the judge about an NNCF graph.

    Args:
        described: the graph.
        method: of every operation that is not ignored.
        overrides: (scope, method or None for float): site names, names of NNCF's operations, or patterns.
        ignored: names of NNCF's operations.
        quantize_outputs: of the model.

    Raises:
        InvalidConfig: an override matches no site, or two patterns disagree about one.
        DuplicateSites: two sites have one name.
    """
    options = {"quantize_outputs": quantize_outputs}
    skipped = {op for op, names in described.names.items() if any(name in ignored for name in names)}

    def method_of(operation: Operation) -> Method | None:
        return None if operation in skipped else method

    def ask(named: dict[str, Method | None]) -> Placement:
        found = judge(described.operations, method_of, overrides=named, **options)
        _leave_ignored(found, skipped)
        return found

    overrides = list(overrides)
    found = ask({})
    return ask(choose_methods(found, overrides, ask)) if overrides else found


def place_named(
    described: Described, method: Method | None, named: Mapping[str, Method | None], *, quantize_outputs: bool = True
) -> Placement:
    """Ask the judge with {site or module: method or None}, as FX and PT2E do.

    Raises:
        InvalidConfig: a name is neither a site nor a module.
        DuplicateSites: two sites have one name.
    """
    method_of = methods_by_name(method, named)
    found = judge(described.operations, method_of, overrides=named, quantize_outputs=quantize_outputs)
    if found.unmatched:
        known = [op.site for op in described.operations] + [op.path for op in described.operations]
        raise unmatched("quantize_model", found.unmatched[0], filter(None, known))
    return found


def float_operations(described: Described, method: Method | None, named: Mapping[str, Method | None]) -> list[str]:
    """Names of NNCF's operations that have no method: their weights stay float."""
    method_of = methods_by_name(method, named)
    calls = [op for op in described.operations if op.how not in ("input", "parameter", "output")]
    return [name for op in calls if method_of(op) is None for name in described.names[op]]


def _leave_ignored(placement: Placement, skipped: set[Operation]) -> None:
    """Take ignored operations out of the readers of each site, and sites away that nothing else reads."""

    def wants(reader: Operation) -> bool:
        if reader in skipped:
            return False
        behind = [r for value in reader.outputs for r in value.readers]
        return reader.kind != "moves" or not behind or any(wants(r) for r in behind)

    if not skipped:
        return
    for site in list(placement.sites):
        readers = site.value.readers if site.readers is None else site.readers
        wanting = [reader for reader in readers if wants(reader)]
        if readers and not wanting:
            placement.sites.remove(site)
            placement.floats.append((site.name, IGNORED))
        elif len(wanting) < len(readers):
            site.readers = wanting


def choose_methods(
    placement: Placement,
    overrides: list[tuple[str, Method | None]],
    ask: Callable[[dict[str, Method | None]], Placement],
) -> dict[str, Method | None]:
    """{site name: method, None for float} of the overrides. An exact name goes before a pattern.

    Args:
        placement: without overrides.
        overrides: (scope, method).
        ask: the placement with overrides: a method may also name a tensor that has no quantizer otherwise.

    Raises:
        InvalidConfig: an override matches no site, or two patterns disagree about one.
    """
    sites = {site.name: [node.node_name for node in site.value.key.nodes] for site in placement.sites}
    chosen: dict[str, Method | None] = {}
    for exact in (False, True):
        by: dict[str, str] = {}
        for scope, wanted in overrides:
            if exact == scope.startswith(PATTERN):
                continue
            match = matcher(scope, OVERRIDES)
            hits = [name for name, nodes in sites.items() if match(name) or any(map(match, nodes))]
            if not hits and scope == "input":
                hits = [name for name in sites if name.startswith("input.")]
            if not hits and exact and wanted is not None:
                hits = [site.name for site in ask({scope: wanted}).sites if site.name == scope]
            if not hits:
                raise unmatched(OVERRIDES, scope, sites)
            for name in hits:
                if name in by and chosen[name] != wanted:
                    raise InvalidConfig(
                        f"{OVERRIDES}: {by[name]!r} and {scope!r} both match {name!r} and disagree; name the site "
                        "itself, which goes before patterns."
                    )
                chosen[name], by[name] = wanted, scope
    return chosen


def make_sites(placement: Placement, described: Described) -> list[Site]:
    """The quantizers of a placement, one for each group, named after the site that executes first."""
    made: dict[Group, Site] = {}
    for site in placement.sites:
        if site.group not in made:
            quantizer = NNCFQuantizer(site.method, name=site.name, producer_axis=site.channel_axis, index=len(made))
            made[site.group] = Site(quantizer, [])
        made[site.group].tensors.append(_points(site, described))
    return list(made.values())


def _points(site: JudgedSite, described: Described) -> list[PTTargetPoint]:
    """Where NNCF calls the quantizer of a tensor: once behind it, or in front of each operation that reads it."""
    tensor: Tensor = site.value.key
    edges = tensor.edges
    if site.readers is not None:
        reading = {name for reader in site.readers for name in described.names[reader]}
        edges = [(node, port) for node, port in edges if node.node_name in reading]
    if len(edges) == len(tensor.edges) and len(tensor.nodes) == 1:
        return [PTTargetPoint(TargetType.OPERATOR_POST_HOOK, tensor.nodes[0].node_name, input_port_id=tensor.port)]
    return [PTTargetPoint(TargetType.OPERATOR_PRE_HOOK, node.node_name, input_port_id=port) for node, port in edges]
