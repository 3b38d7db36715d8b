"""State: carried over, of somebody else, edited, truncated, pickled; copies at any moment of calibration."""

from __future__ import annotations

import copy
import io
import json
import pickle
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from dqa_plugins import ActivationQuantizer, DQAError, Method

from .material import Spec, all_methods, methods, quantizer_of, same, seeds
from .registry import LABEL, Defect, Refused, case_class

SHAPE = (3, 4, 5)
STATES = ("observe", "frozen")
JUNK: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 4, 99, 2**70, 1.5, 1e308, float("nan"), "", "foo", "frozen", "qat", [], [0], {}, {"a": 1},
)  # fmt: skip


def batch(seed: int, size: int = 3) -> Tensor:
    """(size, 4, 5), its samples of different width; non-negative for every second seed."""
    x = Spec((size, *SHAPE[1:]), seed=seed).dense()
    return x if seed % 2 else x.relu()


def made(method: Method, seed: int, state: str) -> ActivationQuantizer:
    """A quantizer that saw a batch."""
    return quantizer_of(method, batch(seed), freeze=state == "frozen")


def finished(quantizer: ActivationQuantizer, seed: int) -> Tensor:
    """What a quantizer makes of a batch, once frozen."""
    return quantizer.freeze()(batch(seed + 1))


def load(quantizer: ActivationQuantizer, state: dict[str, Any]) -> None:
    """load_state_dict; torch's own refusals (missing keys, shapes) as Refused."""
    try:
        quantizer.load_state_dict(state)
    except RuntimeError as error:
        if isinstance(error, DQAError) or not str(error).startswith("Error(s) in loading state_dict"):
            raise
        raise Refused(str(error)) from error


class StateCase(NamedTuple):
    """A method, the data of its calibration, and the state in which it is saved."""

    method: Method
    seed: int
    state: str


state_cases = st.builds(StateCase, all_methods, seeds, st.sampled_from(STATES))


@case_class("state_dict", state_cases)
def state_dict(case: StateCase) -> None:
    """Through torch.save with weights_only into a fresh quantizer: it goes on as the original would."""
    original = made(*case)
    file = io.BytesIO()
    torch.save(original.state_dict(), file)
    file.seek(0)
    other = ActivationQuantizer(case.method, name=LABEL)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.state == case.state
    same(finished(other, case.seed), finished(original, case.seed))


@case_class("pickle", state_cases)
def pickled(case: StateCase) -> None:
    """pickle and deepcopy of a quantizer: the copy goes on as the original would."""
    original = made(*case)
    twins = [pickle.loads(pickle.dumps(original)), copy.deepcopy(original)]
    expected = finished(original, case.seed)
    for twin in twins:
        same(finished(twin, case.seed), expected)


class OtherCase(NamedTuple):
    """A quantizer that loads the state of another."""

    mine: Method
    theirs: Method
    seed: int
    state: str


@case_class("another's state", st.builds(OtherCase, all_methods, all_methods, seeds, st.sampled_from(STATES)))
def anothers_state(case: OtherCase) -> None:
    """State of another method: refused, and nothing of the quantizer has changed."""
    quantizer, other = made(case.mine, case.seed, case.state), made(case.theirs, case.seed + 1, case.state)
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    try:
        load(quantizer, other.state_dict())
    except (DQAError, Refused):
        for name, value in quantizer.state_dict().items():
            same(value, before[name], f"{name} after a refused state")
        raise
    assert case.mine == case.theirs, "a state of another method was taken"
    same(finished(quantizer, case.seed), finished(other, case.seed))


class EditedCase(NamedTuple):
    """A state_dict with one thing edited: `key` counts the entries, `field` those of the extra state."""

    method: Method
    seed: int
    state: str
    edit: str
    key: int
    field: int
    junk: int


EDITS = ("value", "value", "shape", "dtype", "drop", "field", "field", "truncate", "flip", "append", "object")
edited_cases = st.builds(
    EditedCase, all_methods, seeds, st.sampled_from(STATES), st.sampled_from(EDITS),
    st.integers(0, 30), st.integers(0, 8), st.integers(0, len(JUNK) - 1),
)  # fmt: skip


