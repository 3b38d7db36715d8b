"""The one judge of placement: which tensors of a network are quantized, under which name, along which axis.

A room describes its host's graph as operations in order of execution (`graph.operations`), asks `judge`, and puts its
own quantizers where the `Placement` says. The judge knows no host and changes nothing.

    operations = [Operation("", "input", "input.0", outputs=(x,), site="input.0"), Operation("Conv2d", ...), ...]
    placement = judge(operations, lambda operation: DQA(bits=4), overrides={"relu.0": None})
    for site in placement.sites:
        site.value.key       the host's handle of the tensor
        site.readers         the operations that read it quantized; None: all of them
        site.group           sites of one group share one quantizer
        site.channel_axis, site.axis_reason

What a room must describe
- inputs, parameters and constants read by functions, every call of a leaf module or function, and the model's output
  as an operation with how="output": a value that only the output reads is read;
- `shape` and `floating` of values, where the host knows them or a run showed them (`graph.record`);
- `writes` of in-place operations; axes of transposes and reductions in `arguments` and `keywords`;
- `quantized=True` for values that the host quantizes itself.

The rules
- An operation is quantized if `method_of` gives it a method and it computes, changes values, joins, clamps or
  normalizes (`graph.operations.QUANTIZED`). It quantizes what it makes; what it reads is quantized too, on that edge,
  unless it is already.
- A layer and the batch norm and ReLU behind it, an addition or multiplication and the ReLU behind it are one pattern:
  the method is the first operation's, the site is called after the last.
- Every operation that changes values has a range of its own: scalar multiplication, pooling, mean.
- An operation that only moves values (flatten, slice, max-pool) is not quantized again: behind it, its source is.
- A clamp quantizes its output, not its input.
- The inputs and the output of a concatenation share one quantizer, where methods are equal, do not look at channels
  that differ, and predict nothing.
- Other functions (GELU, softmax, exp) stay float; what quantized operations read of them is quantized.
- Parameters, constants, positions, masks, logits with a mask, norm internals, integers and 0-d tensors are left float
  and are listed.
- A value that is written in place later is not quantized before: the write would be lost.
- `overrides` name sites: None leaves one float; a method replaces, or adds, one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from dqa_plugins.graph.aliases import written_later
from dqa_plugins.graph.axes import Axis, channel_axes
from dqa_plugins.graph.constants import INTERNAL, LOGITS, masked_logits, no_activations, norm_internals
from dqa_plugins.graph.names import require_unique
from dqa_plugins.graph.operations import QUANTIZED, Operation, Value
from dqa_plugins.method import Method
from dqa_plugins.quantizer import ActivationQuantizer

from .patterns import Pattern, find_patterns
from .sites import PLACEMENT, Group, Placement, Site, SiteSummary, Summary
from .skip import within

__all__ = ["PLACEMENT", "Group", "Pattern", "Placement", "Site", "SiteSummary", "Summary", "judge"]

NO_METHOD = "no method is set for it"
WRITTEN = "written in place later: quantizing it before would lose the write"
SCALAR = "0-d"
UNREAD = "a function whose result no quantized operation reads"
OPAQUE = "its result may be quantized; all that it computes inside, its own layers too, stays float"
OUTPUT = "an output of the model"
OVERRIDDEN = "left out by name"
MOVES = "it makes no values of its own that could be quantized"


def judge(
    operations: Sequence[Operation],
    method_of: Callable[[Operation], Method | None],
    *,
    overrides: Mapping[str, Method | None] | None = None,
    quantize_outputs: bool = True,
) -> Placement:
    """Decide which values are quantized.

    Args:
        operations: of the network, in order of execution.
        method_of: the method of an operation; None leaves it float.
        overrides: {site name: method or None}; "input" stands for all inputs. Names of modules, which `method_of`
            has taken care of, may be among them.
        quantize_outputs: False leaves values float that only the model's output reads.

    Raises:
        DuplicateSites: two sites have one name.
    """
    judgement = _Judgement(operations, method_of)
    for pattern in judgement.patterns:
        judgement.observe(pattern)
    if not quantize_outputs:
        judgement.leave_outputs()
    overrides = dict(overrides or {})
    judgement.override(overrides)
    sites = sorted(judgement.sites.values(), key=lambda site: judgement.position[site.value])
    _separate(sites, judgement.axes)
    for site in sites:
        axis = judgement.axes[site.value]
        site.channel_axis, site.axis_reason, site.axis_told = axis.axis, axis.reason, axis.told
    require_unique([site.name for site in sites])
    unmatched = [name for name in overrides if not _names_something(name, operations)]
    floats = judgement.floats()
    wanted = [name for name, m in overrides.items() if m is not None and name not in ("", "input", *unmatched)]
    return Placement(
        sites,
        [p for p in judgement.patterns if judgement.quantizes(p, moves=True)],
        floats,
        unmatched,
        [(name, dict(floats).get(name, MOVES)) for name in wanted if not judgement.quantizes_any(name)],
    )


def _names_something(name: str, operations: Sequence[Operation]) -> bool:
    if name in ("", "input"):
        return True
    return any(op.site == name or within(op.path, (name,)) for op in operations)


class _Judgement:
    """What is decided so far."""

    def __init__(self, operations: Sequence[Operation], method_of: Callable[[Operation], Method | None]) -> None:
        self.operations, self.method_of = operations, method_of
        self.patterns = find_patterns(operations)
        self.constants = no_activations(operations)
        inside = dict.fromkeys(norm_internals(operations, self.constants), INTERNAL)
        self.internals = {**dict.fromkeys(masked_logits(operations), LOGITS), **inside}
        self.written = written_later(operations)
        self.axes: dict[Value, Axis] = channel_axes(operations, self.constants)
        self.position = {value: i for i, op in enumerate(operations) for value in op.outputs}
        self.sites: dict[Value, Site] = {}
        self.dropped: dict[Value, str] = {}
        self.clamped: set[Value] = set()  # quantized behind the clamp that reads them

    def refusal(self, value: Value) -> str | None:
        """Why a value cannot be quantized; None if it can."""
        if value in self.constants:
            return self.constants[value]
        if value.producer is not None and value.producer in self.internals:
            return self.internals[value.producer]
        if value.shape == ():
            return SCALAR
        return WRITTEN if value in self.written else None

    def possible(self, value: Value) -> bool:
        """Whether a quantizer can be put on a value."""
        return value.single and value.floating and not value.quantized and self.refusal(value) is None

    def quantizes(self, pattern: Pattern, *, moves: bool = False) -> bool:
        """Whether the operations of a pattern are quantized; with `moves`, or hand quantized values on."""
        root = pattern.root
        activation = any(value not in self.constants for value in root.outputs)
        kinds = root.kind in QUANTIZED or (moves and root.kind == "moves")
        return kinds and activation and self.method_of(root) is not None

    def quantizes_any(self, name: str) -> bool:
        """Whether the method of a site or module that was named quantizes something."""
        patterns = [p for p in self.patterns if within(p.root.path, (name,)) and self.quantizes(p)]
        return bool(patterns) or any(site.name == name for site in self.sites.values())

    # ------------------------------------------------------------ the rules

    def observe(self, pattern: Pattern) -> None:
        """Quantize what an operation reads and makes."""
        root, method = pattern.root, self.method_of(pattern.root)
        if method is None or not self.quantizes(pattern) or root in self.internals:
            return
        read = []
        if root.kind != "clamps":
            requested = [self.request(value, root, method) for value in root.inputs]
            read = [site for site in requested if site is not None]
        elif root.inputs:
            self.move_behind(root, root.inputs[0])
        value = pattern.last.outputs[0] if pattern.last.outputs else None
        if value is None or not self.possible(value) or (root.kind == "joins" and not read):
            return
        made = self.sites[value] = Site(value, pattern.last.value_name(value), Group(method))
        if root.kind == "joins":
            group = read[0].group
            for site in (*read[1:], made):
                if site.method == group.method:
                    site.group = group

    def request(self, value: Value, reader: Operation, method: Method) -> Site | None:
        """Quantize a value for one reader, unless it is; of a value that was only moved, what it was before."""
        chain = [(value, reader)]
        while (mover := value.producer) is not None and mover.kind == "moves" and mover.inputs:
            if self.reached(value, chain[-1][1]):
                break
            value = mover.inputs[0]
            chain.append((value, mover))
        for source, edge in reversed(chain):  # the first of the chain that can be quantized
            if source.quantized:
                return None
            site = self.sites.get(source)
            if site is None and self.possible(source):
                producer = source.producer
                name = source.key if producer is None else producer.value_name(source)
                site = self.sites[source] = Site(source, str(name), Group(method), [])
            if site is not None:
                if not site.reaches(edge):
                    site.readers = [*(site.readers or ()), edge]
                return site
        return None

    def reached(self, value: Value, reader: Operation) -> bool:
        """Whether a reader gets the value quantized as things stand."""
        return value in self.sites and self.sites[value].reaches(reader)

    def move_behind(self, clamp: Operation, value: Value) -> None:
        """Leave a value float that only a clamp reads: the range behind the clamp is the one that counts."""
        if value in self.sites and value.readers == [clamp] and clamp.outputs and self.possible(clamp.outputs[0]):
            del self.sites[value]
            self.clamped.add(value)

    def leave_outputs(self) -> None:
        """Leave values float that only the model's output reads."""
        for value in list(self.sites):
            if all(_leads_out(reader) for reader in value.readers):
                del self.sites[value]
                self.dropped[value] = OUTPUT

    def override(self, methods: Mapping[str, Method | None]) -> None:
        """Let sites that are named have their own method, or none."""
        for pattern in self.patterns + [Pattern([op]) for op in self.operations if op.how == "input"]:
            op = pattern.last
            for value in op.outputs:
                name = op.value_name(value)
                if name not in methods and op.how == "input" and "input" in methods:
                    name = "input"
                if name not in methods:
                    continue
                method, site = methods[name], self.sites.get(value)
                if method is None:
                    if self.sites.pop(value, None) is not None:
                        self.dropped[value] = OVERRIDDEN
                elif site is None:
                    if self.possible(value) and value not in self.clamped and op.kind != "moves":
                        self.sites[value] = Site(value, op.value_name(value), Group(method))
                elif method != site.method:
                    site.group = Group(method)

    # ------------------------------------------------------------ the report

    def floats(self) -> list[tuple[str, str]]:
        """(name, reason) of what stays float: operations, and constants that quantized operations read."""
        found: dict[str, str] = {}
        fused = {op for pattern in self.patterns for op in pattern.operations[:-1]}
        for op in self.operations:
            if op.kind == "opaque":
                found[op.site] = OPAQUE
            for value in op.outputs:
                reason = None if value in self.sites or value.quantized else self._reason(op, value, fused)
                if reason is not None:
                    found.setdefault(op.value_name(value), reason)
        return list(found.items())

    def _reason(self, op: Operation, value: Value, fused: set[Operation]) -> str | None:
        moved = op.kind == "moves" and value not in self.written
        if moved or op.kind in ("output", "creates") or op in fused or value in self.clamped:
            return None
        if op.kind == "parameter" or value in self.constants:
            # listed where an activation would be one; weights of functional layers are the host's
            read = any(
                r.kind in QUANTIZED
                and not r.name.startswith(("conv", "linear"))
                and any(v not in self.constants for v in r.inputs)
                for r in value.readers
            )
            return self.constants[value] if read and value.floating else None
        if value in self.dropped or not value.single:
            return self.dropped.get(value)
        refusal = self.refusal(value)
        if refusal is not None:
            return refusal
        root = next((p.root for p in self.patterns if p.last is op), op)
        if root.kind in QUANTIZED and self.method_of(root) is None:
            return NO_METHOD
        return UNREAD


def _leads_out(reader: Operation) -> bool:
    if reader.how == "output":
        return True
    return reader.kind == "moves" and all(_leads_out(r) for value in reader.outputs for r in value.readers)


def _separate(sites: list[Site], axes: Mapping[Value, Axis]) -> None:
    """Give sites quantizers of their own where sharing would mix channels, or predictions."""
    members: dict[Group, list[Site]] = {}
    for site in sites:
        members.setdefault(site.group, []).append(site)
    for group, sharing in members.items():
        if len(sharing) == 1:
            continue
        probe = ActivationQuantizer(group.method)
        if probe.predictor is not None:
            for site in sharing[1:]:  # what is predicted for one tensor says nothing of another
                site.group = Group(group.method)
        elif probe.uses_channels:
            seen: dict[object, Group] = {}
            for site in sharing:
                shape = site.value.shape
                axis = axes[site.value].axis if group.method.channel_axis is None else group.method.channel_axis
                size = shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None
                key = ("last" if axis < 0 else axis, size)
                site.group = seen.setdefault(key, Group(group.method) if seen else group)
