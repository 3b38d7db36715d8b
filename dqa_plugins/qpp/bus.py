"""What the quantizers of one model share: the features of this forward, and who reads whose.

Converted FX and PT2E graphs carry features and notes along edges and never ask the bus. In calibration, and in
frameworks that hook modules (Brevitas, NNCF), the site writes here and the quantizers after it read: one forward of a
model at a time.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from dqa_plugins.errors import InvalidMethod, UncalibratedQuantizer

from .features import site_features

if TYPE_CHECKING:
    from dqa_plugins.quantizer import ActivationQuantizer

HISTORY = 3  # quantized tensors before, whose notes the extended mode reads
INPUT = "input"

_restored: weakref.WeakValueDictionary[str, Bus] = weakref.WeakValueDictionary()


class Bus:
    """Shared by all quantizers of one model; copies of the model get a copy.

    Attributes:
        name: by which the quantizers of a model that is loaded from a state_dict find each other.
        alone: of one quantizer that nobody connected.
        step: number of the forward.
        first_sample: number of the first sample of this forward.
        augmenting: this forward is one of changed inputs, for the regressions only.
        features: by (site, mode), (B, 5) float64.
        notes: by quantizer, (B, 2) float64.
    """

    def __init__(self, name: str | None = None) -> None:
        self.name = name or uuid.uuid4().hex
        self.quantizers: list[ActivationQuantizer] = []
        self.features: dict[tuple[str, str], Tensor] = {}
        self.notes: dict[str, Tensor] = {}
        self.step = self.first_sample = self.next_sample = 0
        self.augmenting = self.augmented = self.fitted = self.alone = False
        self.inputs: tuple[tuple[str, str], ...] = ()

    @classmethod
    def named(cls, name: str) -> Bus:
        """The bus of models loaded from a state_dict with this name, never that of the model which was saved."""
        bus = _restored.get(name)
        if bus is None:
            _restored[name] = bus = cls(name)
        return bus

    def __deepcopy__(self, memo: dict[int, Any]) -> Bus:
        import copy

        fresh = Bus()
        memo[id(self)] = fresh
        for key, value in self.__dict__.items():
            if key not in ("name", "features", "notes"):
                setattr(fresh, key, copy.deepcopy(value, memo))
        return fresh

    def __reduce__(self) -> tuple[Any, ...]:
        return Bus.named, (self.name,)

    # ------------------------------------------------------------ one forward

    def begin(self, inputs: Sequence[Any]) -> None:
        """A forward starts.

        Args:
            inputs: of the model; tensors that are not floating point are no site.
        """
        self.step += 1
        self.features.clear()
        self.notes.clear()
        tensors = [x for x in inputs if isinstance(x, Tensor) and x.ndim > 0]
        if tensors and not self.augmenting:
            self.first_sample = self.next_sample
            self.next_sample += len(tensors[0])
        self.offer(inputs)

    def offer(self, inputs: Sequence[Any]) -> None:
        """Take the features of the model's inputs, where they are sites."""
        for site, mode in self.inputs:
            index = int(site.rpartition(".")[2])
            x = inputs[index] if index < len(inputs) else None
            if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 1:
                raise InvalidMethod(
                    f"QPP site '{site}': the model's input {index} is no floating-point tensor; name a quantized site."
                )
            self.features[site, mode] = site_features(x, mode)

    def tap(self, name: str, modes: tuple[str, ...], x: Tensor) -> None:
        """A site's tensor passes."""
        for mode in modes:
            self.features[name, mode] = site_features(x, mode)

    def read(self, site: str, mode: str, reader: str) -> Tensor:
        """The features of a site in this forward, (B, 5).

        Raises:
            UncalibratedQuantizer: the site did not run before the reader.
        """
        if (site, mode) not in self.features:
            raise UncalibratedQuantizer(
                f"{reader} reads its qparams from site '{site}', which has not run in this forward. Run the whole "
                "model, not a part of it; after load_state_dict into a freshly built model call "
                "dqa_plugins.qpp.link(model)."
            )
        return self.features[site, mode]

    @contextmanager
    def augment(self) -> Iterator[None]:
        """Within it, forwards are for the regressions only."""
        self.augmenting = self.augmented = True
        try:
            yield
        finally:
            self.augmenting = False


