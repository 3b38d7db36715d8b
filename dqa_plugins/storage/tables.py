"""Codebooks of a quantizer: how its grid is written down, and entropy tables made from calibration values.

codebook = calibrate_tables(quantizer, calibration_tensors, "joint")
pack(x, quantizer, codebook=codebook)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UncalibratedQuantizer
from ..grid import Grid, QParams
from ..options import Coding, check_option
from ..quantizer import ActivationQuantizer
from .coder.histograms import FEWER_TABLES, best_table, cluster, symbol_table
from .format.codebook import PARAMETERS, Codebook
from .format.errors import NotPackable
from .format.layout import CODINGS, Group, joint_group, packed_group, shift_error_group
from .format.limits import MAX_BITS, MAX_CODE
from .grids import axis_of, row_grid
from .samples import CalibrationSamples, join, sample_grid, samples_wanted, take_samples


def calibrate_tables(
    quantizer: ActivationQuantizer, tensors: Tensor | Iterable[Tensor], coding: Coding = "auto"
) -> Codebook:
    """Make a codebook with entropy tables from calibration tensors. Nothing is remembered: give it to `pack`.

    Args:
        quantizer: frozen.
        tensors: (B, ...) floating point, as the quantizer sees them; one tensor or several. 64 samples are used at
            most, fewer where they are large.
        coding: as `pack` takes it.

    Raises:
        InvalidArgument, NotPackable: see `pack`.
        UncalibratedQuantizer: no values were given.
    """
    check_option("calibrate_tables", "coding", coding, CODINGS)
    check_quantizer(quantizer)
    samples: CalibrationSamples | None = None
    for x in (tensors,) if isinstance(tensors, Tensor) else tensors:
        if x.numel() and samples_wanted(samples):
            quantizer.fake_quantize(x if x.ndim > 1 else x.unsqueeze(1))  # raises, naming the layer and the channels
            samples = join(samples, take_samples(x, quantizer))
    if samples is None:
        raise UncalibratedQuantizer(f"{quantizer.label}: calibrate_tables was given no values.")
    return build_codebook(quantizer, coding, samples)


def check_quantizer(quantizer: ActivationQuantizer) -> None:
    """Refuse a quantizer whose parameters are not decided.

    Raises:
        NotPackable: it still observes.
    """
    if not isinstance(quantizer, ActivationQuantizer):
        raise NotPackable(f"pack needs an ActivationQuantizer, got {type(quantizer).__name__}.")
    if quantizer.state == "observe":
        raise NotPackable(
            f"{quantizer.label} still observes, so it has no scale to pack with. Run calibration batches, then "
            "convert the model or call freeze()."
        )


def build_codebook(quantizer: ActivationQuantizer, coding: Coding, samples: CalibrationSamples | None) -> Codebook:
    """The codebook of one quantizer.

    Args:
        quantizer: frozen.
        coding: "none", "shift_error", "joint" or "auto" (per group the one that calibration data make smallest).
        samples: calibration values; None is enough for "none".

    Raises:
        InvalidArgument, NotPackable.
    """
    check_quantizer(quantizer)
    book = _without_tables(quantizer)
    book.made_for.update(_snapshot(quantizer))
    if coding == "none":
        return book
    if samples is None or samples.values.numel() == 0:
        raise NotPackable(f"{quantizer.label}: coding={coding!r} needs calibration values to make its tables.")
    codes = book.stored(sample_grid(samples, quantizer).codes(samples.values))
    rows = codes.movedim(1, 0).flatten(1).numpy().astype(np.int64)  # (C, S * L)
    groups = _coded_groups(book.groups, rows, coding, book.bits, samples.values.shape[2] >= 4)
    return replace(book, coding=coding, groups=groups, plans={})


def check_codebook(book: Codebook, quantizer: ActivationQuantizer) -> Codebook:
    """Refuse a codebook that is not this quantizer's: the kernels go by its channels and widths, and check nothing.

    Raises:
        NotPackable: it is of another method, other channels or other parameters.
    """
    snapshot = _snapshot(quantizer)
    if _same_snapshot(snapshot, book.made_for):
        return book
    mine = _without_tables(quantizer)
    names = ("kind", "bits", "signed", "channels", "channel_axis", "parameters", "dynamic", "per_channel", "per_batch")
    wrong = [
        f"{n} {getattr(book, n)!r}, not {getattr(mine, n)!r}" for n in names if getattr(book, n) != getattr(mine, n)
    ]
    if not wrong:
        pairs = [("extra_bits", book.extra_bits, mine.extra_bits), ("noise", book.noise, mine.noise)]
        pairs += [("low", book.low, mine.low), *zip(mine.parameters, book.static, mine.static, strict=False)]
        wrong = [f"another {name}" for name, a, b in pairs if a.shape != b.shape or not bool((a == b).all())]
    if wrong:
        raise NotPackable(
            f"{quantizer.label} cannot pack with this codebook, which has {', '.join(wrong)}. Make one with "
            "calibrate_tables, or convert the model again."
        )
    book.made_for.update(snapshot)
    return book


def _snapshot(quantizer: ActivationQuantizer) -> dict[str, Any]:
    """Everything that a codebook depends on."""
    fields = (quantizer.method, quantizer.num_channels, quantizer.channel_axis, quantizer.signed)
    values = {name: b.cpu().clone() for name, b in quantizer.named_buffers(recurse=False) if b.numel()}
    return {"fields": fields, "values": values}


def _same_snapshot(a: dict[str, Any], b: dict[str, Any]) -> bool:
    if not b or a["fields"] != b["fields"] or a["values"].keys() != b["values"].keys():
        return False
    pairs = [(value, b["values"][name]) for name, value in a["values"].items()]
    return all(p.shape == q.shape and p.dtype == q.dtype and torch.equal(p, q) for p, q in pairs)


# ---------------------------------------------------------------- how a grid is written down


def _without_tables(quantizer: ActivationQuantizer) -> Codebook:
    """The codebook for coding "none": the shortest kind that gives the quantizer's grid exactly."""
    method, channels = quantizer.method, quantizer.num_channels or 1
    fields: dict[str, Any] = {
        "bits": method.bits,
        "per_channel": method.granularity == "channel",
        "dynamic": method.source != "static",
        "per_batch": method.scope == "batch",
        "noise": torch.empty(0),
        "low": torch.empty(0, dtype=torch.int64),
        **(_range_fields(quantizer) if method.uses_range else _scale_fields(quantizer, channels)),
    }
    static = () if fields["dynamic"] else tuple(p.detach().cpu().clone() for p in quantizer.static if p is not None)
    extra: Tensor = fields.setdefault("extra_bits", torch.zeros(channels, dtype=torch.int64))
    signed = fields.setdefault("signed", False)
    groups = tuple(
        packed_group(tuple(torch.nonzero(extra == m).flatten().tolist()), fields["bits"] + m, signed)
        for m in sorted(set(extra.tolist()))
    )
    return Codebook(
        coding="none", channel_axis=axis_of(quantizer), groups=groups, static=static, name=quantizer.name, **fields
    )