def edit(state: dict[str, Any], case: EditedCase) -> str:
    """Edit one entry in place; returns what was done."""
    keys = [key for key in state if state[key].numel() or case.edit in ("shape", "drop", "object")]
    key = keys[case.key % len(keys)]
    if case.edit in ("field", "truncate", "flip"):
        key = "_extra_state"
    value = state[key]
    if case.edit == "drop":
        del state[key]
    elif case.edit == "object":
        state[key] = JUNK[case.junk]
    elif case.edit == "append":
        state["nobody." + key] = value
    elif case.edit == "dtype":
        state[key] = value.to([torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64][case.junk % 5])
    elif case.edit == "shape":
        shapes = [value.flatten(), value[None], torch.cat([value.flatten()] * 2), value.flatten()[:-1], value.sum()]
        state[key] = shapes[case.junk % 5]
    elif case.edit == "value":
        changed = value.clone()
        junk = [float("nan"), float("inf"), -1.0, 0.0, 1e30, -1e30, 255.0, 0.5][case.junk % 8]
        changed.view(-1)[case.field % value.numel()] = (
            junk
            if value.is_floating_point()
            else int(min(max(junk, -128), 127) if junk == junk and value.dtype != torch.bool else 0)
            % (256 if value.dtype == torch.uint8 else 2**62)
        )
        state[key] = changed
    elif case.edit == "truncate":
        state[key] = value[: value.numel() * case.junk // len(JUNK)]
    elif case.edit == "flip":
        changed = value.clone()
        changed[(case.key * 31 + case.field) % len(changed)] ^= 1 << (case.junk % 7)
        state[key] = changed
    else:
        fields = json.loads(bytes(value.numpy()).decode())
        name = list(fields)[case.field % len(fields)]
        fields[name] = JUNK[case.junk]
        state[key] = torch.frombuffer(bytearray(json.dumps(fields).encode()), dtype=torch.uint8).clone()
        return f"{name}={JUNK[case.junk]!r}"
    return f"{case.edit} of {key}"


@case_class("edited state", edited_cases, share=2)
def edited_state(case: EditedCase) -> None:
    """One entry edited: refused without a trace, or a state that quantizes finite values to finite ones."""
    original = made(case.method, case.seed, case.state)
    state = {name: value.clone() for name, value in original.state_dict().items()}
    done = edit(state, case)
    quantizer = made(case.method, case.seed + 2, case.state)
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    try:
        load(quantizer, state)
    except DQAError:
        for name, value in quantizer.state_dict().items():
            same(value, before[name], f"{name} after a refused state ({done})")
        raise
    if quantizer.state == "qat":
        quantizer.eval()
    y = finished(quantizer, case.seed) if quantizer.state == "observe" else quantizer(batch(case.seed + 1))
    assert y.shape == SHAPE, f"another shape ({done})"
    assert y.dtype == torch.float32, f"another dtype ({done})"
    if not bool(torch.isfinite(y).all()):
        raise Defect(f"finite values became NaN or Inf ({done})")


class HistoryCase(NamedTuple):
    """Calls of a quantizer in order: an integer is a batch of that seed; "copy", "save": go on with a copy."""

    method: Method
    calls: tuple[int | str, ...]


CALLS = ("copy", "save", "pickle", "eval", "train", "half")
histories = st.builds(
    HistoryCase,
    methods,
    st.lists(
        st.one_of(st.integers(0, 99), st.sampled_from(["copy", "save", "pickle", "eval", "train", "half"])), max_size=8
    )
    .map(tuple)
    .map(lambda calls: (7, *calls)),
)


@case_class("copies at any moment", histories, share=2)
def copies_at_any_moment(case: HistoryCase) -> None:
    """A quantizer that was copied, saved or pickled on the way ends as one that was not."""
    straight, other = (ActivationQuantizer(case.method, name=LABEL) for _ in range(2))
    for call in case.calls:
        if isinstance(call, int):
            straight(batch(call))
            other(batch(call))
        elif call == "copy":
            other = copy.deepcopy(other)
        elif call == "pickle":
            other = pickle.loads(pickle.dumps(other))
        elif call == "save":
            state, other = other.state_dict(), ActivationQuantizer(case.method, name=LABEL)
            other.load_state_dict(state)
        elif call == "half":
            other = other.half()
        else:
            other.train(call == "train")
    same(finished(other, 5), finished(straight, 5))
    for name, value in straight.state_dict().items():
        if name != "_extra_state":
            same(other.state_dict()[name], value, name)
