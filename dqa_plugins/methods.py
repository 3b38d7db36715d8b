"""The methods: Direct, DQA, NoisyQuant and Dense+Sparse, and those that users register.

Each is a set of fields, a statistic, a search and a Grid (see `method`). They hold no state, know no framework and can
be compared, hashed, printed and written to JSON (`method_to_dict`, `method_from_dict`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from .errors import InvalidMethod, NotAMethod
from .grid import Grid, QParams
from .method import Extent, Method, check_choice, check_integer, check_number
from .options import Reduction
from .prediction import QPP
from .rounding import power_of_two
from .search import Kept, channel_errors, draw_noise, most_important, search_noise

if TYPE_CHECKING:
    from typing import Self

M = TypeVar("M", bound=type[Method])


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
        check_choice(self, "symmetric", (True, False))
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
    vectors: ClassVar[tuple[str, ...]] = ("extra_bits",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "ratio", 0.0, 1.0)
        if self.extra_bits is not None:
            check_integer(self, "extra_bits", 0, self.bits, f"the paper asks for m <= n, and n = bits = {self.bits}")

    @property
    def extra(self) -> int:
        """m with the default resolved."""
        return min(3, self.bits) if self.extra_bits is None else self.extra_bits

    def decide(self, kept: Kept) -> dict[str, Tensor]:
        """Channels with the largest quantization error are important, until a ranking says otherwise."""
        return {"extra_bits": most_important(channel_errors(kept), self.ratio, self.extra)}

    def grid(self, qparams: QParams, signed: bool, vectors: Mapping[str, Tensor]) -> Grid:
        """Step delta_n / 2^m and the range of the (n+m)-bit code, channel by channel."""
        plain = super().grid(qparams, signed, vectors)
        if "extra_bits" not in vectors:
            return plain
        extra, dtype = vectors["extra_bits"], plain.step.dtype
        width = power_of_two(extra + self.bits - int(signed), dtype)
        low = -width if signed else torch.zeros_like(width)
        return Grid(plain.step * power_of_two(-extra, dtype), low, width - 1)

    @classmethod
    def paper(cls, bits: int = 3, **fields: Any) -> Self:
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
    objective: Literal["activation", "output"] = "activation"
    noise: Literal["uniform", "gaussian"] = "uniform"
    full_range: bool = True
    clip_steps: int = 100
    name: ClassVar[str] = "noisyquant"
    vectors: ClassVar[tuple[str, ...]] = ("noise",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self, "seed", 0, 2**63 - 1, "the seed of the noise")
        if self.amplitude is not None:
            check_number(self, "amplitude", 0.0, 1e6)
        if self.mean is not None:
            check_number(self, "mean", -1e6, 1e6)
        check_choice(self, "objective", ("activation", "output"))
        check_choice(self, "noise", ("uniform", "gaussian"))
        check_choice(self, "full_range", (True, False))
        check_integer(self, "clip_steps", 2, 100_000, "steps of the clip search")
        if not self.full_range and self.signed is not True:
            raise InvalidMethod("NoisyQuant(full_range=False) is the authors' signed scale: give signed=True.")

    def decide(self, kept: Kept) -> dict[str, Tensor]:
        """The noise of each channel, in units of the scale."""
        unit = draw_noise(self.seed, kept.site, kept.channels, self.noise)
        return {"noise": search_noise(kept, unit, self.mean, self.amplitude)}

    def grid(self, qparams: QParams, signed: bool, vectors: Mapping[str, Tensor]) -> Grid:
        """Direct with the noise N = noise * scale as bias (eq. 4)."""
        plain = super().grid(qparams, signed, vectors)
        if "noise" not in vectors:
            return plain
        return dataclasses.replace(plain, bias=vectors["noise"].to(plain.step.dtype) * plain.step)

    def steps(self, signed: bool) -> int:
        """2^(n-1) - 1 in the authors' script."""
        return super().steps(signed) if self.full_range else int(2 ** (self.bits - 1) - 1)

    @property
    def needs_next_layer(self) -> bool:
        return self.objective == "output"

    @property
    def clip_resolution(self) -> int:
        return self.clip_steps

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
        check_number(self, "density", 0.0, 0.5)
        if self.clip != "max":
            raise InvalidMethod(
                f"DenseSparse(clip={self.clip!r}): its thresholds are the quantiles which density names; "
                "leave clip at 'max' and set density."
            )
        if self.scope == "batch":
            raise InvalidMethod("DenseSparse(scope='batch'): its thresholds are per sample; use Direct or DQA.")

    def statistic(self, signed: bool | None) -> tuple[Extent, ...]:
        """The quantiles that leave `density` outside: half of it on each side, or all of it above."""
        sides = (Extent("lower", self.density / 2), Extent("upper", 1 - self.density / 2))
        above = Extent("upper", 1 - self.density)
        return sides if signed else (above,) if signed is False else (*sides, above)

    @property
    def keeps_outliers(self) -> bool:
        return True

    @property
    def target_density(self) -> float:
        return self.density

    @property
    def reduction(self) -> Reduction:
        return self.reduce or "mean"

    @property
    def uses_range(self) -> bool:
        return True

    @classmethod
    def paper(cls, bits: int = 4, **fields: Any) -> Self:
        """The QPP paper's dynamic Dense+Sparse: 1% outliers, thresholds from the tensor at hand."""
        return cls(**{"bits": bits, "density": 0.01, "qparams": "dynamic", **fields})


