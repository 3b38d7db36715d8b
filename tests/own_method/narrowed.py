"""A method of a user's own: fields, statistic, decision, Grid. Nothing else in the project knows it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dqa_plugins import Method, register_method
from dqa_plugins.grid import Grid, QParams
from dqa_plugins.method import Extent
from dqa_plugins.search import Kept


@register_method
@dataclass(frozen=True, kw_only=True)
class Narrowed(Method):
    """One scale per tensor; the step of a channel is as many sixteenths of it as calibration saw the channel use."""

    least: int = 3
    name: ClassVar[str] = "narrowed"
    vectors: ClassVar[tuple[str, ...]] = ("sixteenths",)

    def statistic(self, signed: bool | None) -> tuple[Extent, ...]:
        return (Extent("magnitude", 1.0),)

    def decide(self, kept: Kept) -> dict[str, Tensor]:
        reach = kept.rows.abs().amax(1)
        return {"sixteenths": (16 * reach / reach.max().clamp(min=1e-30)).ceil().clamp(min=self.least) / 16}

    def grid(self, qparams: QParams, signed: bool, vectors: Mapping[str, Tensor]) -> Grid:
        plain = super().grid(qparams, signed, vectors)
        if "sixteenths" not in vectors:
            return plain
        return dataclasses.replace(plain, step=plain.step * vectors["sixteenths"])
