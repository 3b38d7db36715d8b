"""The codebook of a layer: everything that packed tensors of one quantizer share.

Groups of channels with their entropy tables, and the parameters that dequantization needs. It is fixed at
calibration, held once per layer, and travels inside `to_bytes()`, so that packed bytes stand for themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..methods import DQA, DenseSparse, Method, NoisyQuant
from ..quantizer import ActivationQuantizer
from .errors import NotPackable, UnknownCoding
from .histograms import FEWER_TABLES, best_table, cluster
from .layout import CODINGS, Group, Layout, joint_group, packed_group, shift_error_group
from .strips import Strips, strip_qparams, whole_codes
from .tables import symbol_table

KINDS = ("grid", "noise", "affine", "dense_sparse")


def check_coding(coding: str) -> str:
    """Return `coding` if there is one of that name.

    Raises:
        UnknownCoding: there is not.
    """
    if coding not in CODINGS:
        raise UnknownCoding(f"coding={coding!r}: it must be one of {', '.join(map(repr, CODINGS))}.")
    return coding


@dataclass(frozen=True, eq=False)
class Codebook:
    """What packed tensors of one layer share.

    Args:
        kind: "grid": x_hat = q * step (Direct, DQA); "noise": NoisyQuant; "affine": asymmetric Direct;
            "dense_sparse".
        coding: as asked for.
        bits, signed: n and the sign of the codes.
        channel_axis: where the channels lie; 0: channels are not told apart (C = 1).
        extra_bits: (C,) int64, m of each channel.
        groups: of all channels.
        scale, lower, upper: () or (C,), static parameters; None where unused or dynamic.
        dynamic: parameters are stored with each tensor, (B, G).
        per_channel: G = C, else 1.
        per_batch: dynamic parameters are one for the whole batch (scope="batch").
        noise: (C,) in units of the scale; empty where unused.
        name: the site, for messages.
        plans: layouts made ready for the kernels, by shape (a cache).
    """

    kind: str
    coding: str
    bits: int
    signed: bool
    channel_axis: int
    extra_bits: Tensor
    groups: tuple[Group, ...]
    scale: Tensor | None
    lower: Tensor | None
    upper: Tensor | None
    dynamic: bool
    per_channel: bool
    per_batch: bool
    noise: Tensor
    name: str = ""
    plans: dict[tuple[int, int, bool], Any] = field(default_factory=dict, repr=False)

    @property
    def channels(self) -> int:
        """C; 1 where channels are not told apart."""
        return len(self.extra_bits)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that dequantization needs."""
        return ("scale",) if self.kind in ("grid", "noise") else ("lower", "upper")

    def layout(self, batch: int, inner: int, *, fixed: bool = False) -> Layout:
        """The layout of a (B, C, I) tensor; `fixed`: with fixed-width codes whatever the coding."""
        groups = fixed_groups(self.groups) if fixed else self.groups
        return Layout(batch, self.channels, inner, groups)

    def merged(self, layout: Layout) -> Layout:
        """The same chunks for the kernels, as one long row where all channels are coded and scaled alike."""
        alike = len(layout.groups) == 1 and not self.dynamic and (self.scale is None or self.scale.numel() == 1)
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


def method_kind(method: Method) -> str:
    """Which dequantization a method uses, see `Codebook`."""
    if isinstance(method, DenseSparse):
        return "dense_sparse"
    if isinstance(method, NoisyQuant):
        return "noise"
    return "affine" if method.uses_range else "grid"


def check_quantizer(quantizer: ActivationQuantizer) -> None:
    """Refuse a quantizer whose parameters are not decided.

    Raises:
        NotPackable: it still observes, or its parameters are predicted.
    """
    if not isinstance(quantizer, ActivationQuantizer):
        raise NotPackable(f"pack needs an ActivationQuantizer, got {type(quantizer).__name__}.")
    if quantizer.method.source == "predicted":
        raise NotPackable(
            f"{quantizer.label} predicts its parameters from the network's input, which packing has no part in; use "
            "qparams='static' or 'dynamic' for stored activations."
        )
    if quantizer.state == "observe":
        raise NotPackable(
            f"{quantizer.label} still observes, so it has no scale to pack with. Run calibration batches, then "
            "convert the model or call freeze()."
        )


