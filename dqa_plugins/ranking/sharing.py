"""The work of a ranking among processes: each candidate, batch or layer is done by one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedCombination
from ..processes import Processes, pack_tensors, unpack_tensors


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


def _settled(ranks: Processes, work: Callable[[], Any], about: str) -> Callable[[], Any]:
    if ranks.size == 1:
        return work

    def checked() -> Any:
        before = torch.random.get_rng_state()
        found = work()
        if not torch.equal(before, torch.random.get_rng_state()):
            raise UnsupportedCombination(
                f"{about}: the model or the metric draws random numbers, so that ranks which share the work would not "
                "find what one process finds. Rank in one process, and apply its table on the others."
            )
        return found

    return checked