METHODS: dict[str, type[Method]] = {m.name: m for m in (Direct, DQA, NoisyQuant, DenseSparse)}


def register_method(kind: M) -> M:
    """Put a method of one's own into every adapter, config, export and state_dict; usable as a decorator.

    Args:
        kind: a frozen dataclass derived from Method, with a `name` of its own and defaults for all fields.

    Raises:
        NotAMethod: it is no such class.
        InvalidMethod: the name is taken, or the grid of a scale is not proportional to it.
    """
    if not (isinstance(kind, type) and issubclass(kind, Method) and "name" in kind.__dict__):
        raise NotAMethod(f"register_method takes a class derived from Method with a name of its own, got {kind!r}.")
    if kind.name in METHODS:
        raise InvalidMethod(f"a method called {kind.name!r} is registered already: {METHODS[kind.name].__name__}.")
    method = kind()
    if not method.uses_range:
        one, three = (method.grid(QParams(torch.tensor(scale)), True, {}) for scale in (1.0, 3.0))
        ends = [torch.stack([torch.as_tensor(grid.low), torch.as_tensor(grid.high)]) for grid in (one, three)]
        if not torch.equal(*ends) or not torch.equal(one.step * 3, three.step):
            raise InvalidMethod(
                f"{kind.__name__}.grid: with three times the scale its step must be three times as wide, its codes the "
                "same; give it thresholds (uses_range) where that is not so."
            )
    METHODS[kind.name] = kind
    return kind


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


def method_from_dict(fields: Mapping[str, Any]) -> Method:
    """Build a method from what `method_to_dict` returned.

    Raises:
        NotAMethod: unknown method name.
        InvalidMethod: unknown field or bad value.
    """
    if not isinstance(fields, Mapping):
        raise NotAMethod(f"a method is saved as a dict of its fields, got {fields!r} of type {type(fields).__name__}.")
    fields = dict(fields)
    name = fields.pop("method", None)
    if not isinstance(name, str) or name not in METHODS:
        raise NotAMethod(f"unknown method {name!r}; known: {', '.join(METHODS)}.")
    known = {f.name for f in dataclasses.fields(METHODS[name])}
    unknown = sorted(map(str, set(fields) - known))
    if unknown:
        raise InvalidMethod(f"method {name!r} has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}.")
    return METHODS[name](**fields)
