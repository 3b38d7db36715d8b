"""The methods: how a tensor becomes codes once its quantization parameters are known.

Plain frozen dataclasses, keyword-only and validated on construction: they hold no state, know no framework and
can be compared, hashed, printed and written to JSON (`method_to_dict`, `method_from_dict`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from .errors import InvalidMethod, NotAMethod
from .sources import QPP, check_source

MIN_BITS, MAX_BITS = 2, 8


def _choice(method: Method, field: str, allowed: tuple[Any, ...]) -> None:
    value = getattr(method, field)
    if not any(value is a or (type(value) is type(a) and value == a) for a in allowed):
        raise InvalidMethod(
            f"{type(method).__name__}({field}={value!r}): {field} must be one of {', '.join(map(repr, allowed))}."
        )


def _number(method: Method, field: str, low: float, high: float, *, open_ends: bool = False) -> None:
    value = getattr(method, field)
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if good:
        good = low < value < high if open_ends else low <= value <= high
    if not good:
        ends = f"({low}, {high})" if open_ends else f"[{low}, {high}]"
        raise InvalidMethod(f"{type(method).__name__}({field}={value!r}): {field} must be a number in {ends}.")


def _integer(method: Method, field: str, low: int, high: int, why: str) -> None:
    value = getattr(method, field)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidMethod(
            f"{type(method).__name__}({field}={value!r}): {field} must be an integer from {low} to {high}: {why}."
        )


@dataclass(frozen=True, kw_only=True)
class Method:
    """Fields common to all methods.

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
    granularity: str = "tensor"
    qparams: str | QPP = "static"
    clip: str | float = "max"
    channel_axis: int | None = None
    reduce: str | None = None
    scope: str = "sample"

    name: ClassVar[str] = "method"
    has_important_channels: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _integer(
            self,
            "bits",
            MIN_BITS,
            MAX_BITS,
            "one bit has no zero and a sign, and codes wider than a byte save nothing over int8 hardware",
        )
        _choice(self, "signed", (None, True, False))
        _choice(self, "granularity", ("tensor", "channel"))
        if isinstance(self.qparams, dict):  # as JSON has it
            object.__setattr__(self, "qparams", _predicted(type(self).__name__, self.qparams))
        check_source(self.qparams, type(self).__name__)
        _choice(self, "reduce", (None, "max", "mean"))
        _choice(self, "scope", ("sample", "batch"))
        if isinstance(self.clip, str):
            _choice(self, "clip", ("max", "mse"))
        else:
            _number(self, "clip", 0.0, 1.0, open_ends=True)
        if self.channel_axis is not None:
            _integer(self, "channel_axis", -16, 16, "an axis of the activation")
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

    @property
    def source(self) -> str:
        """The kind of qparams source: "static", "dynamic" or "predicted"."""
        return self.qparams if isinstance(self.qparams, str) else "predicted"

    @property
    def prediction(self) -> QPP:
        """The QPP of a method whose source is "predicted"."""
        if not isinstance(self.qparams, QPP):
            raise TypeError(f"{type(self).__name__}: its qparams are {self.qparams!r}")
        return self.qparams

    @property
    def reduction(self) -> str:
        """The resolved `reduce`: "max" or "mean"."""
        return self.reduce or "max"

    @property
    def uses_range(self) -> bool:
        """True where the parameters are two thresholds a <= b rather than one scale."""
        return False

    @property
    def needs_next_layer(self) -> bool:
        """True where freezing searches against the next linear layer's weight."""
        return False

    @classmethod
    def paper(cls, bits: int = 4, **fields: Any) -> Method:
        """The DQA paper's setting: signed, one scale per tensor, taken from the tensor at hand.

        Ours clamps to n bits and takes the maximum per sample (the paper: no clamp, maximum over the batch).
        """
        return cls(**{"bits": bits, "signed": True, "granularity": "tensor", "qparams": "dynamic", **fields})

    def replace(self, **fields: Any) -> Method:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **fields)


@dataclass(frozen=True, kw_only=True)
class Direct(Method):
    """Uniform quantization (DQA paper, eq. 1).

    Args:
        symmetric: True: codes are multiples of one scale around zero. False: eq. 12 of the QPP paper,
            s = (b - a) / (2^n - 1), with a, b the minimum and maximum or the clip quantiles, and a zero point.
    """

    symmetric: bool = True
    name: ClassVar[str] = "direct"

    def __post_init__(self) -> None:
        super().__post_init__()
        _choice(self, "symmetric", (True, False))
        if not self.symmetric and self.scope == "batch":
            raise InvalidMethod("Direct(symmetric=False, scope='batch'): the paper's batch scale is symmetric.")

    @property
    def uses_range(self) -> bool:
        return not self.symmetric


@dataclass(frozen=True, kw_only=True)
class DQA(Method):
    """Important channels with extra bits, shifted off again and kept as shift errors (DQA paper, algorithm 1).

    Args:
        extra_bits: m; None: min(3, bits). 0 is Direct.
        ratio: share of the channels which are important, in [0, 1].
    """

    extra_bits: int | None = None
    ratio: float = 0.4
    name: ClassVar[str] = "dqa"
    has_important_channels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _number(self, "ratio", 0.0, 1.0)
        if self.extra_bits is not None:
            _integer(self, "extra_bits", 0, self.bits, f"the paper asks for m <= n, and n = bits = {self.bits}")

    @property
    def extra(self) -> int:
        """m with the default resolved."""
        return min(3, self.bits) if self.extra_bits is None else self.extra_bits

    @classmethod
    def paper(cls, bits: int = 3, **fields: Any) -> Method:
        """The DQA paper's setting (m = 3, at most n; ratio 0.4), with our clamp and per-sample scope."""
        return super().paper(bits, **{"extra_bits": min(3, bits), "ratio": 0.4, **fields})


