"""Operations that a host fuses into one, found in descriptions: where it has fused them already, nothing is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dqa_plugins.graph.operations import Operation

_WITH_RELU = frozenset("conv1d conv2d conv3d linear add mul batchnorm batchnorm2d batchnorm3d".split())


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


def find_patterns(operations: Sequence[Operation]) -> list[Pattern]:
    """The calls of a network as its host fuses them, in the order of their layers."""
    found, taken = [], set()
    for operation in operations:
        if operation in taken or operation.how in ("input", "parameter", "output"):
            continue
        pattern = Pattern([operation])
        for fits in (_is_folded_norm, _is_fused_relu):
            following = _only_readers(pattern.last)
            if following and following[-1] not in taken and fits(pattern, following[-1]):
                pattern.operations.extend(following)
                taken.update(following)
        found.append(pattern)
    return found


def _only_readers(operation: Operation) -> list[Operation]:
    """The one reader of a result, behind the nn.Identity modules before it, of which no exported graph knows."""
    found: list[Operation] = []
    while operation.outputs and len(operation.outputs[0].readers) == 1:
        operation = operation.outputs[0].readers[0]
        found.append(operation)
        if operation.name != "identity":
            return found
    return []


def _is_folded_norm(pattern: Pattern, following: Operation) -> bool:
    # a subclass of Conv3d that a host looks into is a function to it, and to PT2E a layer like any other
    layer = pattern.root.how in ("module", "function") and pattern.root.name.startswith(("conv", "linear"))
    return layer and following.how == "module" and following.name.startswith("batchnorm")


def _is_fused_relu(pattern: Pattern, following: Operation) -> bool:
    if pattern.root.name not in _WITH_RELU or (pattern.root.name == "linear" and len(pattern.operations) > 1):
        return False
    return following.name == "relu"
