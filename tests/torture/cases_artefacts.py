"""What is saved and read again: methods as dicts, rank tables, ranking checkpoints; edited, truncated, of others."""

from __future__ import annotations

import copy
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from dqa_plugins import DQA, ActivationQuantizer, Method, RankTable, method_from_dict, method_to_dict, rank_channels
from dqa_plugins.ranking import LayerRanks

from .material import all_methods, seeds
from .registry import Defect, case_class

leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 9), st.integers(), st.floats(), st.text(max_size=5),
    st.sampled_from(["static", "dynamic", "mse", "max", "tensor", "channel", "dqa", "input", 10**400, float("nan")]),
)  # fmt: skip
junk = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


class FieldCase(NamedTuple):
    """A method as a dict, one field of it replaced."""

    method: Method
    field: int
    value: Any


@case_class("method fields", st.builds(FieldCase, all_methods, st.integers(0, 20), junk), names=(), share=3)
def method_fields(case: FieldCase) -> None:
    """Any value in any field of a method's dict: refused by the field's name, or a method that survives JSON."""
    fields = method_to_dict(case.method)
    assert method_from_dict(json.loads(json.dumps(fields))) == case.method, "JSON changed a method"
    name = [*fields, "nobody"][case.field % (len(fields) + 1)]
    try:
        found = method_from_dict({**fields, name: case.value})
    except (ValueError, TypeError) as error:
        if name not in str(error) and name != "qparams":
            raise Defect(f"a refusal of {name}={case.value!r} that does not name it: {error}") from error
        raise
    again = method_from_dict(json.loads(json.dumps(method_to_dict(found))))
    assert again == found, f"{found} became {again}"
    hash(found)
    repr(found)


class Small(nn.Module):
    """Two DQA quantizers."""

    def __init__(self, method: Method, channels: tuple[int, int] = (3, 4)) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, channels[0]), nn.Linear(channels[0], channels[1])
        self.a, self.b = ActivationQuantizer(method, name="layer.a"), ActivationQuantizer(method, name="layer.b")

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.second(self.a(self.first(x).relu())))


def small(method: Method | None = None, seed: int = 0) -> Small:
    """Calibrated, with weights of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Small(method or DQA(bits=3, ratio=0.5)).eval()
        with torch.no_grad():
            model(torch.randn(8, 5))
    return model


def layer_bits(model: nn.Module) -> list[list[int]]:
    """The extra bits of the two layers."""
    return [q.extra_bits.tolist() for q in model.modules() if isinstance(q, ActivationQuantizer)]


TABLE = RankTable(
    (LayerRanks("layer.a", (2, 0, 1), (0.1, 0.0, 0.9)), LayerRanks("layer.b", (0, 3, 2, 1), (4.0, 1.0, 2.0, 3.0))),
    "error",
)
MODEL = small()
PLACES = (
    ("schema",), ("version",), ("strategy",), ("metric",), ("seed",), ("strict",), ("layers",), ("layers", 0),
    ("layers", 0, "name"), ("layers", 0, "order"), ("layers", 0, "scores"), ("layers", 0, "losses"),
    ("layers", 1, "order", 0), ("layers", 1, "scores", 1), ("layers", 1),
)  # fmt: skip


class TableCase(NamedTuple):
    """A rank table with a value replaced at one place, or its text damaged: cut, or a character replaced."""

    place: int
    value: Any
    cut: int
    character: str


tables = st.builds(
    TableCase, st.integers(0, len(PLACES) - 1), junk, st.one_of(st.just(-1), st.just(-1), st.integers(0, 400)),
    st.one_of(st.just(""), st.just(""), st.sampled_from(["\x00", "[" * 3000, "NaN", "}", "\ud800", "9" * 5000])),
)  # fmt: skip


@case_class("rank tables", tables, names=("table.json", "layer", "rank table"), share=3)
def rank_tables(case: TableCase) -> None:
    """An edited or truncated table: refused by its file's name, or one that orders channels; apply is all or none."""
    data = json.loads(json.dumps(TABLE.to_dict()))
    at: Any = data
    *way, last = PLACES[case.place]
    for step in way:
        at = at[step]
    at[last] = case.value
    text = json.dumps(data)
    if case.cut >= 0:
        text = text[: case.cut] + case.character + text[case.cut + 1 :]
    model = copy.deepcopy(MODEL)
    before = layer_bits(model)
    with tempfile.TemporaryDirectory(dir=scratch()) as folder:
        path = Path(folder) / "table.json"
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        table = RankTable.load(path)
        table.save(path)
        assert RankTable.load(path) == table, "saved and loaded, a table changed"
    for layer in table:
        assert sorted(layer.order) == list(range(layer.channels)), "an order that is none"
        assert all(map(math.isfinite, layer.scores)), "a score that is not finite"
    try:
        table.apply(model)
    except ValueError:
        assert layer_bits(model) == before, "a refused table left a trace"
        raise
    for layer, bits in zip(table, layer_bits(model), strict=True):
        assert [c for c, m in enumerate(bits) if m] == sorted(layer.important(0.5)), "other channels than ranked"


