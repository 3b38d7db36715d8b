"""Does another backend compute the same numbers? Per quantizer on identical input, and over the whole network.

Per quantizer the answer is exact. Over a whole network no exporter can promise equality: convolutions sum in another
order, and a value within rounding of a tie falls on the other side. So there the check is that every first difference
of a sample is such a tie, and what follows from it is counted.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dqa_plugins.quantizer import ActivationQuantizer

from .backends import Target, compiled
from .frozen import FrozenQuantizer
from .program import as_inputs, exportable

ROUNDING = 1e-6  # of the largest value of a sample: what float32 sums in another order differ by
TIE = 1e-4  # steps: how near to a tie the first value to differ must lie


@dataclass(frozen=True)
class QuantizerParity:
    """One quantizer fed the identical tensor: largest difference (unit of x), share of values a step off."""

    site: str
    max_difference: float
    share_off: float


@dataclass(frozen=True)
class NetworkParity:
    """The whole network on the inputs given.

    Attributes:
        max_difference: largest difference of an output value.
        samples_touched: share of the samples in which any quantizer gave any value a step off.
        top1_agreement: share of the samples with the same arg max, None unless the first output is (B, K > 1).
        worst_tie: of the first values to differ in each touched sample, the largest distance to a rounding tie, in
            steps (0 if none differ).
        only_ties: worst_tie <= 1e-4.
    """

    max_difference: float
    samples_touched: float
    top1_agreement: float | None
    worst_tie: float
    only_ties: bool


@dataclass(frozen=True)
class BackendParity:
    """What `compare_backends` found for one variant of a backend."""

    backend: str
    quantizers: list[QuantizerParity] = field(repr=False)
    network: NetworkParity

    @property
    def max_difference(self) -> float:
        """Largest difference of any quantizer on identical input."""
        return max((q.max_difference for q in self.quantizers), default=0.0)

    @property
    def share_off(self) -> float:
        """Largest share of values a step off of any quantizer on identical input."""
        return max((q.share_off for q in self.quantizers), default=0.0)

    def __str__(self) -> str:
        n, top1 = self.network, self.network.top1_agreement
        return (
            f"{self.backend}: {len(self.quantizers)} quantizers on identical input: largest difference "
            f"{self.max_difference:.1e}, values a step off {self.share_off:.2%}; network: largest difference "
            f"{n.max_difference:.1e}, samples touched {n.samples_touched:.1%}, top-1 agreement "
            f"{'-' if top1 is None else f'{top1:.1%}'}, first differences are "
            f"{'all' if n.only_ties else 'NOT all'} ties (worst {n.worst_tie:.1e} steps)"
        )


class _Call(NamedTuple):
    """One call of a quantizer in the network: tensor in, tensor out, and the prediction that it used, if any."""

    quantizer: FrozenQuantizer
    x: Tensor
    y: Tensor
    prediction: Tensor | None


class _Tapped(nn.Module):
    """Returns the outputs of a model followed by the output of each quantizer call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls: list[_Call] = []
        self.tracing = False
        for module in model.modules():
            if isinstance(module, FrozenQuantizer):
                module.register_forward_hook(self._note)

    def _note(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, FrozenQuantizer):
            prediction = args[1] if len(args) > 1 else None
            predictor = module.original.predictor
            if prediction is None and predictor is not None and not self.tracing:
                prediction = predictor.predict(module.original, args[0])
            self.calls.append(_Call(module, args[0], output, prediction))

    def forward(self, *inputs: Tensor) -> tuple[Any, list[Tensor]]:
        self.calls.clear()
        output = self.model(*inputs)
        return output, [call.y for call in self.calls]


class _Side(nn.Module):
    """Several quantizers side by side: one export for all of them."""

    def __init__(self, quantizers: Sequence[nn.Module], predicted: Sequence[bool]) -> None:
        super().__init__()
        self.quantizers, self.predicted = nn.ModuleList(quantizers), predicted

    def forward(self, *xs: Tensor) -> list[Tensor]:
        left = iter(xs)  # a prediction follows its tensor
        return [
            q(next(left), next(left)) if predicted else q(next(left))
            for q, predicted in zip(self.quantizers, self.predicted, strict=True)
        ]


