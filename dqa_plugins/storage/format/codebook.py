"""The codebook of a layer: everything that packed tensors of one quantizer share, and the grid that they decode to.

Groups of channels with their entropy tables, and what dequantization needs. It is fixed at calibration, held once per
layer, and travels inside `to_bytes()`, so that packed bytes stand for themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...grid import Grid
from ...options import Coding
from ...rounding import power_of_two
from .layout import Group, Layout, packed_group

PARAMETERS = {  # of each kind, by number in the codebook section; those of an explicit grid follow from its fields
    "grid": ("scale",),
    "noise": ("scale",),
    "affine": ("lower", "upper"),
    "dense_sparse": ("lower", "upper"),
    "explicit": ("step", "zero_point", "bias", "lower", "upper"),
}
KINDS = tuple(PARAMETERS)


@dataclass(frozen=True, eq=False)
class Codebook:
    """What packed tensors of one layer share.

    Args:
        kind: how parameters become a grid. "grid": a scale, its step divided by 2^m; "noise": a scale and a bias;
            "affine": a range with a zero point; "dense_sparse": likewise, outliers kept; "explicit": a Grid's fields.
        coding: as asked for.
        bits, signed: n and the sign of the codes.
        channel_axis: where the channels lie; 0: channels are not told apart (C = 1).
        extra_bits: (C,) int64, m of each channel: its codes have n + m bits.
        groups: of all channels.
        parameters: names of what dequantization needs, in the order in which they are stored.
        static: () or (C,) for each of them; empty where they are stored with each tensor.
        dynamic: parameters are stored with each tensor, (B, G).
        per_channel: G = C, else 1.
        per_batch: parameters stored with a tensor are one for the whole batch.
        noise: (C,) in units of the scale, kind "noise"; else empty.
        low: (C,) int64, smallest code of each channel, kind "explicit", where codes are stored minus this; else empty.
        name: the site, for messages.
        plans: layouts made ready for the kernels, by shape (a cache).
        made_for: parameters of the quantizer that the codebook was found to fit (a cache).
    """

    kind: str
    coding: Coding
    bits: int
    signed: bool
    channel_axis: int
    extra_bits: Tensor
    groups: tuple[Group, ...]
    parameters: tuple[str, ...]
    static: tuple[Tensor, ...]
    dynamic: bool
    per_channel: bool
    per_batch: bool
    noise: Tensor
    low: Tensor
    name: str = ""
    plans: dict[tuple[int, int, bool], Any] = field(default_factory=dict, repr=False)
    made_for: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def channels(self) -> int:
        """C; 1 where channels are not told apart."""
        return len(self.extra_bits)

    @property
    def keeps_outliers(self) -> bool:
        """Whether values outside of thresholds are kept in float."""
        return self.kind == "dense_sparse" or (self.kind == "explicit" and "lower" in self.parameters)

    def grid(self, parameters: tuple[Tensor, ...]) -> Grid:
        """The grid of rows (B, C, I).

        Args:
            parameters: (B or 1, C or 1, 1) in the compute dtype for each name in `self.parameters`.
        """
        found = dict(zip(self.parameters, parameters, strict=True))
        if self.kind in ("affine", "dense_sparse"):
            return Grid.affine(found["lower"], found["upper"], self.bits, keep=self.kind == "dense_sparse")

        def rows(vector: Tensor) -> Tensor:
            return vector.to(parameters[0].device, parameters[0].dtype).view(1, -1, 1)

        width = rows(power_of_two(self.extra_bits + self.bits - int(self.signed)))
        if self.kind == "explicit":
            low = rows(self.low)
            keep = (found["lower"], found["upper"]) if "lower" in found else None
            return Grid(found["step"], low, low + width - 1, found.get("zero_point"), found.get("bias"), keep)
        scale = found["scale"]
        bias = rows(self.noise) * scale if self.kind == "noise" else None
        return Grid(scale * rows(power_of_two(-self.extra_bits)), -width * int(self.signed), width - 1, bias=bias)

    def stored(self, codes: Tensor) -> Tensor:
        """What is stored for whole codes, (B, C, I) int32: they themselves, or their distance from the smallest."""
        if self.kind != "explicit":
            return codes
        most = (1 << (self.extra_bits + self.bits)) - 1  # a value that is kept in float may have a code outside
        low, most = (v.to(codes.device, codes.dtype).view(1, -1, 1) for v in (self.low, most))
        return torch.minimum((codes - low).clamp(min=0), most)

    def codes(self, stored: Tensor) -> Tensor:
        """Inverse of `stored`."""
        return stored + self.low.to(stored.device, stored.dtype).view(1, -1, 1) if self.kind == "explicit" else stored

    def layout(self, batch: int, inner: int, *, fixed: bool = False) -> Layout:
        """The layout of a (B, C, I) tensor; `fixed`: with fixed-width codes whatever the coding."""
        groups = fixed_groups(self.groups) if fixed else self.groups
        return Layout(batch, self.channels, inner, groups)

    def merged(self, layout: Layout) -> Layout:
        """The same chunks for the kernels, as one long row where all channels are coded and scaled alike."""
        one_step = self.kind != "grid" or all(p.numel() == 1 for p in self.static)
        alike = len(layout.groups) == 1 and not self.dynamic and one_step
        if not alike or bool((self.extra_bits != self.extra_bits[0]).any()):
            return layout
        group = layout.groups[0]
        one = Group((0,), group.width, group.signed, group.packed, group.coded, group.table)
        return Layout(1, 1, layout.batch * layout.channels * layout.inner, (one,))


def fixed_groups(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """The groups of coding "none" for the same channels: one for each code width."""
    widths = sorted({g.width for g in groups})
    return tuple(
        packed_group(tuple(sorted(c for g in groups if g.width == w for c in g.channels)), w, groups[0].signed)
        for w in widths
    )