def scratch() -> str | None:
    """A folder in memory where there is one: cases write thousands of files."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class CheckpointCase(NamedTuple):
    """A ranking that was interrupted; the file edited; the ranking called again, with something else perhaps."""

    seed: int
    edit: str
    number: int


EDITS = ("none", "cut", "flip", "model", "data", "metric", "seed", "strict", "field", "table of another")


def margin(outputs: Tensor, targets: Tensor) -> Tensor:
    """A user's metric."""
    return outputs.amax(1) - outputs.mean(1)


def spread(outputs: Tensor, targets: Tensor) -> Tensor:
    """Another one."""
    return -outputs.std(1)


def ranked(number: int, path: Path | None, **settings: Any) -> RankTable:
    """Rank a small model."""
    weights = settings.pop("weights", number)
    generator = torch.Generator().manual_seed(settings.pop("data", number))
    batches = [(torch.randn(6, 5, generator=generator), torch.randint(4, (6,), generator=generator))]
    return rank_channels(
        small(seed=weights), batches, progress=False, checkpoint=path, **{"metric": margin, **settings}
    )


@case_class(
    "checkpoints",
    st.builds(CheckpointCase, seeds, st.sampled_from(EDITS), st.integers(0, 999)),
    names=("ranking.json",),
)
def checkpoints(case: CheckpointCase) -> None:
    """A checkpoint of something else is refused; else the table is the one of a search without a checkpoint."""
    settings: dict[str, Any] = {
        "model": {"weights": case.seed + 1}, "data": {"data": case.seed + 1}, "metric": {"metric": spread},
        "seed": {"seed": 5}, "strict": {"strict": True},
    }.get(case.edit, {})  # fmt: skip
    with tempfile.TemporaryDirectory(dir=scratch()) as folder:
        path = Path(folder) / "ranking.json"
        first = ranked(case.seed, path)
        text = path.read_text()
        if case.edit == "cut":
            path.write_text(text[: len(text) * case.number // 1000])
        elif case.edit == "flip":
            at = len(text) * case.number // 1000
            path.write_text(text[:at] + chr(ord(text[at]) ^ 1) + text[at + 1 :])
        elif case.edit == "field":
            data = json.loads(text)
            data["table"]["layers"] = data["table"]["layers"][: case.number % 2]
            path.write_text(json.dumps(data))
        elif case.edit == "table of another":
            data = json.loads(text)
            data["table"]["layers"][case.number % 2]["name"] = "layer.c"
            path.write_text(json.dumps(data))
        found = ranked(case.seed, path, **settings)
    if settings:
        raise Defect(f"the checkpoint of another {case.edit} was taken")
    expected = first if not settings else ranked(case.seed, None, **settings)
    if case.edit not in ("flip",):  # a digit of a score may be another one: what a file says is believed
        assert found == expected, f"{found} against {expected}"
