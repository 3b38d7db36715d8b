"""How far a backend's numbers are from torch's: of one quantizer, and of a whole network.

Per quantizer the answer is exact. Over a whole network no exporter can promise equality: convolutions sum in another
order, and a value within rounding of a tie falls on the other side. So there the check is that every first difference
of a sample is such a tie, and what follows from it is counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dqa_plugins.errors import ExportFailed
from dqa_plugins.quantizer import ActivationQuantizer

ROUNDING = 1e-6  # of the largest value of a sample: what float32 sums in another order differ by
TIE = 1e-4  # steps: how near to a tie the first value to differ must lie


@dataclass(frozen=True)
class QuantizerParity:
    """One quantizer fed the identical tensor: largest difference (unit of x), share of values a step off.

    A value that is NaN on one side only makes the difference NaN, and counts as a step off.
    """

    site: str
    max_difference: float
    share_off: float


@dataclass(frozen=True)
class NetworkParity:
    """The whole network on the inputs given.

    Attributes:
        max_difference: largest difference of an output value; NaN if one is NaN on one side only.
        samples_touched: share of the samples in which any quantizer gave any value a step off. A site whose rows are
            no samples (windows, tokens first) touches all of them.
        top1_agreement: share of the samples with the same arg max, None unless the first output is (B, K > 1).
        worst_tie: of the first values to differ in each touched sample, the largest distance to a rounding tie, in
            steps (0 if none differ, infinite for values that are not finite).
        only_ties: worst_tie <= 1e-4.
    """

    max_difference: float
    samples_touched: float
    top1_agreement: float | None
    worst_tie: float
    only_ties: bool


UNKNOWN = NetworkParity(math.nan, math.nan, None, math.nan, False)


@dataclass(frozen=True)
class BackendParity:
    """What `compare_backends` found for one variant of a backend.

    Attributes:
        error: why the backend could not be compared; every number is NaN then, and no check on one passes.
        promise: what the backend is held to.
    """

    backend: str
    quantizers: list[QuantizerParity] = field(repr=False)
    network: NetworkParity
    error: Exception | None = None
    promise: str = ""

    @property
    def max_difference(self) -> float:
        """Largest difference of any quantizer on identical input; NaN if one is."""
        return math.nan if self.error else largest(q.max_difference for q in self.quantizers)

    @property
    def share_off(self) -> float:
        """Largest share of values a step off of any quantizer on identical input."""
        return math.nan if self.error else largest(q.share_off for q in self.quantizers)

    def __str__(self) -> str:
        if self.error is not None:
            return f"{self.backend}: failed with {type(self.error).__name__}: {self.error}"
        n, top1 = self.network, self.network.top1_agreement
        return (
            f"{self.backend}: {len(self.quantizers)} quantizers on identical input: largest difference "
            f"{self.max_difference:.1e}, values a step off {self.share_off:.2%}; network: largest difference "
            f"{n.max_difference:.1e}, samples touched {n.samples_touched:.1%}, top-1 agreement "
            f"{'-' if top1 is None else f'{top1:.1%}'}, first differences are "
            f"{'all' if n.only_ties else 'NOT all'} ties (worst {n.worst_tie:.1e} steps)\n  promised: {self.promise}"
        )


class Call(NamedTuple):
    """One call of a quantizer in the network: tensor in, tensor out, and the prediction that it used, if any."""

    quantizer: ActivationQuantizer
    x: Tensor
    y: Tensor
    prediction: Tensor | None


def largest(values: Iterable[float]) -> float:
    """The largest of some numbers, 0 for none; NaN if one is, which `max` would drop."""
    found = list(values)
    return math.nan if any(math.isnan(value) for value in found) else max(found, default=0.0)


def difference(y: Tensor, z: Tensor) -> Tensor:
    """|y - z| in float64; 0 where both are the same infinity or both NaN, NaN where one of them is.

    Raises:
        ExportFailed: their shapes differ.
    """
    if y.shape != z.shape:
        raise ExportFailed(f"the backend answers with shape {tuple(z.shape)} where torch has {tuple(y.shape)}.")
    same = (y == z) | (y.isnan() & z.isnan())
    return (y.double() - z.double()).abs().masked_fill(same, 0.0)


def steps_off(differences: Tensor, call: Call) -> Tensor:
    """(B, ...) bool: where two results for x differ by a step, and by more than sums of values like x are rounded.

    The second part matters for channels whose values all are alike: their steps are smaller than the rounding. NaN is
    off.
    """
    x = call.x
    step = call.quantizer.grid(x, call.prediction).step
    rounding = ROUNDING * x.double().abs().reshape(len(x), -1).amax(1).reshape(-1, *[1] * (x.ndim - 1))
    return (differences != 0) & ~(differences <= 0.5 * step) & ~(differences <= rounding)


def quantizer_parity(site: str, call: Call, z: Tensor) -> QuantizerParity:
    """A call against what a backend makes of the same tensor."""
    if not z.numel():
        return QuantizerParity(site, 0.0, 0.0)
    differences = difference(call.y, z)
    return QuantizerParity(site, float(differences.max()), float(steps_off(differences, call).double().mean()))


def network_parity(
    expected: Sequence[Tensor], got: Sequence[Tensor], calls: Sequence[Call], values: Sequence[Tensor]
) -> NetworkParity:
    """A whole network against a backend.

    Args:
        expected, got: outputs of torch and of the backend.
        calls: of the quantizers, in order of execution, in torch.
        values: what the backend's quantizers gave.
    """
    first = expected[0]
    touched = torch.zeros(len(first) if first.ndim else 1, dtype=torch.bool)
    worst = 0.0
    for call, z in zip(calls, values, strict=True):
        if not z.numel():
            continue
        off = steps_off(difference(call.y, z), call)
        rows = off.reshape(len(off), -1).any(1)
        if len(rows) == len(touched):
            fresh, reached = rows & ~touched, rows
        else:  # rows are no samples: any of them may come from any sample
            fresh, reached = rows & ~touched.any(), rows.any()
        if fresh.any():
            distance = call.quantizer.grid(call.x, call.prediction).tie_distance(call.x)
            distance = torch.where(z.isfinite(), distance, math.inf)
            worst = largest((worst, float(distance[fresh][off[fresh]].max())))
        touched |= reached
    agreement = None
    if first.ndim == 2 and first.shape[1] > 1:
        agreement = float((first.argmax(1) == got[0].argmax(1)).double().mean())
    outputs = (difference(a, b) for a, b in zip(expected, got, strict=True))
    furthest = largest(float(d.max()) for d in outputs if d.numel())
    return NetworkParity(furthest, float(touched.double().mean()), agreement, worst, worst <= TIE)
