"""What is measured of one quantized activation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Histogram:
    """Where the values of a site lie, and what its grid can represent.

    Attributes:
        low, high: ends of the bins, unit of the activation.
        counts: values in each of the equal bins; those of later batches beyond the ends are in the outermost ones.
        represented: smallest and largest value of the grid, over samples and channels of the first batch.
        step: smallest width of a step there; 0 where no channel has one.
        thresholds: (a, b) beyond which values stay in float, where the method has them.
    """

    low: float
    high: float
    counts: tuple[int, ...]
    represented: tuple[float, float]
    step: float
    thresholds: tuple[float, float] | None = None


@dataclass(frozen=True)
class SiteReport:
    """One site, measured on the inputs given.

    Attributes:
        site: its name.
        method: of its quantizer.
        elements: values per sample.
        bits: per value with fixed-length codes, all side information of the tensor included: n-bit codes, m-bit shift
            errors of the important channels, 32-bit value and position of each outlier, per-sample qparams.
        sqnr: signal to quantization noise, decibels; inf where nothing was lost, -inf where nothing but noise is left.
        density: share of outliers (DenseSparse), else 0.
        saturated: share of values that the clamp moved by more than a step: beyond what calibration saw.
        settings: the method with the fields that are no defaults.
        important: channels with extra bits, in order.
        histogram: of the values.
    """

    site: str
    method: str
    elements: int
    bits: float
    sqnr: float
    density: float
    saturated: float = 0.0
    settings: str = ""
    important: tuple[int, ...] = ()
    histogram: Histogram | None = None
