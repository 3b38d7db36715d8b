"""Running a model over batches of inputs: what reports share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from .errors import UncalibratedQuantizer, UnsupportedInput


def run_batches(model: nn.Module, batches: Iterable[Any], caller: str) -> None:
    """Call a model on every batch.

    Args:
        batches: a tensor each, a tuple or list of positional inputs, or a mapping of keyword inputs.
        caller: for messages.

    Raises:
        UnsupportedInput: `batches` is one batch: its samples would be taken for batches.
        UncalibratedQuantizer: there are no batches.
    """
    if isinstance(batches, Tensor | Mapping) or not isinstance(batches, Iterable):
        what = f"a tensor of shape {tuple(batches.shape)}" if isinstance(batches, Tensor) else type(batches).__name__
        raise UnsupportedInput(f"{caller} takes an iterable of batches; got {what}. For a single batch give [batch].")
    ran = 0
    for batch in batches:
        if isinstance(batch, Mapping):
            model(**batch)
        elif isinstance(batch, tuple | list):
            model(*batch)
        else:
            model(batch)
        ran += 1
    if not ran:
        raise UncalibratedQuantizer(f"{caller} got no batches, so no quantizer saw data.")
