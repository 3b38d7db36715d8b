"""What a predicted quantizer remembers of each calibration sample: enough to fit, and to replay other predictions."""

from __future__ import annotations

import torch
from torch import Tensor

from dqa_plugins.ranges import grouped, quantiles
from dqa_plugins.state import StateModule

from .features import channel_features, log

LIMIT = 2048  # rows: half as many samples where each has an augmented twin
_SHARES = tuple(0.3 * 0.5**k for k in range(16))  # 30% down to 1e-5
_COARSE = tuple(0.3 * 0.2**k for k in range(6))  # of each channel


class SampleRecord(StateModule):
    """One row per calibration sample, and one per augmented sample.

    Which samples have rows depends on their numbers alone, so a sample and its augmented twin are recorded together or
    not at all, and records of several processes merge exactly. Memory: `LIMIT` rows of at most 8 * (20 + 2 * 64) +
    4 * G * (S + 34) bytes (14 instead of 34 where G > 1).

    Buffers (M samples, S statistics, G groups, T tail points):
        samples: (M,) int64, which sample; an augmented one has the number of its original.
        features: (M, F) float64, of the site's tensor.
        channels: (M, 2 * C) float64, of its own channels.
        statistic: (M, S, G), what is to be predicted (`statistics.extents` while the sign is open).
        tails: (M, 2, T + 1, G), values that shares 30%, 15%, ... of x, and of -x, exceed; the maximum last.
        means: (M,) float64, mean magnitude.
        elements: () int64, values per group.
    """

    samples: Tensor
    features: Tensor
    channels: Tensor
    statistic: Tensor
    tails: Tensor
    means: Tensor
    elements: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.forwards = self.added = 0  # number of the last forward, and the samples that it gave rows
        # (number of the first sample, how many follow) of this process, where others calibrate too
        self.declared: tuple[int, int] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        device = self._buffers["elements"].device if "elements" in self._buffers else None  # type: ignore[union-attr]
        double = {"dtype": torch.float64, "device": device}
        self.register_buffer("samples", torch.empty(0, dtype=torch.int64, device=device))
        self.register_buffer("features", torch.empty((0, 0), **double))  # type: ignore[arg-type]
        self.register_buffer("channels", torch.empty((0, 0), **double))  # type: ignore[arg-type]
        self.register_buffer("statistic", torch.empty((0, 0, 0), device=device))
        self.register_buffer("tails", torch.empty((0, 2, 0, 0), device=device))
        self.register_buffer("means", torch.empty(0, **double))  # type: ignore[arg-type]
        self.register_buffer("elements", torch.zeros((), dtype=torch.int64, device=device))

    def shapes(self) -> dict[str, tuple[str, ...]]:
        """See `StateModule.shapes`."""
        return {
            "samples": ("M",),
            "features": ("M F",),
            "channels": ("M H",),
            "statistic": ("M S G",),
            "tails": ("M 2 T G",),
            "means": ("M",),
            "elements": ("",),
        }

    @property
    def count(self) -> int:
        """Rows."""
        return len(self.samples)

    @property
    def next_sample(self) -> int:
        """The number of the sample after those seen, as far as rows tell."""
        first = 0 if self.declared is None else self.declared[0]
        return max(first, int(self.samples.max()) + 1 if self.count else 0)

    @torch.no_grad()
    def observe(
        self,
        x: Tensor,
        samples: Tensor,
        features: Tensor,
        statistic: Tensor,
        granularity: str,
        axis: int,
        step: int,
        twins: bool = False,
    ) -> None:
        """Add the rows of a batch; a second call in one forward (`step`) widens those of the first.

        Args:
            x: (B, ...) finite.
            samples: (B,) their numbers, ascending.
            features: (B, F).
            statistic: (B, S, G).
            granularity, axis: of the groups.
            step: number of the forward.
            twins: every sample is observed a second time, augmented.
        """
        wanted = int((samples < (LIMIT // 2 if twins else LIMIT)).sum())
        again, self.forwards = step == self.forwards, step
        if wanted == 0:
            self.added = 0
            return
        x, samples, features, statistic = x[:wanted], samples[:wanted], features[:wanted], statistic[:wanted]
        tails, means = _tails(x, granularity, axis), x.abs().flatten(1).double().mean(1)
        if again:
            if self.added == wanted:
                rows = slice(self.count - wanted, self.count)
                self.statistic[rows] = torch.maximum(self.statistic[rows], statistic)
                self.tails[rows] = torch.maximum(self.tails[rows], tails)
            return
        self.added = wanted
        new = {"samples": samples, "features": features, "statistic": statistic, "tails": tails, "means": means}
        new["channels"] = channel_features(x, axis)
        for name, value in new.items():
            held = getattr(self, name)
            value = value.to(held.device if held.numel() else value.device)
            setattr(self, name, value.clone() if held.numel() == 0 else torch.cat([held, value]))
        self.elements = torch.tensor(x[0].numel() // tails.shape[-1], dtype=torch.int64, device=self.elements.device)

    @torch.no_grad()
    def merge(self, other: SampleRecord) -> None:
        """Add the rows of samples that came after this one's; the result is the record of both.

        Args:
            other: of the same site; its samples are numbered after this one's.
        """
        if other.count == 0:
            return
        first = self.count == 0
        for name in ("samples", "features", "channels", "statistic", "tails", "means"):
            held, value = getattr(self, name), getattr(other, name)
            setattr(self, name, value.clone() if first else torch.cat([held, value]))
        self.elements = other.elements.clone()

    def share_beyond(self, prediction: Tensor) -> Tensor:
        """Share of each sample's values outside a range, interpolated between the tail points.

        Args:
            prediction: (M, S, G) extents, as in `features.outside`.

        Returns:
            (M,) float64.
        """
        shares = torch.tensor(_SHARES if self.tails.shape[2] > len(_COARSE) + 1 else _COARSE, dtype=torch.float64)
        least = min(0.5 / max(int(self.elements), 1), float(shares[-1]) / 2)
        logs = torch.cat([shares, torch.tensor([least], dtype=torch.float64)]).log().to(self.tails.device)
        upper, lower = (prediction[:, -1], prediction[:, 0])
        total = _exceeding(self.tails[:, 0], upper, logs) + _exceeding(self.tails[:, 1], lower, logs)
        return total.mean(1)

    def summaries(self, prediction: Tensor) -> Tensor:
        """What `features.Summary` would have said had these predictions been used, (M, 2 + 2 * C)."""
        groups = self.tails.shape[-1]
        elements = float(int(self.elements) * groups)
        shares = self.share_beyond(prediction) + 1.0 / elements
        return torch.cat([torch.stack([log(shares), log(self.means)], 1), self.channels], 1)


def _tails(x: Tensor, granularity: str, axis: int) -> Tensor:
    values = grouped(x, granularity, axis)
    shares = _SHARES if granularity == "tensor" else _COARSE
    levels = (*(1 - s for s in shares), 1.0)
    up, down = quantiles(values, levels), quantiles(-values, levels)
    return torch.stack([torch.stack(up, 1), torch.stack(down, 1)], 1)


def _exceeding(tail: Tensor, threshold: Tensor, logs: Tensor) -> Tensor:
    """tail (M, T, G) ascending in T, threshold (M, G); the share above it, (M, G)."""
    points = tail.double().movedim(1, 2).contiguous()
    wanted = threshold.double().unsqueeze(2).contiguous()
    after = torch.searchsorted(points, wanted, right=True).squeeze(2)
    low, high = (after - 1).clamp(0, points.shape[2] - 1), after.clamp(0, points.shape[2] - 1)
    at_low, at_high = (points.gather(2, i.unsqueeze(2)).squeeze(2) for i in (low, high))
    width = (at_high - at_low).clamp(min=1e-300)
    part = ((wanted.squeeze(2) - at_low) / width).clamp(0, 1)
    share = (logs[low] + (logs[high] - logs[low]) * part).exp()
    share = torch.where(after == 0, logs[0].exp(), share)
    return torch.where(after >= points.shape[2], torch.zeros_like(share), share)
