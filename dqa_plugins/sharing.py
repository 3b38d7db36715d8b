"""The work of a search among processes: each candidate, batch or layer is done by one of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .errors import UnsupportedCombination
from .processes import Processes, pack_tensors, unpack_tensors


def shared(ranks: Processes, work: Callable[[], Any], about: str) -> list[Any]:
    """`Processes.share` for work that gives the same wherever it is done.

    Raises:
        UnsupportedCombination: the model or the metric draws random numbers, which one process would draw in another
            order.
    """
    return ranks.share(_settled(ranks, work, about), about)


def shared_tensors(ranks: Processes, work: Callable[[], dict[str, Tensor]], about: str) -> list[dict[str, Tensor]]:
    """`shared` for work that gives named tensors; they come back on the CPU."""
    return ranks.share(_settled(ranks, work, about), about, pack=pack_tensors, unpack=unpack_tensors)


def by_batch(count: int, measure: Callable[[int], dict[str, Tensor]], ranks: Processes) -> Iterator[dict[str, Tensor]]:
    """What `measure` finds for each of `count` batches, in their order; ranks do one each at a time."""
    for first in range(0, count, ranks.size):
        work = functools.partial(measure, first + ranks.rank) if first + ranks.rank < count else dict
        yield from shared_tensors(ranks, work, f"batches from {first}")[: count - first]


def by_piece(count: int, measure: Callable[[int], Tensor], ranks: Processes, about: str) -> list[Tensor]:
    """What `measure` finds for each of `count` pieces of work, which ranks divide among them."""
    parts = shared_tensors(ranks, lambda: {str(k): measure(k) for k in ranks.mine(count)}, about)
    return [parts[k % ranks.size][str(k)] for k in range(count)]


def _settled(ranks: Processes, work: Callable[[], Any], about: str) -> Callable[[], Any]:
    if ranks.size == 1:
        return work

    def checked() -> Any:
        before = torch.random.get_rng_state()
        found = work()
        if not torch.equal(before, torch.random.get_rng_state()):
            raise UnsupportedCombination(
                f"{about}: the model or the metric draws random numbers, so that ranks which share the work would not "
                "find what one process finds. Call it in one process, and give its result to the others."
            )
        return found

    return checked
