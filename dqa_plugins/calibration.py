"""What a quantizer remembers of its calibration data: running statistics that merge, and a few kept values.

Two kinds of memory, because they serve two kinds of question:

- running statistics (maximum and sum over samples of the per-sample statistic) give static qparams. Both merge
  exactly: the record of two halves of a data set is the record of the whole. The sum is exact, so that the halves may
  be cut anywhere.
- kept values feed every search (clip factor, noise, channel errors, codebooks): the first 64 samples, at most 2^18
  values, at evenly strided positions with all channels of a position together. What is kept of a sample does not
  depend on its batch.

Memory of a site, whatever the number of samples: at most 4 * 2^18 bytes of kept values and 8 * min(2^18 / D, 2^18)
bytes that say whose they are (3 MiB with one row, 1 MiB and 32 KiB with 64), and S * G * (4 * 64 + 16) bytes of
statistics (S = 1 or 2, G = 1 or C); twice as much for float64 activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import StateMismatch
from .exact import exact_sum
from .method import Method
from .ranges import Measured, grouped
from .state import StateModule

KEPT_SAMPLES = 64
KEPT_VALUES = 2**18
QAT_AVERAGING = 0.01  # torch.ao's averaging_constant


class CalibrationRecord(StateModule):
    """Statistics of the samples one quantizer saw.

    Buffers (S = statistic size, G = groups, D = kept rows, K = kept columns):
        maximum: (S, G), largest per-sample statistic.
        total: (S, G) float64, sum of the per-sample statistics; (P, S, G) where one float64 does not hold it, see
            `exact`.
        average: (S, G), moving average over training batches (QAT only).
        counts: (2,) int64, samples seen and samples kept.
        minimum: () float64, most negative value seen (0 if none).
        kept: (D, K), kept values; a row is a channel (or a channel and kernel tap, see `geometry`).
        kept_sample: (K,) int64, the sample of each column.
        kept_statistic: (kept samples, S, G), the statistic of each kept sample's whole tensor.
    """

    maximum: Tensor
    total: Tensor
    average: Tensor
    counts: Tensor
    minimum: Tensor
    kept: Tensor
    kept_sample: Tensor
    kept_statistic: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Forget everything (buffers go back to empty, on their device)."""
        self.synchronized = 0  # of the samples, how many are those of all processes
        device = self._buffers["counts"].device if "counts" in self._buffers else None  # type: ignore[union-attr]
        empty = {"maximum": (0, 0), "average": (0, 0), "kept": (0, 0), "kept_statistic": (0, 0, 0)}
        for name, shape in empty.items():
            self.register_buffer(name, torch.empty(shape, device=device))
        self.register_buffer("total", torch.empty((0, 0), dtype=torch.float64, device=device))
        self.register_buffer("kept_sample", torch.empty(0, dtype=torch.int64, device=device))
        self.register_buffer("counts", torch.zeros(2, dtype=torch.int64, device=device))
        self.register_buffer("minimum", torch.zeros((), dtype=torch.float64, device=device))

    def shapes(self) -> dict[str, tuple[str, ...]]:
        """See `StateModule.shapes`."""
        return {
            "maximum": ("S G",),
            "total": ("S G", "P S G"),
            "average": ("S G",),
            "counts": ("2",),
            "minimum": ("",),
            "kept": ("D K",),
            "kept_sample": ("K",),
            "kept_statistic": ("N S G",),
        }

    def check_loaded(self, loaded: Mapping[str, Any], sizes: dict[str, int], label: str) -> None:
        """See `StateModule.check_loaded`; the parts have to be of one number of samples."""
        super().check_loaded(loaded, sizes, label)
        counts, sample, statistic = (loaded.get(name) for name in ("counts", "kept_sample", "kept_statistic"))
        if counts is None or sample is None or statistic is None or counts.is_meta:
            return
        seen, kept = counts.tolist() if counts.numel() == 2 else (-1, -1)
        top = loaded.get("maximum")
        good = 0 <= kept <= seen and len(statistic) == kept and (top is None or bool(top.numel()) == bool(seen))
        if not good or (sample.numel() and not 0 <= int(sample.min()) <= int(sample.max()) < kept):
            raise StateMismatch(f"{label}: the calibration record in the state_dict has parts of several calibrations.")

    @property
    def count(self) -> int:
        """Number of samples seen."""
        return int(self.counts[0])

    @property
    def negative(self) -> bool:
        """True if a negative value was seen."""
        return bool(self.minimum < 0)

    @property
    def room(self) -> int:
        """Samples of which values can be kept yet, at most; 1 where there are none, so that a batch is a batch."""
        return max(1, KEPT_SAMPLES - int(self.counts[1]))

    @torch.no_grad()
    def observe(self, measured: Measured, rows: Tensor, method: Method, *, moving: bool = False) -> None:
        """Record a batch of B >= 1 samples.

        Args:
            measured: of the batch, finite.
            rows: (N, D, L) what to keep columns of: the channels of the first samples, `room` or all, at L positions.
            method: whose statistic.
            moving: also update the moving average (QAT).
        """
        values = measured.values
        top = values.amax(0) if method.reduction == "max" else values.mean(0)
        self.maximum = values.amax(0) if self.count == 0 else torch.maximum(self.maximum, values.amax(0))
        self._add(values.double())
        if moving:
            self.average = top if self.average.numel() == 0 else self.average + QAT_AVERAGING * (top - self.average)
        self.minimum = torch.minimum(self.minimum, measured.minimum.double())
        self._keep(rows, values)
        self.counts = self.counts + torch.tensor([len(values), 0], device=self.counts.device)

    def _add(self, values: Tensor) -> None:
        """Add (N, S, G) float64 to the sum."""
        held = self.total.reshape(-1, *values.shape[1:])
        total = exact_sum(torch.cat([held, values]))
        self.total = total[0] if len(total) == 1 else total

    def _keep(self, rows: Tensor, values: Tensor) -> None:
        depth, positions = rows.shape[1:]
        limit = min(KEPT_SAMPLES, max(1, KEPT_VALUES // max(depth, 1)))
        kept = int(self.counts[1])
        room = min(limit - kept, len(rows))
        if room <= 0:
            return
        columns = min(positions, max(1, KEPT_VALUES // KEPT_SAMPLES // max(depth, 1)))
        index = torch.arange(columns, device=rows.device) * positions // columns
        taken = rows[:room, :, index].to(values.dtype)
        sample = torch.arange(kept, kept + room, device=rows.device).repeat_interleave(columns)
        taken = taken.movedim(0, 1).flatten(1)
        if kept == 0:
            self.kept, self.kept_sample, self.kept_statistic = taken, sample, values[:room].clone()
        else:
            self.kept = torch.cat([self.kept, taken], dim=1)
            self.kept_sample = torch.cat([self.kept_sample, sample])
            self.kept_statistic = torch.cat([self.kept_statistic, values[:room]])
        self.counts = self.counts + torch.tensor([0, room], device=self.counts.device)

    def reduced(self, method: Method) -> Tensor:
        """The statistic behind static qparams, (S, G): maximum or mean over samples (QPP paper, eq. 1)."""
        if self.average.numel():
            return self.average
        if method.reduction == "max":
            return self.maximum
        total = self.total.reshape(-1, *self.maximum.shape)[0]  # the parts behind it are below its rounding
        return (total / self.counts[0]).to(self.maximum.dtype)

    @torch.no_grad()
    def merge(self, other: CalibrationRecord) -> None:
        """Add the record of data that came after this one's; the result is the record of both.

        Args:
            other: of the same method and site.
        """
        if other.count == 0:
            return
        if self.count == 0:
            for name in self._buffers:
                setattr(self, name, getattr(other, name).clone())
            return
        self.maximum = torch.maximum(self.maximum, other.maximum)
        self._add(other.total.reshape(-1, *other.maximum.shape))
        self.minimum = torch.minimum(self.minimum, other.minimum)
        kept, depth = int(self.counts[1]), self.kept.shape[0]
        room = min(KEPT_SAMPLES, max(1, KEPT_VALUES // max(depth, 1))) - kept
        columns = other.kept_sample < room
        self.kept = torch.cat([self.kept, other.kept[:, columns]], dim=1)
        self.kept_sample = torch.cat([self.kept_sample, other.kept_sample[columns] + kept])
        self.kept_statistic = torch.cat([self.kept_statistic, other.kept_statistic[: max(room, 0)]])
        added = len(self.kept_statistic) - kept
        self.counts = self.counts + torch.tensor([other.count, added], device=self.counts.device)


def rows_to_keep(x: Tensor, by_channel: bool, channel_axis: int, geometry: tuple[Any, ...] | None) -> Tensor:
    """x, (B, ...), as (B, D, L): what the record keeps columns of.

    Args:
        by_channel: a row is a channel; else all values are one row.
        geometry: (kernel, dilation, stride) of the next convolution, whose output a search is for: rows are its inputs.
    """
    if geometry and x.ndim == 4:
        kernel, dilation, stride = geometry
        if all(n > d * (k - 1) for n, d, k in zip(x.shape[2:], dilation, kernel, strict=True)):
            return nn.functional.unfold(grouped(x, "tensor", 1).view_as(x), kernel, dilation, 0, stride)
    return grouped(x, "channel" if by_channel else "tensor", channel_axis)
