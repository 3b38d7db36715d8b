"""Which tensors of an exported graph get a quantizer, and which of them share one.

The rules are those of the FX adapter, which are FX's own as corrected there, so that both place the same quantizers:

- a quantized call quantizes its output; what it reads is quantized too, on that edge, unless it is already;
- a convolution, linear layer, addition or multiplication and the ReLU behind it are one call;
- pools, cat, mean and their like share the quantizer of their first input (torch.ao's native backend config);
- an operation that only moves or selects values (flatten, transpose, slice, max-pool) is not quantized again;
- a clamp (ReLU, ReLU6, Hardtanh) quantizes its output with a quantizer of its own, not its input;
- tensors of different channels do not share, where the method looks at channels.

Where agreement with FX stops, because export sees another program than FX's tracer:

- FX counts arithmetic on sizes (`x.size(0) * 2`) among the operations of a module; in an exported graph sizes are
  numbers. The k of `<module>.mul.<k>` may differ then.
- `x.add(y)` is taken for `x + y`, `x.div(y)` for `x / y`: a non-strict export does not tell them apart. FX quantizes
  the operators `+` and `*`, not the methods.
- a module registered under two names is called by the one it is called with, in FX by the first.
- FX gives integer and boolean tensors an observer, which fails while calibrating; here only floats get one.
- the parts of a tuple: FX names what it takes out of a module's outputs (`getitem.0`), export takes it without a trace
  (`attend`, the module itself). The counts of `getitem` differ with it.
- weights of F.conv2d and F.linear: FX fakes their quantization while calibrating, here no weight's is.
- Export looks into custom subclasses of torch.nn layers as FX does, but a parameterless nn.Identity leaves no trace.
- In QAT torchao runs conv and batch norm as conv, division and batch norm, FX as one module: the same sites, whose
  tensors differ in the last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Graph, Node

from dqa_plugins.methods import Method
from dqa_plugins.quantizer import ActivationQuantizer
from dqa_plugins.sites import CLAMPING, PRESERVING

from .naming import Unit, is_float, named_units, producer_axis, readers

# What torch.ao's native backend config observes (a test compares them).
OWN = {
    "module": frozenset(
        "Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d Linear ELU LeakyReLU Hardswish "
        "InstanceNorm1d InstanceNorm2d InstanceNorm3d Dropout PReLU BatchNorm2d BatchNorm3d LayerNorm".split()
    ),
    "function": frozenset(
        "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear matmul elu hardswish "
        "leaky_relu "
        "dropout group_norm instance_norm layer_norm add mul".split()
    ),
    "operator": frozenset(("add", "mul")),
    "method": frozenset(),
}
SHARING = {
    "module": frozenset(
        "AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AvgPool1d "
        "AvgPool2d AvgPool3d Hardtanh Identity MaxPool1d "
        "MaxPool2d MaxPool3d PixelShuffle PixelUnshuffle ReLU ReLU6".split()
    ),
    "function": frozenset(
        "cat adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d hardtanh hardtanh_ interpolate max_pool1d "
        "max_pool2d max_pool3d pixel_shuffle pixel_unshuffle relu relu6 avg_pool1d avg_pool2d avg_pool3d clamp flatten "
        "mean narrow repeat_interleave transpose squeeze stack unsqueeze".split()
    ),
    "operator": frozenset(("floordiv",)),
    "method": frozenset(
        "contiguous clamp detach detach_ mean permute repeat repeat_interleave reshape resize_ relu relu_ squeeze "
        "squeeze_ transpose unsqueeze unsqueeze_ view".split()
    ),
}
WEIGHTED = frozenset(
    "Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d Linear conv1d conv2d conv3d conv_transpose1d "
    "conv_transpose2d conv_transpose3d linear".split()
)
_RELU_FUSES_WITH = frozenset(
    "Conv1d Conv2d Conv3d Linear conv1d conv2d conv3d linear add mul BatchNorm2d BatchNorm3d".split()
)


@dataclass(eq=False)
class Group:
    """One quantizer."""

    method: Method


@dataclass(eq=False)
class Call:
    """A quantizer's call on a value.

    Args:
        value: what is quantized.
        unit: the call that makes it; None: a parameter.
        group: the quantizer.
        edges: nodes that read the quantized value; None: all.
    """

    value: Node
    unit: Unit | None
    group: Group
    edges: list[Node] | None = None

    @property
    def site(self) -> str:
        """The site's name; parameters are called as FX calls them."""
        return self.unit.site if self.unit is not None else str(self.value.target).replace(".", "_")

    def reaches(self, unit: Unit) -> bool:
        """True if the unit reads the quantized value."""
        return self.edges is None or any(node in self.edges for node in unit.nodes)

    def users(self) -> int:
        """How many nodes read the quantized value."""
        return len(readers(self.value) if self.edges is None else set(self.edges))


