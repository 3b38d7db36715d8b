"""What an item of a user's data is: one convention for every call that runs a model.

An item is what a DataLoader yields. A tensor is the one input, a dict the keyword inputs. A tuple or list (the same
thing) is

- (inputs, targets) where the call needs targets; its inputs are a tensor, a tuple or list of positional inputs, or a
  dict of keyword inputs;
- where the call needs none: the inputs, if it is as long as the model's required positional parameters; with one entry
  more, the last is the targets and is dropped; a pair that begins with a dict of the model's parameters is (inputs,
  targets) too.

What optional parameters of the model could also take is refused: `inputs=`, a function from an item to its inputs, and
`targets=`, likewise, settle every case.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from .errors import UncalibratedQuantizer, UnsupportedInput
from .progress import counted

Pick = Callable[[Any], Any] | None


@dataclass(frozen=True)
class Call:
    """An item as the arguments of a model.

    Attributes:
        positional: inputs by position.
        keywords: inputs by name.
        targets: what they are held against, where the call uses them; else None.
    """

    positional: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)
    targets: Any = None

    def __call__(self, model: Callable[..., Any]) -> Any:
        """The outputs of a model."""
        return model(*self.positional, **self.keywords)

    @property
    def inputs(self) -> Any:
        """The inputs alone: a dict of keyword inputs, or a tuple of positional ones."""
        return self.keywords or self.positional


class ItemReader:
    """Reads the items of one user's data for one model.

    Args:
        model: whose parameters decide; wrappers that pass everything on (DistributedDataParallel, torch.compile) are
            looked through.
        caller: the function that a user called, for messages.
        targets_are: whether the call needs targets, takes them where they are, or has no use for them.
        inputs: a function item -> inputs (a tensor, a tuple, a list or a dict).
        targets: a function item -> targets.
    """

    def __init__(
        self,
        model: nn.Module,
        caller: str,
        targets_are: Literal["needed", "optional", "unused"] = "unused",
        inputs: Pick = None,
        targets: Pick = None,
    ) -> None:
        self._model, self._caller, self._targets_are = type(model).__name__, caller, targets_are
        self._inputs, self._targets = inputs, targets
        self._names, self._required, self._most = _positional_parameters(model)

    def items(self, batches: Iterable[Any]) -> Iterator[Call]:
        """Every item of an iterable, read.

        Raises:
            UnsupportedInput: `batches` is one batch: its samples would be taken for batches. Or see `read`.
            UncalibratedQuantizer: there is no item.
        """
        if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
            shape = f" of shape {tuple(batches.shape)}" if isinstance(batches, Tensor) else ""
            raise UnsupportedInput(
                f"{self._caller} takes an iterable of batches; got a {type(batches).__name__}{shape}. For a single "
                "batch give [batch]."
            )
        number = -1
        for number, item in enumerate(batches):
            yield self.read(item, number)
        if number < 0:
            raise UncalibratedQuantizer(f"{self._caller} got no batches: the iterable is empty.")

    def read(self, item: Any, number: int = 0) -> Call:
        """One item.

        Args:
            number: of the item, for messages.

        Raises:
            UnsupportedInput: the item does not fit the model, or could mean more than one thing.
        """
        targets = None
        if self._targets is not None:
            targets = self._targets(item)
        if self._inputs is not None:
            picked = self._inputs(item)
            if self._targets is None and self._targets_are != "unused" and _is_sequence(item) and len(item) == 2:
                targets = item[1]
            if not (isinstance(picked, Tensor | Mapping) or _is_sequence(picked)):
                raise self._refused(number, item, f"inputs= made a {type(picked).__name__} of it")
            return self._checked(_as_call(picked, targets), number, item)
        if isinstance(item, Tensor | Mapping):
            return self._checked(_as_call(item, targets), number, item)
        if not _is_sequence(item):
            raise self._refused(number, item, "it is no tensor, tuple, list or dict")
        if self._targets_are == "needed" and self._targets is None:
            if len(item) != 2:
                raise self._refused(number, item, "the call needs pairs (inputs, targets)")
            inputs, targets = item
            if not (isinstance(inputs, Tensor | Mapping) or _is_sequence(inputs)):
                raise self._refused(number, item, f"its inputs are a {type(inputs).__name__}")
            return _as_call(inputs, targets)
        call, last = self._sequence(item, number)
        return Call(call.positional, call.keywords, last if self._targets is None else targets)

    def _sequence(self, item: Sequence[Any], number: int) -> tuple[Call, Any]:
        """The inputs of a tuple or list, and the targets that it holds, if any."""
        count, required, most = len(item), self._required, self._most
        if count == 2 and isinstance(item[0], Mapping) and item[0] and set(item[0]) <= self._names:
            return _as_call(item[0]), item[1]
        if count == max(required, 1) and count <= most:
            return Call(tuple(item)), None
        if count == required + 1 and most == required:
            return Call(tuple(item[:-1])), item[-1]
        if required < count <= most:
            raise self._refused(number, item, "its last entries could be targets or optional parameters of the model")
        raise self._refused(number, item, f"the model takes {_numbers(required, most)} by position")

    def _checked(self, call: Call, number: int, item: Any) -> Call:
        if self._targets_are == "needed" and call.targets is None and self._targets is None:
            raise self._refused(number, item, "the call needs pairs (inputs, targets)")
        return call

    def _refused(self, number: int, item: Any, why: str) -> UnsupportedInput:
        length = f" of {len(item)}" if _is_sequence(item) else ""
        single = " For a single batch give [(inputs, targets)]." if self._targets_are == "needed" else ""
        return UnsupportedInput(
            f"{self._caller}: batch {number} is a {type(item).__name__}{length}, for {self._model}: {why}. Give "
            f"inputs=, a function from a batch to a tensor, a tuple of positional inputs or a dict of keyword inputs"
            f"{'' if self._targets_are == 'unused' else ', and targets=, likewise'}.{single}"
        )


def run_batches(model: nn.Module, batches: Iterable[Any], caller: str, inputs: Pick = None) -> None:
    """Call a model on every batch. Arguments and errors as of `ItemReader`."""
    items = ItemReader(model, caller, inputs=inputs).items(batches)
    for call in counted(items, what=caller, unit="batch"):
        call(model)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, tuple | list)


def _as_call(inputs: Any, targets: Any = None) -> Call:
    if isinstance(inputs, Mapping):
        return Call((), dict(inputs), targets)
    return Call((inputs,) if isinstance(inputs, Tensor) else tuple(inputs), {}, targets)


def _numbers(required: int, most: float) -> str:
    return f"{required} input{'s' * (required != 1)}" if most == required else f"{required} to {most} inputs"


def _positional_parameters(model: nn.Module) -> tuple[set[str], int, float]:
    """(names of all parameters, how many positional ones are required, how many it takes) of a model's forward."""
    kinds = inspect.Parameter
    try:
        # the class's: hosts replace an instance's forward by a wrapper that takes anything
        parameters = list(inspect.signature(type(model).forward).parameters.values())[1:]
    except (AttributeError, TypeError, ValueError):
        parameters = []
    named = [p for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    if not named:
        for inner in (getattr(model, "module", None), getattr(model, "_orig_mod", None)):
            if isinstance(inner, nn.Module):
                return _positional_parameters(inner)
    required = sum(p.default is kinds.empty for p in named)
    anything = not parameters or any(p.kind is kinds.VAR_POSITIONAL for p in parameters)
    names = {p.name for p in parameters if p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)}
    return names, required, float("inf") if anything else len(named)
