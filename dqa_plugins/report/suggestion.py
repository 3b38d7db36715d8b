"""`suggest`: which method each site needs, so that the network holds its score in the fewest bits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dqa_plugins.batches import Call, ItemReader, Pick
from dqa_plugins.errors import InvalidArgument, UncalibratedQuantizer
from dqa_plugins.method import Method
from dqa_plugins.methods import DQA, DenseSparse, Direct
from dqa_plugins.progress import Progress
from dqa_plugins.quantizer import ActivationQuantizer
from dqa_plugins.sites import iter_quantizers

from .activations import activation_report
from .comparison import Evaluate, read_once, scored
from .placement import placement_report
from .tables import Table, Tabled, described

CANDIDATES: tuple[Method, ...] = (
    *(Direct(bits=bits, granularity="channel") for bits in (2, 3, 4, 6)),
    *(DQA(bits=bits, granularity="channel") for bits in (2, 3)),
    DenseSparse(bits=4),
    Direct(bits=8),
)
_BATCHES = 2  # calibration batches that sensitivities are measured on
_MIXES = 8  # mixes that are really built and scored


@dataclass(frozen=True)
class SiteChoice:
    """A site and what was measured of it.

    Attributes:
        site: its name.
        method: chosen.
        elements: values per sample.
        bits: {method as text: bits per value}, all side information included.
        errors: {method as text: relative error of the network's outputs when this site alone is quantized so}.
    """

    site: str
    method: Method
    elements: int
    bits: dict[str, float]
    errors: dict[str, float]


@dataclass(frozen=True)
class Suggestion(Tabled, Mapping[str, Method]):
    """{site: method}: `quantize_model` takes it where it takes a method.

    Attributes:
        choices: site by site, in order of execution.
        score: of the network quantized so, as `evaluate` measured it.
        float_score: of the float network.
        bits: per activation, mean over values.
        holds: whether the allowed drop is held; False where not even the most exact mix does.
        tried: (bits, score) of every mix that was built.
    """

    choices: tuple[SiteChoice, ...]
    score: float
    float_score: float
    bits: float
    holds: bool
    tried: tuple[tuple[float, float], ...]

    def __getitem__(self, site: str) -> Method:
        for choice in self.choices:
            if choice.site == site:
                return choice.method
        raise KeyError(site)

    def __iter__(self) -> Iterator[str]:
        return iter([choice.site for choice in self.choices])

    def __len__(self) -> int:
        return len(self.choices)

    def sensitivity(self) -> dict[str, float]:
        """{site: relative error of the outputs when it alone is quantized by the method chosen}."""
        return {choice.site: choice.errors[described(choice.method)] for choice in self.choices}

    def table(self) -> Table:
        """What it prints as."""
        rows = []
        for choice in self.choices:
            name = described(choice.method)
            values = f"{choice.bits[name]:.2f}", f"{choice.errors[name]:.2%}"
            rows.append((choice.site, name, str(choice.elements), *values, f"{max(choice.errors.values()):.2%}"))
        title = f"score {self.score:.4g} (float {self.float_score:.4g}) at {self.bits:.2f} bits per activation" + (
            "" if self.holds else "; the allowed drop is NOT held"
        )
        return Table(title, ("site", "method", "values", "bits", "error alone", "error of the worst candidate"), rows)


def suggest(
    model: nn.Module,
    calibration: Iterable[Any],
    evaluate: Evaluate,
    *,
    quantize: Callable[..., nn.Module],
    candidates: Sequence[Method] = CANDIDATES,
    max_drop: float = 0.5,
    inputs: Pick = None,
    progress: bool = True,
    **options: Any,
) -> Suggestion:
    """The cheapest mix of methods that was found to hold the score.

    The network is quantized once by every candidate. With all quantizers but one switched off, the error of the
    outputs tells what that site costs under that candidate; errors of sites are taken as adding up. For each price of a
    bit the best mix then follows site by site, and a bisection over prices builds and scores at most 8 mixes.

    Args:
        model: float, in eval mode; it is not changed.
        calibration: what a DataLoader yields (see `dqa_plugins.batches`); the sensitivities use its first batches.
        evaluate: a function model -> score, the higher the better.
        quantize: a room's `quantize_model`.
        candidates: methods to choose from.
        max_drop: what the score may lose, in its own unit.
        inputs: a function batch -> inputs, where those are not clear.
        progress: show a progress bar (needs tqdm).
        options: further ones of `quantize`: weight_bits, example_inputs.

    Raises:
        InvalidArgument: no candidates, a candidate twice, or a negative drop. UncalibratedQuantizer: nothing is
            quantized. UnsupportedInput: an item does not fit the model, or the score is no number.
    """
    names = [described(method) for method in candidates]
    if not names or len(set(names)) < len(names) or not max_drop >= 0:
        raise InvalidArgument(f"suggest takes different candidates and max_drop >= 0; got {names} and {max_drop!r}.")
    items, _ = read_once(model, calibration, "suggest", inputs)
    with Progress(len(names) + _MIXES, progress, what="measuring and mixing", unit="network") as bar:
        found = {}
        for method, name in zip(candidates, names, strict=True):
            bar.at(name)
            found[name] = _measure(quantize(model, method, items, inputs=inputs, **options), model, items, inputs)
            bar.advance()
        sites = [site for site in found[names[0]] if all(site in measured for measured in found.values())]
        if not sites:
            raise UncalibratedQuantizer(
                "suggest: no activation of this model is quantized, so there is nothing to choose."
            )
        by_name = dict(zip(names, candidates, strict=True))
        table = {site: {name: found[name][site] for name in names} for site in sites}

        def build(chosen: dict[str, str]) -> float:
            bar.at(f"a mix of {_bits(table, chosen):.2f} bits")
            mixed = quantize(model, {s: by_name[n] for s, n in chosen.items()}, items, inputs=inputs, **options)
            bar.advance()
            return scored(mixed, evaluate)[0]

        float_score = scored(model, evaluate)[0]
        chosen, score, tried = _cheapest(_mixes(table), build, float_score - max_drop, table)
    choices = tuple(
        SiteChoice(
            site,
            by_name[chosen[site]],
            found[names[0]][site][0],
            {name: cell[1] for name, cell in table[site].items()},
            {name: cell[2] for name, cell in table[site].items()},
        )
        for site in sites
    )
    return Suggestion(choices, score, float_score, _bits(table, chosen), score >= float_score - max_drop, tuple(tried))


Cell = tuple[int, float, float]  # values per sample, bits per value, relative error of the outputs
Cells = dict[str, dict[str, Cell]]  # by site and candidate


def _measure(quantized: nn.Module, model: nn.Module, items: Iterable[Any], inputs: Pick) -> dict[str, Cell]:
    """What each site of a quantized model costs, and what it does to the outputs on its own."""
    reader = ItemReader(model, "suggest", inputs=inputs)
    calls = list(itertools.islice(reader.items(items), _BATCHES))
    quantizers = dict(iter_quantizers(quantized))
    if not quantizers:
        return {}
    report = activation_report(quantized, [call.inputs for call in calls], inputs=lambda batch: batch)
    shared: dict[str, list[str]] = {}
    for placed in placement_report(quantized).sites:
        if placed.shared_with:
            shared.setdefault(placed.shared_with, []).append(placed.site)
    switches = _Switches(quantizers)
    try:
        exact = [_outputs(quantized, call) for call in calls]
        power = max(sum(float(y.double().square().sum()) for y in exact), 1e-30)
        found = {}
        for row in report.sites:
            switches.on = quantizers[row.site]
            ys = [_outputs(quantized, call) for call in calls]
            error = sum(float((y.double() - z.double()).square().sum()) for y, z in zip(ys, exact, strict=True))
            sharing = [row.site, *shared.get(row.site, ())]  # each its part, as if they had quantizers of their own
            for site in sharing:
                found[site] = (row.elements // len(sharing), row.bits, (error / power / len(sharing)) ** 0.5)
    finally:
        switches.remove()
    return found


class _Switches:
    """All quantizers of a model hand their input on, but for one."""

    def __init__(self, quantizers: Mapping[str, ActivationQuantizer]) -> None:
        self.on: ActivationQuantizer | None = None
        self._handles = [q.register_forward_hook(self._bypass) for q in set(quantizers.values())]

    def _bypass(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        return None if module is self.on else args[0]

    def remove(self) -> None:
        """Every quantizer quantizes again."""
        for handle in self._handles:
            handle.remove()


@torch.no_grad()
def _outputs(model: nn.Module, call: Call) -> Tensor:
    """All floating-point outputs of a model in one row."""
    leaves = torch.utils._pytree.tree_leaves(call(model))
    floats = [leaf.flatten().float() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return torch.cat(floats) if floats else torch.zeros(0)


def _bits(table: Cells, chosen: Mapping[str, str]) -> float:
    cells = [table[site][name] for site, name in chosen.items()]
    return sum(elements * bits for elements, bits, _ in cells) / max(sum(elements for elements, _, _ in cells), 1)


def _mixes(table: Cells) -> list[dict[str, str]]:
    """The mixes that are best at some price of a bit, cheapest first: squared errors add, and so do bits."""
    squares = [error**2 / max(elements, 1) for cells in table.values() for elements, _, error in cells.values()]
    lowest = math.log10(min((square for square in squares if square > 0), default=1e-12))
    highest = math.log10(max(max(squares), 1e-12))
    prices = torch.logspace(highest + 2, lowest - 2, 128, dtype=torch.float64).tolist()
    found: list[dict[str, str]] = []
    for price in prices:
        mix = {}
        for site, cells in table.items():
            costs = {name: error**2 + price * elements * bits for name, (elements, bits, error) in cells.items()}
            mix[site] = min(costs, key=costs.__getitem__)
        if not found or mix != found[-1]:
            found.append(mix)
    return found


def _cheapest(
    mixes: list[dict[str, str]], build: Callable[[dict[str, str]], float], least: float, table: Cells
) -> tuple[dict[str, str], float, list[tuple[float, float]]]:
    """Bisection for the first mix that scores at least `least`; the most exact one where none does."""
    low, high, tried = 0, len(mixes) - 1, []
    best, score = mixes[high], build(mixes[high])
    tried.append((_bits(table, best), score))
    while score >= least and low < high and len(tried) < _MIXES:
        middle = (low + high) // 2
        reached = build(mixes[middle])
        tried.append((_bits(table, mixes[middle]), reached))
        if reached >= least:
            best, score, high = mixes[middle], reached, middle
        else:
            low = middle + 1
    return best, score, tried
