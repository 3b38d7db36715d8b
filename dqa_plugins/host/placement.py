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
- `shape` and `floating` of values, where the host knows them or a run showed them (`host.record`);
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
- Parameters, constants, positions, masks, norm internals, integers and 0-d tensors are left float and are listed.
- A value that is written in place later is not quantized before: the write would be lost.
- `overrides` name sites: None leaves one float; a method replaces, or adds, one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from dqa_plugins.graph.aliases import written_later
from dqa_plugins.graph.axes import Axis, channel_axes
from dqa_plugins.graph.constants import INTERNAL, no_activations, norm_internals
from dqa_plugins.graph.names import require_unique
from dqa_plugins.graph.operations import QUANTIZED, Operation, Value
from dqa_plugins.methods import Method
from dqa_plugins.quantizer import ActivationQuantizer

NO_METHOD = "no method is set for it"
WRITTEN = "written in place later: quantizing it before would lose the write"
SCALAR = "0-d"
UNREAD = "a function whose result no quantized operation reads"
OPAQUE = "what it computes inside stays float"
OUTPUT = "an output of the model"
OVERRIDDEN = "left out by name"


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


@dataclass(eq=False)
class Pattern:
    """Operations that a host fuses: one, or a layer with the batch norm and ReLU behind it."""

    operations: list[Operation]

    @property
    def root(self) -> Operation:
        """The first: the layer."""
        return self.operations[0]

    @property
    def last(self) -> Operation:
        """The one whose result is quantized."""
        return self.operations[-1]


@dataclass
class Placement:
    """What the judge says.

    Args:
        sites: in order of execution.
        patterns: the quantized ones, for weights and a host's own annotations.
        floats: (name, reason) of what stays float.
        unmatched: settings that name nothing in the network.
    """

    sites: list[Site] = field(default_factory=list)
    patterns: list[Pattern] = field(default_factory=list)
    floats: list[tuple[str, str]] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)


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
    return _Judge(operations, method_of, dict(overrides or {}), quantize_outputs).placement()