def resolve_site(wanted: str, names: Sequence[str], inputs: int) -> list[str]:
    """The sites that one entry of QPP(sites=...) names.

    Args:
        wanted: "input", "input.<k>", a quantized site, or a module with quantized sites inside.
        names: of the quantized sites, in order of execution.
        inputs: how many inputs of the model can be read without a quantizer on them.

    Raises:
        InvalidMethod: nothing matches.
    """
    if wanted == INPUT and (inputs or f"{INPUT}.0" in names):
        return [f"{INPUT}.0"]
    if wanted in names or (wanted.startswith(INPUT + ".") and wanted[6:].isdigit() and int(wanted[6:]) < inputs):
        return [wanted]
    inside = [name for name in names if name.startswith(wanted + ".")]
    if not inside:
        known = [*([INPUT] if inputs else []), *names]
        raise InvalidMethod(
            f"QPP(sites=...): '{wanted}' is no quantized site, and no module that contains one. Sites are "
            f"{', '.join(map(repr, known[:12]))}{', ...' if len(known) > 12 else ''}."
        )
    return [inside[-1]]


def connect(quantizers: Sequence[ActivationQuantizer], inputs: int = 1, bus: Bus | None = None) -> Bus | None:
    """Tell the predicted quantizers of a model which site and whose notes they read.

    Args:
        quantizers: all of the model, named, in order of execution, in the observe state.
        inputs: how many inputs of the model can be read without a quantizer on them.
        bus: to use; None: a new one.

    Returns:
        what they share now; None if no quantizer of the model is predicted.

    Raises:
        InvalidMethod: a site's name matches nothing.
    """
    predicted = [q for q in quantizers if q.method.source == "predicted"]
    if not predicted:
        return None
    bus = bus or Bus()
    names = [q.name for q in quantizers]
    by_name = {q.name: q for q in quantizers}
    taps: dict[str, set[str]] = {}
    for position, quantizer in enumerate(predicted):
        predictor, source = quantizer.predictor, quantizer.method.prediction
        if predictor is None:
            raise TypeError(f"{quantizer.label} has no predictor")
        wanted = [s for w in source.sites or (predicted[0].name,) for s in resolve_site(w, names, inputs)]
        before = names[: names.index(quantizer.name) + 1]
        reachable = [s for s in wanted if s in before or (s.startswith(INPUT + ".") and s not in names)]
        predictor.bus = bus
        # the last one before; model inputs that are no quantized site come first
        predictor.site = max(reachable, key=lambda s: before.index(s) if s in before else -1) if reachable else ""
        extended = source.mode == "extended"
        predictor.history = tuple(q.name for q in predicted[max(0, position - HISTORY) : position]) if extended else ()
        if predictor.site:
            taps.setdefault(predictor.site, set()).add(source.mode)
    bus.quantizers = list(predicted)
    bus.inputs = tuple((s, mode) for s in taps if s not in by_name for mode in sorted(taps[s]))
    for quantizer in quantizers:
        quantizer.tap = (bus, tuple(sorted(taps.get(quantizer.name, ()))))
    return bus


class InputTap:
    """A forward pre-hook: the model's inputs are sites."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus

    def __call__(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.bus.offer(inputs)


def tap_inputs(model: nn.Module, bus: Bus) -> None:
    """Let a model offer its inputs at every forward, if they are sites; replaces an earlier hook."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, InputTap):
            del model._forward_pre_hooks[key]
    if bus.inputs:
        model.register_forward_pre_hook(InputTap(bus))


def link(model: nn.Module) -> nn.Module:
    """Connect the frozen QPP quantizers of a model that got its state from a state_dict. Changes it in place.

    Models whose graph has the predictions as edges (FX, PT2E) do not need it.

    Returns:
        the model.
    """
    from dqa_plugins.sites import iter_quantizers

    quantizers = [quantizer for _, quantizer in iter_quantizers(model)]
    bus, names = Bus(), {quantizer.name for quantizer in quantizers}
    bus.fitted = True
    read: set[tuple[str, str]] = set()
    for quantizer in quantizers:
        if quantizer.predictor is not None:
            quantizer.predictor.bus = bus
            read.add((quantizer.predictor.site, quantizer.predictor.mode))
    for quantizer in quantizers:
        modes = tuple(sorted(mode for site, mode in read if site == quantizer.name))
        quantizer.tap = (bus, modes) if read else None
    bus.inputs = tuple(sorted((s, mode) for s, mode in read if s.startswith(INPUT + ".") and s not in names))
    tap_inputs(model, bus)
    return model