class Comparison:
    """A converted model and what torch computes with it, ready to be held against one backend after the other.

    The exported programs and ONNX files are made once, whatever the number of backends.

    Args:
        model: converted by any adapter.
        inputs: a batch of real inputs (a tensor or a tuple of them), the more samples the better.

    Raises:
        UncalibratedQuantizer: a quantizer is not frozen.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.inputs = as_inputs(inputs)
        ready = exportable(model, self.inputs)
        tapped = _Tapped(copy.deepcopy(ready))
        expected, self.outputs = tapped(*self.inputs)
        self.expected = _outputs(expected)
        self.calls = list(tapped.calls)
        self.names: list[str] = []
        seen: dict[str, int] = {}
        tapped.tracing = True
        for quantizer, *_ in self.calls:
            name = quantizer.original.name or "quantizer"
            seen[name] = seen.get(name, -1) + 1
            self.names.append(f"{name} (call {seen[name] + 1})" if seen[name] else name)
        side = _Side(
            [FrozenQuantizer(call.quantizer.original, call.quantizer.kinds) for call in self.calls],
            [call.prediction is not None for call in self.calls],
        )
        self.tensors = tuple(t.contiguous() for call in self.calls for t in (call.x, call.prediction) if t is not None)
        self.side, self.plain = Target(side, self.tensors), Target(ready, self.inputs)
        self.tapped = Target(tapped, self.inputs)

    @torch.no_grad()
    def against(self, backend: str) -> list[BackendParity]:
        """One BackendParity per variant of a backend.

        Args:
            backend: a name in `backends.BACKENDS`.

        Raises:
            ExportFailed, MissingDependency, UnsupportedCombination.
        """
        own = {
            variant: [
                QuantizerParity(name, *_parity(call, z))
                for name, call, z in zip(self.names, self.calls, run(*self.tensors), strict=True)
            ]
            for variant, run in (compiled(backend, self.side) if self.calls else ())
        }
        plain = {variant: run(*self.inputs) for variant, run in compiled(backend, self.plain)}
        found = []
        for variant, run in compiled(backend, self.tapped):
            taps = run(*self.inputs)[-len(self.calls) :] if self.calls else []
            network = _network(self.expected, plain[variant], self.calls, self.outputs, taps)
            found.append(BackendParity(variant, own.get(variant, []), network))
        return found


def compare_backends(model: nn.Module, inputs: Any, backends: Sequence[str] = ("onnxruntime",)) -> list[BackendParity]:
    """Run a converted model on other backends and compare with torch.

    Args:
        model: converted by any adapter.
        inputs: a batch of real inputs (a tensor or a tuple of them), the more samples the better.
        backends: names in `backends.BACKENDS`.

    Returns:
        one BackendParity per backend and variant.

    Raises:
        UncalibratedQuantizer, ExportFailed, MissingDependency, UnsupportedCombination.
    """
    comparison = Comparison(model, inputs)
    return [parity for backend in backends for parity in comparison.against(backend)]


def _outputs(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    return [tensor for part in parts for tensor in _outputs(part)]


def steps_off(difference: Tensor, quantizer: ActivationQuantizer, x: Tensor, prediction: Tensor | None) -> Tensor:
    """(B, ...) bool: where two results for x differ by a step, and by more than sums of values like x are rounded.

    The second part matters for channels whose values all are alike: their steps are smaller than the rounding.
    """
    largest = x.double().abs().flatten(1).amax(1).reshape(-1, *[1] * (x.ndim - 1)) if x.numel() else 0.0
    return (difference > 0.5 * quantizer.grid(x, prediction).step) & (difference > ROUNDING * largest)


def _parity(call: _Call, z: Tensor) -> tuple[float, float]:
    difference = (call.y.double() - z.double()).abs()
    off = steps_off(difference, call.quantizer.original, call.x, call.prediction)
    return float(difference.max()), float(off.double().mean())


def _network(
    expected: list[Tensor],
    got: list[Tensor],
    calls: list[_Call],
    outputs: list[Tensor],
    taps: list[Tensor],
) -> NetworkParity:
    first = expected[0]
    touched = torch.zeros(len(first), dtype=torch.bool)
    worst = 0.0
    for (quantizer, x, _, prediction), y, z in zip(calls, outputs, taps, strict=True):
        original = quantizer.original
        difference = (y.double() - z.double()).abs()
        off = steps_off(difference, original, x, prediction)
        per_sample = off.flatten(1).any(1)
        fresh = per_sample & ~touched
        if fresh.any():
            worst = max(worst, float(original.grid(x, prediction).tie_distance(x)[fresh][off[fresh]].max()))
        touched |= per_sample
    agreement = None
    if first.ndim == 2 and first.shape[1] > 1:
        agreement = float((first.argmax(1) == got[0].argmax(1)).double().mean())
    largest = max(float((a.double() - b.double()).abs().max()) for a, b in zip(expected, got, strict=True))
    return NetworkParity(largest, float(touched.double().mean()), agreement, worst, worst <= TIE)
