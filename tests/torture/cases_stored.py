"""The networks of `cases_networks` with their long-lived values held as packed codes."""

from __future__ import annotations

import torch
from hypothesis import reject

from dqa_plugins.storage import NothingToStore, convert_stored, prepare_stored

from .cases_networks import FINE, Program, batch, build, near, programs
from .registry import case_class


@case_class("stored models", programs(("store",)), names=(), share=3)
def stored_models(case: Program) -> None:
    """A model that holds its long-lived values as packed 16-bit codes computes what the float one does."""
    with torch.no_grad():
        try:
            expected = build(case)(*(x.clone() for x in batch(case)))
        except RuntimeError:  # torch's own: a view of a permuted tensor
            reject()
        try:
            prepared = prepare_stored(build(case), FINE, batch(case))
        except NothingToStore:
            return
        near(prepared(*(x.clone() for x in batch(case))), expected, "prepared")
        stored = convert_stored(prepared)
        near(stored(*(x.clone() for x in batch(case))), expected, "stored")
