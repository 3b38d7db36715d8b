"""What a prediction is made from: statistics of a site's tensor, and what a quantized tensor showed.

All in float64: a sample's features, and so its qparams, do not depend on the batch that it came in (float32 means add
up in another order when a batch has one sample).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dqa_plugins.kernels import eager
from dqa_plugins.method import Extent, Method
from dqa_plugins.operators import as_node
from dqa_plugins.ranges import extents, grouped, lay_out, quantiles
from dqa_plugins.rounding import cast, compute_dtype

LEVELS = (0.9, 0.99, 0.999)
PAPER_FEATURES = len(LEVELS) + 2
RAW_LEVELS = (0.001, 0.01, 0.1, 0.5, 0.99)
SCALE = 1  # which feature of the extended mode is the log scale of a site's tensor
SLOPES = 2 * (len(LEVELS) + 1)
EXTENDED_FEATURES = PAPER_FEATURES + SLOPES + len(RAW_LEVELS) + 2
SUMMARY_FEATURES = 2
MOST_CHANNELS = 64  # channels of a summary; more are averaged in groups
SMALLEST, LARGEST = 1e-12, 1e38  # what a logarithm is taken of; squares of larger values overflow float32


def site_size(mode: str) -> int:
    """Number of features of a site."""
    return PAPER_FEATURES if mode == "paper" else EXTENDED_FEATURES


def log(x: Tensor) -> Tensor:
    """Natural logarithm, float64, of x within its bounds."""
    return x.double().clamp(SMALLEST, LARGEST).log()


def mean_of(x: Tensor) -> Tensor:
    """Mean over the last dimension, float64."""
    return x.mean(-1, keepdim=True, dtype=torch.float64).squeeze(-1)


def sum_of(x: Tensor) -> Tensor:
    """Sum over the last dimension of a float64 tensor.

    The squeeze is a node of its own in an exported graph: OpenVINO computes a reduction together with the arithmetic
    behind it, and where the reduction drops a dimension it pairs a vector with the wrong one.
    """
    return x.sum(-1, keepdim=True).squeeze(-1)


def site_features(x: Tensor, mode: str) -> Tensor:
    """The features of a site's tensor, taken before it is quantized.

    Args:
        x: (B, ...) floating point.
        mode: "paper": 0.9, 0.99 and 0.999 quantile, mean and maximum (QPP paper, eq. 13 and section 8). "extended":
            logarithms of those of |x|, and of the same of the differences between neighbours in height and width
            (contrast); low quantiles, median, mean and standard deviation, relative to the 0.99 quantile of |x|.

    Returns:
        (B, 5) or (B, 20) float64.
    """
    found = as_node(SiteFeatures(mode), (x,), (site_size(mode),), torch.float64)
    return _site_features(x, mode) if found is None else found


def _site_features(x: Tensor, mode: str) -> Tensor:
    values = cast(x, compute_dtype(x.dtype))
    if mode == "paper":
        return torch.stack(_summary(values.flatten(1), magnitude=False), 1)
    logs = _summary(values.flatten(1))
    for axis in (-1, -2):
        if x.ndim == 4 and x.shape[axis] > 1:
            size = x.shape[axis] - 1
            slope = values.narrow(axis, 1, size) - values.narrow(axis, 0, size)
            logs += [q + 1e-6 for q in _summary(slope.flatten(1))[:-1]]
        else:
            logs += [torch.ones_like(logs[0])] * (len(LEVELS) + 1)
    flat = values.flatten(1)
    if eager.usable(flat):
        mean, _, square = _means(flat)
    else:
        mean, square = mean_of(flat), mean_of(flat.square())
    spread = (square - mean.square()).clamp(0, LARGEST).sqrt()
    raw = [q.double() for q in quantiles(flat, RAW_LEVELS)]
    relative = torch.stack([*raw, mean, spread], 1) / logs[SCALE].clamp(min=SMALLEST).unsqueeze(1)
    return torch.cat([log(torch.stack(logs, 1)), relative], 1)


def _means(flat: Tensor) -> list[Tensor]:
    """Mean, mean magnitude and mean square of (B, N) in one pass, each (B,) float64."""
    nowhere = torch.zeros(len(flat), 1)
    return list((eager.sums(flat, None, nowhere, nowhere)[:, 0, :3] / flat.shape[1]).unbind(1))


def _summary(flat: Tensor, *, magnitude: bool = True) -> list[Tensor]:
    """Quantiles, mean and maximum of (B, N), or of its magnitudes, each (B,) float64."""
    if eager.usable(flat) and (found := eager.order_statistics(flat, _extents(magnitude))) is not None:
        quantile = found.double().unbind(1)
        return [*quantile[:-1], _means(flat)[int(magnitude)], quantile[-1]]
    flat = flat.abs() if magnitude else flat
    mean = mean_of(flat)
    return [*(q.double() for q in quantiles(flat, LEVELS)), mean, flat.amax(1).double()]


def _extents(magnitude: bool) -> tuple[Extent, ...]:
    return tuple(Extent("magnitude" if magnitude else "upper", level) for level in (*LEVELS, 1.0))


def channel_features(x: Tensor, axis: int) -> Tensor:
    """Logarithms of mean magnitude and of root mean square of each channel.

    Args:
        x: (B, ...).
        axis: of the C channels.

    Returns:
        (B, 2 * min(C, 64)) float64; more channels are averaged in groups of neighbours.
    """
    channels = x.shape[axis]
    if eager.usable(x):
        nowhere = torch.zeros(len(x), 1)
        known = eager.sums(x, axis % x.ndim, nowhere, nowhere) / (x[0].numel() // channels)
        mean, square = known[..., 1], known[..., 2]
    else:
        values = grouped(x, "channel", axis)  # in float32: squares of half precision overflow from 256 on
        mean, square = mean_of(values.abs()), mean_of(values.square())
    if channels > MOST_CHANNELS:
        groups = torch.arange(channels, device=x.device) * MOST_CHANNELS // channels
        member = (groups[:, None] == torch.arange(MOST_CHANNELS, device=x.device)).double()
        member = member / member.sum(0)
        mean, square = mean @ member, square @ member
    found = [v + 1e-3 * v.mean(1, keepdim=True) for v in (mean, square.sqrt())]
    return log(torch.cat(found, 1))


def outside(x: Tensor, prediction: Tensor, axis: int) -> Tensor:
    """How many values of each sample lie outside the predicted range.

    Args:
        x: (B, ...).
        prediction: (B, S, G) extents: the magnitude (S = 1) or -a and b (S = 2).
        axis: of the G channels, if G > 1.

    Returns:
        (B,) float64.
    """
    sides = [lay_out(side, x, axis, per_sample=True) for side in prediction.to(compute_dtype(x.dtype)).unbind(1)]
    beyond = x.abs() > sides[0] if len(sides) == 1 else (x < -sides[0]) | (x > sides[1])
    return beyond.flatten(1).sum(1).double()


class SiteFeatures(nn.Module):
    """`site_features` as a module: the predictor node of a site in a converted graph.

    Args:
        mode: see `site_features`.
        site: whose tensor it takes.
    """

    def __init__(self, mode: str, site: str = "") -> None:
        super().__init__()
        self.mode, self.site = mode, site

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) to (B, features) float64, see `site_features`."""
        return site_features(x, self.mode)

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, site={self.site!r}"