@dataclass(eq=False)
class Pattern:
    """Calls that FX fuses: one, or a layer with the batch norm and ReLU behind it."""

    units: list[Unit] = field(default_factory=list)

    @property
    def root(self) -> Unit:
        """The layer."""
        return self.units[0]

    @property
    def last(self) -> Unit:
        """The call whose output is quantized."""
        return self.units[-1]


def kind(unit: Unit) -> str:
    """ "own", "sharing" or "" (float), as torch.ao's native backend config has it."""
    if unit.op in ("add", "mul") and unit.op in OWN.get(unit.how, ()):
        tensors = len(list(unit.inputs()))
        node = unit.output
        twice = tensors == 1 and len(node.args) > 1 and node.args[0] is node.args[1]
        return "own" if tensors > 1 or twice else "sharing"  # with a scalar, FX shares the observer
    if unit.op in OWN.get(unit.how, ()):
        return "own"
    return "sharing" if unit.op in SHARING.get(unit.how, ()) else ""


def patterns(calls: list[Unit]) -> list[Pattern]:
    """The calls as FX fuses them, in the order of their layers."""
    reader = {node: unit for unit in calls for node in unit.nodes}
    found, taken = [], set()
    for unit in calls:
        if unit in taken or unit.how == "input":
            continue
        pattern = Pattern([unit])
        for fits in (_is_folded_norm, _is_fused_relu):
            users = readers(pattern.last.output)
            following = reader.get(users[0]) if len(users) == 1 else None
            if following is not None and following not in taken and fits(pattern, following):
                pattern.units.append(following)
                taken.add(following)
        found.append(pattern)
    return found


def _is_folded_norm(pattern: Pattern, following: Unit) -> bool:
    return pattern.root.op.startswith(("Conv", "Linear")) and following.op.startswith("BatchNorm")


def _is_fused_relu(pattern: Pattern, following: Unit) -> bool:
    if pattern.root.op not in _RELU_FUSES_WITH or (pattern.root.op == "Linear" and len(pattern.units) > 1):
        return False
    # torch.relu fuses with add and mul only; torch_fn does not tell it from F.relu, and alone it stays float in FX
    return (following.how, following.op) in (("module", "ReLU"), ("function", "relu"))


def activations(unit: Unit) -> Iterator[tuple[Node, Node]]:
    """(value, reading node) of the floating-point activations a call reads."""
    for value, node in unit.inputs():
        weight = unit.how == "function" and value.op == "get_attr" and unit.op not in ("add", "mul", "cat", "stack")
        if is_float(value) and not weight:
            yield value, node


def place(
    graph: Graph, method_of: Callable[[Unit], Method | None], override: Callable[[Unit], tuple[bool, Method | None]]
) -> tuple[list[Pattern], list[Call]]:
    """Decide where quantizers go. Changes nothing but site names in the graph's meta.

    Args:
        graph: exported, batch norms folded or not.
        method_of: the method for a call, None to leave it float.
        override: (whether a site was named explicitly, its method).

    Returns:
        the quantized patterns, and the calls of quantizers in order of execution.
    """
    calls = named_units(graph)
    found = [pattern for pattern in patterns(calls) if kind(pattern.root) and method_of(pattern.root) is not None]
    placed = _observe(graph, calls, found, method_of)
    producer = {call.value: call for call in placed.values()}
    ordered = sorted(producer.values(), key=_position(graph))
    for correct in (_bypass_preserving, _move_behind_clamps):
        for call in ordered:
            if placed.get(call.value) is call:
                correct(call, placed, calls)
    for call in ordered:
        if placed.get(call.value) is not call or call.unit is None:
            continue
        named, method = override(call.unit)
        if named and method is None:
            del placed[call.value]
        elif method is not None and method != call.group.method:
            call.group = Group(method)
    kept = [call for call in ordered if placed.get(call.value) is call]
    _separate_channels(kept, _producers(calls))
    return found, kept