def _scale_fields(quantizer: ActivationQuantizer, channels: int) -> dict[str, Any]:
    """Of a grid that is proportional to a scale: 2^-m of it with a code of n + m bits, or a bias besides, if it is."""
    grid, bits = row_grid(quantizer, QParams(torch.ones(1, 1, 1))), quantizer.method.bits
    low, width = _code_ranges(quantizer, grid, channels)
    extra = width - bits
    signed = bool((low < 0).all())
    whole = (low == -(1 << (width - 1)) * int(signed)) & (_high(grid, channels) == low + (1 << width) - 1)
    plain = bool(whole.all()) and grid.zero_point is None and int(extra.min()) >= 1 - bits and int(extra.max()) <= bits
    if plain and torch.equal(_vector(grid.step, channels), torch.exp2(-extra.float())):
        fields = {"signed": signed, "extra_bits": extra}
        if grid.bias is None:
            return {"kind": "grid", "parameters": PARAMETERS["grid"], **fields}
        if not extra.any():
            noise = _vector(grid.bias, channels)
            return {"kind": "noise", "parameters": PARAMETERS["noise"], "noise": noise, **fields}
    return _explicit_fields(quantizer, grid, channels)


def _range_fields(quantizer: ActivationQuantizer) -> dict[str, Any]:
    """Of a grid made of two thresholds: that of eq. 12, without or with outliers kept, if it is."""
    probe = QParams(None, torch.tensor([-1.7, 0.0, 0.3]).view(3, 1, 1), torch.tensor([1.1, 2.3, 0.3]).view(3, 1, 1))
    grid, bits = row_grid(quantizer, probe), quantizer.method.bits
    for kind in ("affine", "dense_sparse"):
        if same_grid(grid, Grid.affine(*probe.thresholds, bits, keep=kind == "dense_sparse")):
            return {"kind": kind, "parameters": PARAMETERS[kind]}
    return _explicit_fields(quantizer, grid, quantizer.num_channels or 1)


