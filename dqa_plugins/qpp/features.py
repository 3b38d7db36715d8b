"""What a prediction is made from: statistics of a site's tensor, and what a quantized tensor showed.

All in float64: a sample's features, and so its qparams, do not depend on the batch that it came in (float32 means add
up in another order when a batch has one sample).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dqa_plugins.grid import cast, compute_dtype
from dqa_plugins.methods import Method
from dqa_plugins.qparams import lay_out
from dqa_plugins.statistics import quantiles

LEVELS = (0.9, 0.99, 0.999)
SITE_FEATURES = len(LEVELS) + 2
NOTE_FEATURES = 2
SMALLEST = 1e-12  # floor of what a logarithm is taken of


def log(x: Tensor) -> Tensor:
    """Natural logarithm, float64, of x or of the floor."""
    return x.double().clamp(min=SMALLEST).log()


def site_features(x: Tensor, mode: str) -> Tensor:
    """The features of a site's tensor (QPP paper, eq. 13): three quantiles, mean, maximum.

    Args:
        x: (B, ...) floating point, the tensor before it is quantized.
        mode: "paper": of x; "extended": logarithms of those of |x|.

    Returns:
        (B, 5) float64.
    """
    values = cast(x, compute_dtype(x.dtype)).flatten(1)
    if mode == "extended":
        values = values.abs()
    count = values.shape[1]
    found = [q.double() for q in quantiles(values, LEVELS)]
    found += [values.sum(1, dtype=torch.float64) / count, values.amax(1).double()]
    features = torch.stack(found, 1)
    return log(features) if mode == "extended" else features


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
    """`site_features` as a module: the predictor node of a site in a converted graph."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) to (B, 5) float64."""
        return site_features(x, self.mode)

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}"


class Note(nn.Module):
    """What a quantized tensor showed, for the predictions after it: its outliers are counted and stored anyway.

    Args:
        method: of its quantizer.
        axis: its channel axis.
    """

    def __init__(self, method: Method, axis: int) -> None:
        super().__init__()
        self.method, self.axis = method, axis

    def forward(self, x: Tensor, prediction: Tensor) -> Tensor:
        """x (B, ...), prediction (B, S, G); returns (B, 2) float64, log outlier share and log mean magnitude."""
        count = x.flatten(1).shape[1]
        share = (outside(x, prediction, self.axis) + 1.0) / count
        mean = x.abs().flatten(1).sum(1, dtype=torch.float64) / count
        return torch.stack([log(share), log(mean)], 1)