def _position(graph: Graph) -> Callable[[Call], float]:
    position = {node: index for index, node in enumerate(graph.nodes)}

    def order(call: Call) -> float:
        if call.unit is None and call.edges:  # export puts parameters first, FX where they are read
            return min(position[reader] for reader in call.edges) - 0.5
        return position[call.value]

    return order


def _producers(calls: list[Unit]) -> dict[Node, Unit]:
    return {node: unit for unit in calls for node in unit.nodes}


def _observe(
    graph: Graph, calls: list[Unit], found: list[Pattern], method_of: Callable[[Unit], Method | None]
) -> dict[Node, Call]:
    """FX's own placement: a call for each quantized value."""
    placed: dict[Node, Call] = {}
    producer = _producers(calls)
    roots = {pattern.root: pattern for pattern in found}
    ends = {pattern.last: pattern for pattern in found}
    for unit in calls:
        if unit in roots:
            method = method_of(unit)
            for value, reader in activations(unit):
                call = placed.get(value)
                if call is None and method is not None:
                    placed[value] = Call(value, producer.get(value), Group(method), [reader])
                elif call is not None and call.edges is not None:
                    call.edges.append(reader)
        if unit in ends and is_float(unit.output):
            root = ends[unit].root
            method = method_of(root)
            if method is None:  # `found` holds no such pattern
                continue
            made = Call(unit.output, unit, Group(method))
            if kind(root) == "sharing":
                shared = [placed[value] for value, _ in activations(root) if value in placed]
                if not shared:
                    continue
                for call in (*shared[1:], made):
                    call.group = shared[0].group
            placed[unit.output] = made
    return placed


def _bypass_preserving(call: Call, placed: dict[Node, Call], calls: list[Unit]) -> None:
    producer, unit = _producers(calls), call.unit
    while unit is not None and unit.op in PRESERVING:
        source = next(unit.inputs(), None)
        if source is None:
            return
        before = placed.get(source[0])
        if before is not None and before.reaches(unit):
            del placed[call.value]
            return
        unit = producer.get(source[0])


def _move_behind_clamps(call: Call, placed: dict[Node, Call], _: list[Unit]) -> None:
    unit = call.unit
    source = None if unit is None else next(unit.inputs(), None)
    if unit is None or unit.op not in CLAMPING or source is None:
        return
    before = placed.get(source[0])
    if before is not None and before.reaches(unit):
        call.group = Group(call.group.method)
        if before.users() == 1:
            del placed[before.value]


def _separate_channels(ordered: list[Call], producer: dict[Node, Unit]) -> None:
    members: dict[Group, list[Call]] = {}
    for call in ordered:
        members.setdefault(call.group, []).append(call)
    for group, sharing in members.items():
        if group.method.source == "predicted":
            for call in sharing[1:]:  # what is predicted for one tensor says nothing of another
                call.group = Group(group.method)
            continue
        if len(sharing) == 1 or not ActivationQuantizer(group.method).uses_channels:
            continue
        seen: dict[Any, Group] = {}
        for call in sharing:
            shape = call.value.meta["val"].shape
            axis = (
                producer_axis(call.unit, producer) if group.method.channel_axis is None else group.method.channel_axis
            )
            size = str(shape[axis]) if -len(shape) <= axis < len(shape) else None
            key = ("last" if axis < 0 else axis, size)
            call.group = seen.setdefault(key, Group(group.method) if seen else group)