def build_codebook(quantizer: ActivationQuantizer, coding: str, strips: Strips | None) -> Codebook:
    """Choose groups and entropy tables for one quantizer.

    Args:
        quantizer: frozen.
        coding: "none", "shift_error", "joint" or "auto" (per group the one that calibration data make smallest).
        strips: calibration values; None is enough for "none".

    Raises:
        UnknownCoding, NotPackable.
    """
    check_coding(coding)
    check_quantizer(quantizer)
    method, kind = quantizer.method, method_kind(quantizer.method)
    count = quantizer.num_channels or 1
    extra = quantizer.extra_bits.cpu() if isinstance(method, DQA) else torch.zeros(count, dtype=torch.int64)
    if extra.numel() != count:
        raise NotPackable(f"{quantizer.label}: {extra.numel()} extra bits for {count} channels.")
    signed = quantizer.signed and kind not in ("affine", "dense_sparse")
    noise = quantizer.noise.cpu() if kind == "noise" else torch.empty(0)
    fixed = tuple(
        packed_group(tuple(torch.nonzero(extra == m).flatten().tolist()), method.bits + m, signed)
        for m in sorted(set(extra.tolist()))
    )
    groups = fixed
    if coding != "none":
        if strips is None or strips.values.numel() == 0:
            raise NotPackable(f"{quantizer.label}: coding={coding!r} needs calibration values to make its tables.")
        codes = whole_codes(strips.values, method, strip_qparams(strips, quantizer), quantizer.signed, extra, noise)
        rows = codes.movedim(1, 0).flatten(1).numpy().astype(np.int64)  # (C, S * L)
        neighbours = strips.values.shape[2] >= 4
        groups = _coded_groups(fixed, rows, coding, method.bits, neighbours)
    scale, lower, upper = (
        None if method.qparams == "dynamic" or not value.numel() else value.detach().cpu().clone()
        for value in (quantizer.scale, quantizer.lower, quantizer.upper)
    )
    return Codebook(
        kind=kind,
        coding=coding,
        bits=method.bits,
        signed=signed,
        channel_axis=0 if quantizer.num_channels is None else quantizer.channel_axis,
        extra_bits=extra.clone(),
        groups=groups,
        dynamic=method.qparams == "dynamic",
        per_channel=method.granularity == "channel",
        per_batch=method.scope == "batch",
        noise=noise.clone(),
        name=quantizer.name,
        scale=scale,
        lower=lower,
        upper=upper,
    )


def _coded_groups(
    fixed: tuple[Group, ...], rows: np.ndarray, coding: str, bits: int, neighbours: bool
) -> tuple[Group, ...]:
    found: list[Group] = []
    for group in fixed:
        values = rows[list(group.channels)] & ((1 << group.width) - 1)
        options: list[tuple[float, tuple[Group, ...]]] = []
        if coding in ("shift_error", "auto"):
            options.append(_shift_error_option(group, values, bits))
        if coding in ("joint", "auto"):
            options.append(_joint_option(group, values, neighbours))
        if coding == "auto":
            options.append((float(group.width), (group,)))
        found.extend(min(options, key=lambda option: option[0])[1])
    return tuple(found)


def _shift_error_option(group: Group, values: np.ndarray, bits: int) -> tuple[float, tuple[Group, ...]]:
    extra = group.width - bits
    if extra <= 0:
        return float(group.width), (group,)
    counts = np.bincount((values & ((1 << extra) - 1)).ravel(), minlength=1 << extra).astype(np.float64)
    table = symbol_table((counts + 0.5) / (counts + 0.5).sum())
    cost = bits + table.cost(counts / counts.sum(), extra)
    return cost, (shift_error_group(group.channels, group.width, group.signed, bits, table),)


def _joint_option(group: Group, values: np.ndarray, neighbours: bool) -> tuple[float, tuple[Group, ...]]:
    low = max(0, group.width - 8)
    coded = values >> low
    alphabet = 1 << (group.width - low)
    counts = np.stack([np.bincount(row, minlength=alphabet) for row in coded]).astype(np.float64)
    labels = cluster(counts)
    several = _with_tables(group, coded, labels, low, neighbours)
    if not labels.any():
        return several
    one = _with_tables(group, coded, np.zeros_like(labels), low, neighbours)
    return one if one[0] <= several[0] * (1 + FEWER_TABLES) else several


def _with_tables(
    group: Group, coded: np.ndarray, labels: np.ndarray, low: int, neighbours: bool
) -> tuple[float, tuple[Group, ...]]:
    """(bits per value, groups) with a table for each label."""
    groups, cost = [], 0.0
    for label in range(int(labels.max()) + 1):
        members = np.flatnonzero(labels == label)
        table, bits = best_table(coded[members], group.width - low, group.signed, neighbours)
        channels = tuple(group.channels[i] for i in members)
        groups.append(joint_group(channels, group.width, group.signed, table))
        cost += (bits + low) * len(members)
    return cost / len(coded), tuple(groups)
