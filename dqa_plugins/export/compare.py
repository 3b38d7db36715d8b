"""Does another backend compute the same numbers? Runs a converted model there and in torch (see `parity`)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dqa_plugins.progress import Progress

from .frozen import FrozenQuantizer, unique
from .parity import UNKNOWN, BackendParity, Call, network_parity, quantizer_parity
from .program import as_inputs, exportable
from .runners import PROMISES, Target, check_backend, compiled, flat_outputs


class _Recorded(nn.Module):
    """Returns the outputs of a model followed by the output of each quantizer call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls: list[Call] = []
        self.quantizers: list[FrozenQuantizer] = []
        self.exporting = False
        for module in model.modules():
            if isinstance(module, FrozenQuantizer):
                module.register_forward_hook(self._record)

    def _record(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, FrozenQuantizer):
            prediction = args[1] if len(args) > 1 else None
            predictor = module.original.predictor
            if prediction is None and predictor is not None and not self.exporting:
                prediction = predictor.predict(module.original, args[0])
            self.calls.append(Call(module.original, args[0], output, prediction))
            self.quantizers.append(module)

    def forward(self, *inputs: Tensor) -> tuple[Any, list[Tensor]]:
        self.calls.clear()
        self.quantizers.clear()
        output = self.model(*inputs)
        return output, [call.y for call in self.calls]


class _SideBySide(nn.Module):
    """Several quantizers, each fed its own tensor: one export for all of them."""

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
        recorded = _Recorded(copy.deepcopy(ready))
        expected, _ = recorded(*self.inputs)
        self.expected, self.calls = flat_outputs(expected), list(recorded.calls)
        recorded.exporting = True
        taken: set[str] = set()
        self.names = [unique(call.quantizer.name or "quantizer", taken, "{} (call {})") for call in self.calls]
        side = _SideBySide(
            [
                FrozenQuantizer(q.original, q.kinds, name)
                for q, name in zip(recorded.quantizers, self.names, strict=True)
            ],
            [call.prediction is not None for call in self.calls],
        )
        self.tensors = tuple(t.contiguous() for call in self.calls for t in (call.x, call.prediction) if t is not None)
        self.side, self.recorded = Target(side, self.tensors), Target(recorded, self.inputs)
        self.plain = Target(ready, self.inputs, self.recorded)

    @torch.no_grad()
    def against(self, backend: str) -> list[BackendParity]:
        """One BackendParity per variant of a backend.

        Args:
            backend: a name in `runners.BACKENDS`.

        Raises:
            ExportFailed, MissingDependency, UnsupportedCombination.
        """
        own = {
            variant: [
                quantizer_parity(name, call, z)
                for name, call, z in zip(self.names, self.calls, run(*self.tensors), strict=True)
            ]
            for variant, run in (compiled(backend, self.side) if self.calls else ())
        }
        plain = {variant: run(*self.inputs) for variant, run in compiled(backend, self.plain)}
        found = []
        for variant, run in compiled(backend, self.recorded):
            values = run(*self.inputs)[-len(self.calls) :] if self.calls else []
            network = network_parity(self.expected, plain[variant], self.calls, values)
            found.append(BackendParity(variant, own.get(variant, []), network, promise=PROMISES.get(backend, "")))
        return found


def compare_backends(
    model: nn.Module,
    inputs: Any,
    backends: Sequence[str] = ("onnxruntime",),
    *,
    raise_errors: bool = False,
    progress: bool = False,
) -> list[BackendParity]:
    """Run a converted model on other backends and compare with torch.

    Args:
        model: converted by any adapter.
        inputs: a batch of real inputs (a tensor or a tuple of them), the more samples the better.
        backends: names in `runners.BACKENDS`.
        raise_errors: True raises the first error of a backend. False goes on with the next one; the entry of the one
            that failed has the error, and NaN for every number.
        progress: show a progress bar (needs tqdm).

    Returns:
        one BackendParity per backend and variant.

    Raises:
        UncalibratedQuantizer: a quantizer is not frozen.
        UnsupportedCombination: there is no backend of this name.
        ExportFailed, MissingDependency: every backend failed, with the first one's error.
    """
    for backend in backends:
        check_backend(backend)
    comparison = Comparison(model, inputs)
    found: list[BackendParity] = []
    with Progress(len(backends), progress, what="comparing backends", unit="backend") as bar:
        for backend in backends:
            bar.at(backend)
            try:
                found += comparison.against(backend)
            except Exception as error:
                if raise_errors:
                    raise
                found.append(BackendParity(backend, [], UNKNOWN, error))
            bar.advance(1)
    errors = [parity.error for parity in found if parity.error is not None]
    if errors and len(errors) == len(found):
        raise errors[0]
    return found