class OwnStatistic(nn.Module):
    """The statistic of the tensor itself, as a module: what the quantizer at a site uses in the extended mode.

    Its features are taken of this very tensor, so nothing is left to predict.
    """

    def __init__(self, method: Method, axis: int) -> None:
        super().__init__()
        self.method, self.axis = method, axis
        self.signed = True

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) to (B, S, G), extents."""
        groups = x.shape[self.axis] if self.method.granularity == "channel" else 1
        sides = len(self.method.statistic(self.signed))
        found = as_node(self, (x,), (sides, groups), torch.float32)
        return found if found is not None else torch.stack(extents(x, self.method, self.signed, self.axis), 1).float()


class Summary(nn.Module):
    """What a quantized tensor showed, for the predictions after it: its outliers are counted and stored anyway.

    Args:
        axis: the channel axis of its quantizer.
    """

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor, prediction: Tensor) -> Tensor:
        """Log outlier share, log mean magnitude, and the features of each channel.

        Args:
            x: (B, ...).
            prediction: (B, S, G).

        Returns:
            (B, 2 + 2 * min(C, 64)) float64.
        """
        channels = 2 * min(x.shape[self.axis], MOST_CHANNELS)
        found = as_node(self, (x, prediction), (SUMMARY_FEATURES + channels,), torch.float64)
        if found is not None:
            return found
        if eager.usable(x):
            sides = prediction.to(torch.float32).unbind(1)
            return self._by_kernel(x, -sides[0], sides[-1])
        flat = x.flatten(1)
        count = flat.shape[1]
        share = (outside(x, prediction, self.axis) + 1.0) / count
        mean = mean_of(flat.abs())
        return torch.cat([torch.stack([log(share), log(mean)], 1), channel_features(x, self.axis)], 1)

    def _by_kernel(self, x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        """One pass over x, and no small tensors."""
        from dqa_plugins.kernels.predict import summary

        known = eager.sums(x, self.axis % x.ndim, lower, upper)
        channels = known.shape[1]
        out = torch.empty((len(x), SUMMARY_FEATURES + 2 * min(channels, MOST_CHANNELS)), dtype=torch.float64)
        size = x[0].numel() // channels
        summary(known.numpy(), size, MOST_CHANNELS, SMALLEST, LARGEST, out.numpy())
        return out