@dataclass(frozen=True, kw_only=True)
class NoisyQuant(Method):
    """A fixed noisy bias, added before quantization and removed after it (NoisyQuant, CVPR 2023).

    Args:
        seed: combined with the site's name to draw the noise, one value per channel.
        amplitude: of the noise, in units of the scale; None searches 0 to 2 in 1000ths.
        mean: of the noise, in units of the scale; None searches -1 to 1 in 200ths.
        objective: what the searches minimise, "activation": the error of the tensor; "output": the error of the
            output of the next linear layer (FX and PT2E).
        noise: the draw, "uniform": U(-1, 1); "gaussian": the authors' script (2 z - 1 with z normal).
        full_range: True: scale = clip / 2^(n-1); False: clip / (2^(n-1) - 1), the authors' script.
        clip_steps: resolution of the clip search when clip="mse".
    """

    seed: int = 0
    amplitude: float | None = None
    mean: float | None = 0.0
    objective: str = "activation"
    noise: str = "uniform"
    full_range: bool = True
    clip_steps: int = 100
    name: ClassVar[str] = "noisyquant"

    def __post_init__(self) -> None:
        super().__post_init__()
        _integer(self, "seed", 0, 2**63 - 1, "the seed of the noise")
        if self.amplitude is not None:
            _number(self, "amplitude", 0.0, 1e6)
        if self.mean is not None:
            _number(self, "mean", -1e6, 1e6)
        _choice(self, "objective", ("activation", "output"))
        _choice(self, "noise", ("uniform", "gaussian"))
        _choice(self, "full_range", (True, False))
        _integer(self, "clip_steps", 2, 100_000, "steps of the clip search")
        if not self.full_range and self.signed is not True:
            raise InvalidMethod("NoisyQuant(full_range=False) is the authors' signed scale: give signed=True.")

    @property
    def needs_next_layer(self) -> bool:
        return self.objective == "output"

    @classmethod
    def official(cls, bits: int = 6, **fields: Any) -> NoisyQuant:
        """What the authors' script computes (github.com/kriskrisliu/NoisyQuant, fast_quant.py), uniform draw."""
        script: dict[str, Any] = {
            "bits": bits,
            "signed": True,
            "clip": "mse",
            "clip_steps": 1000,
            "mean": None,
            "amplitude": None,
            "objective": "output",
            "full_range": False,
        }
        return cls(**{**script, **fields})


@dataclass(frozen=True, kw_only=True)
class DenseSparse(Method):
    """Outliers beyond two thresholds stay in float, the rest is quantized (QPP paper, eq. 11 and 12).

    Args:
        density: target share of the values outside the thresholds, over all elements of a sample.
    """

    density: float = 0.01
    name: ClassVar[str] = "dense_sparse"

    def __post_init__(self) -> None:
        super().__post_init__()
        _number(self, "density", 0.0, 0.5)
        if self.clip != "max":
            raise InvalidMethod(
                f"DenseSparse(clip={self.clip!r}): its thresholds are the quantiles which density names; "
                "leave clip at 'max' and set density."
            )
        if self.scope == "batch":
            raise InvalidMethod("DenseSparse(scope='batch'): its thresholds are per sample; use Direct or DQA.")

    @property
    def reduction(self) -> str:
        return self.reduce or "mean"

    @property
    def uses_range(self) -> bool:
        return True

    @classmethod
    def paper(cls, bits: int = 4, **fields: Any) -> Method:
        """The QPP paper's dynamic Dense+Sparse: 1% outliers, thresholds from the tensor at hand."""
        return cls(**{"bits": bits, "density": 0.01, "qparams": "dynamic", **fields})


def _predicted(method: str, fields: dict[str, Any]) -> QPP:
    known = {f.name for f in dataclasses.fields(QPP)}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise InvalidMethod(f"{method}: qparams has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}.")
    return QPP(**fields)


METHODS: dict[str, type[Method]] = {m.name: m for m in (Direct, DQA, NoisyQuant, DenseSparse)}


def check_method(method: Any, where: str = "") -> Method:
    """Return `method` if it is one, else raise.

    Raises:
        NotAMethod: it is a class, a string, or anything else.
    """
    if isinstance(method, Method) and type(method) is not Method:
        return method
    names = ", ".join(f"{m.__name__}(...)" for m in METHODS.values())
    if isinstance(method, type) and issubclass(method, Method):
        hint = f"got the class {method.__name__}; did you mean {method.__name__}()?"
    else:
        hint = f"got {method!r} of type {type(method).__name__}."
    raise NotAMethod(f"{where + ': ' if where else ''}a method is one of {names}; {hint}")


def method_to_dict(method: Method) -> dict[str, Any]:
    """The method as JSON-compatible values; `method_from_dict` is the inverse."""
    fields = {f.name: getattr(check_method(method), f.name) for f in dataclasses.fields(method)}
    if isinstance(method.qparams, QPP):
        fields["qparams"] = method.qparams.to_dict()
    return {"method": method.name, **fields}


def method_from_dict(fields: dict[str, Any]) -> Method:
    """Build a method from what `method_to_dict` returned.

    Raises:
        NotAMethod: unknown method name.
        InvalidMethod: unknown field or bad value.
    """
    fields = dict(fields)
    name = fields.pop("method", None)
    if name not in METHODS:
        raise NotAMethod(f"unknown method {name!r}; known: {', '.join(METHODS)}.")
    known = {f.name for f in dataclasses.fields(METHODS[name])}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise InvalidMethod(f"method {name!r} has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}.")
    return METHODS[name](**fields)
