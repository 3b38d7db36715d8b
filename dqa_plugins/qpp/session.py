"""One forward of a model with predicted quantizers: what its sites measured, for the quantizers behind them.

A session is begun before the model's call and ended after it, by hooks of the model (`Forwards`). It belongs to the
thread that runs the forward, so threads and replicas never meet. Converted FX and PT2E graphs carry the same values
along edges and need none.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dqa_plugins.errors import InvalidMethod, UncalibratedQuantizer
from dqa_plugins.quantizer import ActivationQuantizer

from .augment import undisturbed
from .features import site_features

INPUT = "input"
Augmentation = Callable[[tuple[Any, ...], int], Any]

_running = threading.local()


class Session:
    """One forward.

    Args:
        number: of the forward.
        first_sample: number of its first sample.
        augmented: it runs changed inputs, for the regressions only.

    Attributes:
        features: by (site, mode), (B, F) float64, see `features.site_features`.
        summaries: by quantizer, (B, 2 + ...) float64, see `features.Summary`.
    """

    def __init__(self, number: int = 0, first_sample: int = 0, *, augmented: bool = False) -> None:
        self.number, self.first_sample, self.augmented = number, first_sample, augmented
        self.features: dict[tuple[str, str], Tensor] = {}
        self.summaries: dict[str, Tensor] = {}

    def read(self, site: str, mode: str, reader: str) -> Tensor:
        """The features of a site, (B, F).

        Raises:
            UncalibratedQuantizer: the site did not run before the reader.
        """
        if (site, mode) not in self.features:
            raise not_run(reader, site)
        return self.features[site, mode]


def not_run(reader: str, site: str) -> UncalibratedQuantizer:
    """The error of a quantizer whose site has not run."""
    return UncalibratedQuantizer(
        f"{reader} reads its qparams from site '{site}', which has not run in this forward. Run the whole model, not a "
        "part of it; after load_state_dict into a freshly built model call dqa_plugins.qpp.link(model)."
    )


def current() -> Session | None:
    """The session of the forward that runs in this thread, None outside of one."""
    stack = getattr(_running, "sessions", None)
    return stack[-1] if stack else None


def begin(session: Session) -> None:
    """Make a session current until `end`; they nest as models do."""
    _running.__dict__.setdefault("sessions", []).append(session)


def end(session: Session) -> None:
    """End a session, and those inside it that an error left open."""
    stack = getattr(_running, "sessions", [])
    if session in stack:
        del stack[stack.index(session) :]


class Listener:
    """What a site calls with its tensor: its features go to the session.

    Args:
        modes: of the quantizers that read them.
    """

    def __init__(self, modes: tuple[str, ...]) -> None:
        self.modes = modes

    def __call__(self, name: str, x: Tensor) -> None:
        """Take the features of x, (B, ...), the tensor of site `name`."""
        session = current()
        if session is not None:
            for mode in self.modes:
                session.features[name, mode] = site_features(x, mode)


class Forwards:
    """The hooks of a model: a session around each of its calls.

    Args:
        inputs: (site, mode) of the model's inputs that are sites.
        augmentation: calibration runs each batch again with what this makes of it; None: once.
        calibrating: samples are numbered, until no predicted quantizer of the model observes any more.
    """

    def __init__(
        self,
        inputs: tuple[tuple[str, str], ...] = (),
        augmentation: Augmentation | None = None,
        *,
        calibrating: bool = False,
    ) -> None:
        self.inputs, self.augmentation, self.calibrating = inputs, augmentation, calibrating
        self.count = self.first_sample = self.next_sample = 0
        self.handles: list[Any] = []

    def attach(self, model: nn.Module) -> Forwards:
        """Hook the calls of a model, and of its copies; replaces earlier hooks."""
        detach(model)
        self._resume(model)
        self.handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        if isinstance(model, torch.fx.GraphModule):  # copies of graphs lose their hooks (torch 2.13)
            model._deepcopy_hooks = [*getattr(model, "_deepcopy_hooks", []), self._follow]
        return self

    def _resume(self, model: nn.Module) -> None:
        """Before the first forward: calibration may have begun elsewhere, in another process, in a copy's original."""
        if self.count == 0:
            records = [quantizer.predictor.record for quantizer in predicted_quantizers(model)]
            self.next_sample = max((record.next_sample for record in records), default=0)

    def _follow(self, twin: nn.Module) -> None:
        copy.copy(self).attach(twin)

    def start(self, inputs: Sequence[Any], *, augmented: bool = False) -> Session:
        """Begin the session of a forward.

        Args:
            inputs: of the model, in the order of its parameters.

        Raises:
            InvalidMethod: an input that is a site is no floating-point tensor.
        """
        self.count += 1
        tensors = [x for x in inputs if isinstance(x, Tensor) and x.ndim > 0]
        if tensors and self.calibrating and not augmented:
            self.first_sample = self.next_sample
            self.next_sample += len(tensors[0])
        session = Session(self.count, self.first_sample, augmented=augmented)
        for site, mode in self.inputs:
            index = int(site.rpartition(".")[2])
            x = inputs[index] if index < len(inputs) else None
            if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 1:
                raise InvalidMethod(
                    f"QPP site '{site}': the model's input {index} is no floating-point tensor; name a quantized site."
                )
            session.features[site, mode] = site_features(x, mode)
        begin(session)
        return session

    def changed(self, inputs: Sequence[Any]) -> tuple[Any, ...] | None:
        """The augmented inputs of the forward that just ran; None if there is nothing to run."""
        if self.augmentation is None or not any(isinstance(x, Tensor) and x.is_floating_point() for x in inputs):
            return None
        with torch.no_grad():
            found = self.augmentation(tuple(inputs), self.first_sample)
        return found if isinstance(found, tuple) else (found,)

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        session = current()
        nested = session is not None and session.augmented
        self.calibrating = self.calibrating and observes(model)
        if self.calibrating:
            self._resume(model)
        self.start(positional(model, args, kwargs), augmented=nested)

    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        session = current()
        if session is None:
            return
        end(session)
        if not self.calibrating or session.augmented or output is None:
            return
        args, kwargs = _bound(model, args, kwargs)
        changed = self.changed((*args, *kwargs.values()))
        if changed is not None:
            args, kwargs = changed[: len(args)], dict(zip(kwargs, changed[len(args) :], strict=True))
            marker = Session(augmented=True)
            begin(marker)
            try:
                with torch.no_grad(), undisturbed(model):
                    model(*args, **kwargs)
            finally:
                end(marker)


