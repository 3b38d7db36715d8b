"""Where a quantizer's qparams come from: calibration ("static"), the tensor at hand ("dynamic"), or a prediction.

The quantizer asks a `QParamsSource`. The first two are here; the third installs itself when `dqa_plugins.qpp` is
imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .calibration import CalibrationRecord
from .errors import UnsupportedCombination
from .grid import QParams
from .method import Method
from .ranges import extents, lay_out, qparams_of
from .rounding import like


class Site(Protocol):
    """What a source reads of the quantizer that asks it."""

    method: Method
    name: str
    calibration: CalibrationRecord

    @property
    def label(self) -> str:
        """Site and method, for messages."""

    @property
    def channel_axis(self) -> int:
        """Resolved."""

    @property
    def signed(self) -> bool:
        """Resolved."""

    @property
    def clip_factor(self) -> Tensor | None:
        """() or (C,), clip="mse"."""

    @property
    def static(self) -> QParams:
        """Qparams reduced over calibration, () or (C,); empty where they are not used."""


class QParamsSource(Protocol):
    """Gives a quantizer its parameters."""

    def qparams(self, site: Site, x: Tensor, prediction: Tensor | None) -> QParams:
        """The parameters of x, (B, ...), in its compute dtype, laid out to broadcast against it."""

    def extents(self, site: Site, x: Tensor, prediction: Tensor | None) -> Tensor | None:
        """What the qparams of each sample are made of, (B, S, G) (see `ranges.qparams_of`); None: they are static."""

    def observe(self, site: Site, x: Tensor, statistic: Tensor) -> bool:
        """Learn from a calibration batch.

        Args:
            statistic: (B, S, G) of x.

        Returns:
            whether the batch counts for the calibration record too (an augmented one does not).
        """

    def freeze(self, site: Site) -> None:
        """Calibration is over: keep what quantizing needs."""


class Static:
    """Qparams reduced over calibration."""

    def qparams(self, site: Site, x: Tensor, prediction: Tensor | None) -> QParams:
        """Shared by all samples."""
        axis = site.channel_axis
        return site.static.map(lambda p: lay_out(like(p, x).reshape(-1), x, axis, per_sample=False))

    def extents(self, site: Site, x: Tensor, prediction: Tensor | None) -> Tensor | None:
        """None: qparams are not made for a sample."""
        return None

    def observe(self, site: Site, x: Tensor, statistic: Tensor) -> bool:
        """Nothing beyond the record."""
        return True

    def freeze(self, site: Site) -> None:
        """Nothing to do."""


class Dynamic(Static):
    """Qparams of each sample's own tensor."""

    def extents(self, site: Site, x: Tensor, prediction: Tensor | None) -> Tensor:
        """(B, S, G), or (1, S, G) for scope="batch"."""
        return torch.stack(list(self._extents(site, x)), 1)

    def _extents(self, site: Site, x: Tensor) -> Sequence[Tensor]:
        found = extents(x, site.method, site.signed, site.channel_axis)
        return [e.amax(0, keepdim=True) for e in found] if site.method.scope == "batch" else found

    def qparams(self, site: Site, x: Tensor, prediction: Tensor | None) -> QParams:
        """Of `extents`."""
        qparams = qparams_of(site.method, self._extents(site, x), site.signed, site.clip_factor)
        return qparams.map(lambda p: lay_out(p, x, site.channel_axis, per_sample=True))


_SOURCES: dict[str, Callable[[Method], QParamsSource]] = {
    "static": lambda method: Static(),
    "dynamic": lambda method: Dynamic(),
}


def install_source(kind: str, make: Callable[[Method], QParamsSource]) -> None:
    """Make a kind of source available.

    Args:
        kind: as `Method.source` names it.
        make: method -> the source of one quantizer.
    """
    _SOURCES[kind] = make


def make_source(method: Method) -> QParamsSource:
    """The source of a quantizer.

    Raises:
        UnsupportedCombination: nothing installed it.
    """
    if method.source not in _SOURCES:
        raise UnsupportedCombination(f"qparams={method.qparams!r}: import dqa_plugins.qpp first, which computes them.")
    return _SOURCES[method.source](method)
