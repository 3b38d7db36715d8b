"""`compare_methods`: one network under several methods, one table of score, bits, sites and time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from dqa_plugins.batches import Call, ItemReader, Pick
from dqa_plugins.errors import DQAError, InvalidArgument, UnsupportedInput
from dqa_plugins.method import Method
from dqa_plugins.progress import Progress
from dqa_plugins.sites import iter_quantizers

from .activations import activation_report
from .tables import Table, Tabled

Methods = Method | Mapping[str, Method | None]
Evaluate = Callable[[nn.Module], float]


@dataclass(frozen=True)
class MethodRow:
    """A network quantized by one method.

    Attributes:
        name: of the method in the comparison; "float" for the network as it was given.
        score: what `evaluate` returned.
        bits: per activation on the first calibration batch, all side information included (`activation_report`).
        sites: quantizers.
        seconds: of placing, calibrating and converting.
        evaluate_time_vs_float: time of `evaluate` over that of the float network, one run each.
        failed: the error of a method that this network or framework cannot have; "" otherwise.
    """

    name: str
    score: float = float("nan")
    bits: float = 32.0
    sites: int = 0
    seconds: float = 0.0
    evaluate_time_vs_float: float = 1.0
    failed: str = ""


@dataclass(frozen=True)
class Comparison(Tabled):
    """Rows in the order of the methods given, the float network first."""

    rows: tuple[MethodRow, ...]

    def __getitem__(self, name: str) -> MethodRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible."""
        return {"rows": [asdict(row) for row in self.rows]}

    def table(self) -> Table:
        """What it prints as."""
        rows = [
            (row.name, row.failed, "", "", "", "")
            if row.failed
            else (
                row.name,
                f"{row.score:.4g}",
                f"{row.bits:.2f}",
                str(row.sites),
                f"{row.seconds:.1f}",
                f"{row.evaluate_time_vs_float:.2f}",
            )
            for row in self.rows
        ]
        columns = ("method", "score", "bits", "sites", "seconds to quantize", "time of evaluation over float's")
        return Table(f"{sum(r.name != 'float' for r in self.rows)} methods", columns, rows)


def compare_methods(
    model: nn.Module,
    methods: Mapping[str, Methods],
    calibration: Iterable[Any],
    evaluate: Evaluate,
    *,
    quantize: Callable[..., nn.Module],
    inputs: Pick = None,
    progress: bool = True,
    **options: Any,
) -> Comparison:
    """Quantize a network by each of several methods, and score each.

    Args:
        model: float, in eval mode; it is not changed.
        methods: {name: method, or {site: method}}.
        calibration: what a DataLoader yields (see `dqa_plugins.batches`); kept, if it can be read only once.
        evaluate: a function model -> score, the higher the better.
        quantize: a room's `quantize_model`, such as `dqa_plugins.adapters.fx.quantize_model`.
        inputs: a function batch -> inputs, where those are not clear.
        progress: show a progress bar (needs tqdm).
        options: further ones of `quantize`: weight_bits, example_inputs.

    Returns:
        a table. A method that cannot be had here (a DQAError) is a row with the error; other errors are raised.

    Raises:
        InvalidArgument: there are no methods. UnsupportedInput: an item does not fit the model, or `evaluate` returned
            something other than a number.
    """
    if not methods or "float" in methods:
        raise InvalidArgument(
            "compare_methods takes {name: method} with one method or more; 'float' is the network itself."
        )
    items, first = read_once(model, calibration, "compare_methods", inputs)
    with Progress(len(methods) + 1, progress, what="comparing methods", unit="method") as bar:
        bar.at("float")
        score, float_seconds = scored(model, evaluate)
        rows = [MethodRow("float", score)]
        for name, method in methods.items():
            bar.advance()
            bar.at(name)
            try:
                start = time.perf_counter()
                quantized = quantize(model, method, items, inputs=inputs, **options)
                seconds = time.perf_counter() - start
                bits, sites = bits_of(quantized, first), len(list(iter_quantizers(quantized)))
            except DQAError as error:
                rows.append(MethodRow(name, failed=f"{type(error).__name__}: {error}"))
                continue
            score, evaluated = scored(quantized, evaluate)
            rows.append(MethodRow(name, score, bits, sites, seconds, evaluated / float_seconds))
        bar.advance()
    return Comparison(tuple(rows))


def read_once(model: nn.Module, calibration: Iterable[Any], caller: str, inputs: Pick) -> tuple[Iterable[Any], Call]:
    """(calibration data that can be read again and again, its first item as a call of the model)."""
    reader = ItemReader(model, caller, inputs=inputs)
    items = calibration if hasattr(calibration, "__len__") else list(calibration)
    return items, next(reader.items(items))


def bits_of(quantized: nn.Module, call: Call) -> float:
    """Bits per activation on one batch; 32 where nothing is quantized."""
    if not any(True for _ in iter_quantizers(quantized)):
        return 32.0
    return activation_report(quantized, [call.inputs], inputs=lambda batch: batch).bits_per_activation


def scored(model: nn.Module, evaluate: Evaluate) -> tuple[float, float]:
    """(score, seconds) of a model.

    Raises:
        UnsupportedInput: the score is no finite number.
    """
    start = time.perf_counter()
    with torch.no_grad():
        found = evaluate(model)
    seconds = time.perf_counter() - start
    try:
        return float(found), max(seconds, 1e-9)
    except (TypeError, ValueError):
        raise UnsupportedInput(
            f"evaluate returned a {type(found).__name__}; it takes a model and returns a number, the higher the better."
        ) from None