def forwards_of(model: nn.Module) -> list[Forwards]:
    """The hooks of `Forwards` on a model and on the modules in it."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return [owner for owner in owners if isinstance(owner, Forwards)]


def detach(model: nn.Module) -> None:
    """Remove the hooks of `Forwards` from a model."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key, hook in list(hooks.items()):
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, Forwards):
                for handle in owner.handles:
                    handle.remove()
                hooks.pop(key, None)
    graph_hooks = model.__dict__.get("_deepcopy_hooks", [])
    graph_hooks[:] = [hook for hook in graph_hooks if not isinstance(getattr(hook, "__self__", None), Forwards)]


def observes(model: nn.Module) -> bool:
    """Whether a predicted quantizer of the model is being calibrated."""
    return any(quantizer.state == "observe" for quantizer in predicted_quantizers(model))


def predicted_quantizers(model: nn.Module) -> list[ActivationQuantizer]:
    """The quantizers of a model that have a predictor."""
    return [m for m in model.modules() if isinstance(m, ActivationQuantizer) and m.predictor is not None]


def positional(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Arguments of a call in the order of the parameters of `forward`."""
    args, kwargs = _bound(model, args, kwargs)
    return (*args, *kwargs.values())


def _bound(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword-only arguments of a call."""
    if kwargs:
        try:
            bound = inspect.signature(model.forward).bind(*args, **kwargs)
            bound.apply_defaults()  # inputs are counted by the parameters of forward
            return bound.args, bound.kwargs
        except (TypeError, ValueError):  # forward itself will say what is wrong
            pass
    return args, kwargs