def _explicit_fields(quantizer: ActivationQuantizer, grid: Grid, channels: int) -> dict[str, Any]:
    """Of any other grid: its fields are stored with each tensor, in the compute dtype of that tensor."""
    low, width = _code_ranges(quantizer, grid, channels)
    bits = quantizer.method.bits
    extra = width - bits
    if int(extra.min()) < 1 - bits or int(extra.max()) > bits:
        bits, extra = MAX_BITS, width - MAX_BITS
    present = {"step": True, "zero_point": grid.zero_point, "bias": grid.bias, "lower": grid.keep, "upper": grid.keep}
    return {
        "kind": "explicit",
        "bits": bits,
        "extra_bits": extra,
        "low": low,
        "parameters": tuple(name for name in PARAMETERS["explicit"] if present[name] is not None),
        "dynamic": True,
        "per_channel": quantizer.num_channels is not None,
        "per_batch": quantizer.method.source == "static" or quantizer.method.scope == "batch",
    }


def stored_parameters(book: Codebook, qparams: QParams, grid: Grid | None) -> tuple[Tensor, ...]:
    """The parameters that a tensor is packed with, in the order of `book.parameters`: (B or 1, C or 1) each.

    Args:
        qparams, grid: of its rows; the grid is needed for kind "explicit".
    """
    if grid is None or book.kind != "explicit":
        return tuple(p.squeeze(-1) for p in qparams if p is not None)
    lower, upper = grid.keep or (None, None)
    found = {"step": grid.step, "zero_point": grid.zero_point, "bias": grid.bias, "lower": lower, "upper": upper}
    batch = max(p.shape[0] for p in found.values() if p is not None)
    return tuple(found[name].expand(batch, book.channels, 1).squeeze(-1) for name in book.parameters)  # type: ignore[union-attr]


def same_grid(a: Grid, b: Grid) -> bool:
    """Whether two grids of rows quantize alike."""
    zero = torch.zeros_like(a.step)

    def fields(grid: Grid) -> list[Tensor]:
        given = [grid.step, grid.low, grid.high, grid.zero_point, grid.bias, *(grid.keep or ())]
        return [zero if v is None else torch.as_tensor(v, dtype=zero.dtype, device=zero.device) for v in given]

    return (a.keep is None) == (b.keep is None) and all(
        bool((p == q).all()) for p, q in zip(fields(a), fields(b), strict=True)
    )


def _vector(value: Tensor | int, channels: int) -> Tensor:
    """(C,) of a field that is the same for all samples.

    Raises:
        NotPackable: it differs by position.
    """
    if torch.as_tensor(value).numel() not in (1, channels):
        raise NotPackable(f"a grid of {torch.as_tensor(value).numel()} values for {channels} channels is not packed.")
    return torch.as_tensor(value).detach().cpu().reshape(-1).expand(channels).clone()


def _high(grid: Grid, channels: int) -> Tensor:
    return _vector(grid.high, channels).to(torch.int64)


def _code_ranges(quantizer: ActivationQuantizer, grid: Grid, channels: int) -> tuple[Tensor, Tensor]:
    """(C,) smallest code, and bits that hold the distance to the largest.

    Raises:
        NotPackable: codes that the format cannot hold.
    """
    low, high = _vector(grid.low, channels).to(torch.int64), _high(grid, channels)
    width = torch.tensor([max(1, int(d).bit_length()) for d in (high - low).tolist()])
    if bool((high < low).any() or (width > 2 * MAX_BITS).any() or (low.abs() > MAX_CODE).any()):
        raise NotPackable(
            f"{quantizer.label}: codes from {int(low.min())} to {int(high.max())} of up to {int(width.max())} bits; at "
            f"most {2 * MAX_BITS} can be packed."
        )
    return low, width


# ---------------------------------------------------------------- groups with tables


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
