"""What a method is: fields, the statistic that calibration records, what freezing searches, and its Grid.

A method of one's own is a subclass of `Method`, given to `methods.register_method`; nothing else has to change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

from torch import Tensor

from .errors import InvalidMethod
from .grid import Grid, QParams
from .options import Clip, Granularity, QParamsKind, Reduction, Scope
from .prediction import QPP, check_qparams, qpp_from_dict
from .rounding import code_range

if TYPE_CHECKING:
    from typing import Self

    from .search import Kept

MIN_BITS, MAX_BITS = 2, 8


class Extent(NamedTuple):
    """One statistic of each sample and group: how far its values reach to one side. A larger one is a wider range.

    Args:
        of: "magnitude": a quantile of |x|; "positive": of max(x, 0); "upper": of x; "lower": a quantile of x, negated;
            "zero": 0.
        level: of the quantile, in [0, 1].
    """

    of: Literal["magnitude", "positive", "upper", "lower", "zero"]
    level: float = 1.0


def check_choice(method: Method, field: str, allowed: tuple[Any, ...]) -> None:
    """Raise InvalidMethod unless a field has one of the values."""
    value = getattr(method, field)
    if not any(value is a or (type(value) is type(a) and value == a) for a in allowed):
        raise InvalidMethod(
            f"{type(method).__name__}({field}={value!r}): {field} must be one of {', '.join(map(repr, allowed))}."
        )


def check_number(method: Method, field: str, low: float, high: float, *, open_ends: bool = False) -> None:
    """Raise InvalidMethod unless a field is a number in [low, high]."""
    value = getattr(method, field)
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if good:
        good = low < value < high if open_ends else low <= value <= high
    if not good:
        ends = f"({low}, {high})" if open_ends else f"[{low}, {high}]"
        raise InvalidMethod(f"{type(method).__name__}({field}={value!r}): {field} must be a number in {ends}.")


def check_integer(method: Method, field: str, low: int, high: int, why: str) -> None:
    """Raise InvalidMethod unless a field is an integer from low to high."""
    value = getattr(method, field)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidMethod(
            f"{type(method).__name__}({field}={value!r}): {field} must be an integer from {low} to {high}: {why}."
        )


@dataclass(frozen=True, kw_only=True)
class Method:
    """Fields common to all methods; plain frozen dataclasses, validated on construction.

    Args:
        bits: n, the width of one stored code, 2 to 8.
        signed: codes are two's complement (True) or unsigned (False); None: unsigned where calibration saw no
            negative value.
        granularity: "tensor", one scale per tensor (per sample if dynamic); "channel", one per channel.
        qparams: "static", reduced over calibration; "dynamic", from each sample's own tensor; QPP(...), predicted for
            each sample.
        clip: the statistic behind the scale: "max", a quantile in (0, 1), or "mse" (the multiple of the maximum
            with the least squared error on the kept calibration samples).
        channel_axis: axis of the channels; None: the last axis behind Linear, LayerNorm, Embedding or matmul,
            else 1. Axis 0 is the batch.
        reduce: how static parameters reduce per-sample statistics over calibration, "max" or "mean"; None: "max"
            (DenseSparse: "mean", eq. 1 of the QPP paper).
        scope: "sample", dynamic parameters of a sample never depend on its batch; "batch", the literal maximum over
            the batch of the DQA paper.

    Raises:
        InvalidMethod: a field has a value that it cannot have.
    """

    bits: int = 4
    signed: bool | None = None
    granularity: Granularity = "tensor"
    qparams: QParamsKind | QPP = "static"
    clip: Clip | float = "max"
    channel_axis: int | None = None
    reduce: Reduction | None = None
    scope: Scope = "sample"

    name: ClassVar[str] = "method"
    has_important_channels: ClassVar[bool] = False
    vectors: ClassVar[tuple[str, ...]] = ()
    """Names of the per-channel vectors that `decide` gives, (C,) each: buffers of the quantizer."""

    def __post_init__(self) -> None:
        check_integer(
            self,
            "bits",
            MIN_BITS,
            MAX_BITS,
            "one bit has no zero and a sign, and codes wider than a byte save nothing over int8 hardware",
        )
        check_choice(self, "signed", (None, True, False))
        check_choice(self, "granularity", get_args(Granularity))
        if isinstance(self.qparams, dict):  # as JSON has it
            object.__setattr__(self, "qparams", qpp_from_dict(type(self).__name__, self.qparams))
        check_qparams(self.qparams, type(self).__name__)
        check_choice(self, "reduce", (None, *get_args(Reduction)))
        check_choice(self, "scope", get_args(Scope))
        if isinstance(self.clip, str):
            check_choice(self, "clip", get_args(Clip))
        else:
            check_number(self, "clip", 0.0, 1.0, open_ends=True)
        if self.channel_axis is not None:
            check_integer(self, "channel_axis", -16, 16, "an axis of the activation")
            if self.channel_axis == 0:
                raise InvalidMethod(
                    f"{type(self).__name__}(channel_axis=0): axis 0 is the batch; give the axis of the channels, "
                    "or None to take it from the layer before."
                )
        if self.scope == "batch" and (self.qparams != "dynamic" or self.clip != "max"):
            raise InvalidMethod(
                f"{type(self).__name__}(scope='batch') is the paper's maximum over the batch: it needs "
                f"qparams='dynamic' and clip='max', not qparams={self.qparams!r}, clip={self.clip!r}."
            )

    # ------------------------------------------------------------ what makes it a method

    def statistic(self, signed: bool | None) -> tuple[Extent, ...]:
        """What calibration records of each sample, and what its qparams are made of.

        One extent makes a scale, two (lower, upper) make a range, one "upper" of a range begins at zero.

        Args:
            signed: as resolved; None while calibrating: extents that contain those of both outcomes ("magnitude"
                serves for "positive").
        """
        level = self.clip if isinstance(self.clip, float) else 1.0
        if self.uses_range:
            return (Extent("zero") if self.signed is False else Extent("lower", 1 - level)), Extent("upper", level)
        return (Extent("positive" if signed is False else "magnitude", level),)

    def decide(self, kept: Kept) -> dict[str, Tensor]:
        """What freezing searches on the kept calibration values: a (C,) tensor for each name in `vectors`."""
        return {}

    def grid(self, qparams: QParams, signed: bool, vectors: Mapping[str, Tensor]) -> Grid:
        """The normal form.

        Step and bias of a method with a scale are proportional to the scale; codes and zero point do not depend on it.

        Args:
            qparams: a scale, or two thresholds, that broadcast against the tensor.
            signed: resolved.
            vectors: what `decide` gave, likewise; without them: plain quantization at `bits` bits.
        """
        if qparams.scale is None:
            return Grid.affine(*qparams.thresholds, self.bits, keep=self.keeps_outliers)
        return Grid(qparams.scale, *code_range(self.bits, signed))

    def steps(self, signed: bool) -> int:
        """Number of steps from zero to the extent: 2^(n-1) signed, 2^n unsigned."""
        return int(2 ** (self.bits - 1) if signed else 2**self.bits)

    # ------------------------------------------------------------ what follows from the fields

    @property
    def source(self) -> Literal["static", "dynamic", "predicted"]:
        """The kind of qparams source: "static", "dynamic" or "predicted"."""
        return self.qparams if isinstance(self.qparams, str) else "predicted"

    @property
    def prediction(self) -> QPP:
        """The QPP of a method whose source is "predicted"."""
        if not isinstance(self.qparams, QPP):
            raise TypeError(f"{type(self).__name__}: its qparams are {self.qparams!r}")
        return self.qparams

    @property
    def reduction(self) -> Reduction:
        """The resolved `reduce`: "max" or "mean"."""
        return self.reduce or "max"

    @property
    def uses_range(self) -> bool:
        """True where the parameters are two thresholds a <= b rather than one scale."""
        return False

    @property
    def uses_channels(self) -> bool:
        """True where channels are treated differently."""
        return self.granularity == "channel" or bool(self.vectors)

    @property
    def target_density(self) -> float:
        """Share of the values that stay in float by design; 0 for most methods."""
        return 0.0

    @property
    def keeps_outliers(self) -> bool:
        """True where values beyond the thresholds stay in float."""
        return False

    @property
    def needs_next_layer(self) -> bool:
        """True where freezing searches against the next linear layer's weight."""
        return False

    @property
    def clip_resolution(self) -> int:
        """Steps of the search of clip="mse"."""
        return 100

    @classmethod
    def paper(cls, bits: int = 4, **fields: Any) -> Self:
        """The DQA paper's setting: signed, one scale per tensor, taken from the tensor at hand.

        Ours clamps to n bits and takes the maximum per sample (the paper: no clamp, maximum over the batch).
        """
        return cls(**{"bits": bits, "signed": True, "granularity": "tensor", "qparams": "dynamic", **fields})

    def replace(self, **fields: Any) -> Self:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **fields)
