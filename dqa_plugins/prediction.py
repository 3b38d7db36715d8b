"""QPP(...): the `qparams` of a method whose parameters are predicted from the network's input."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, get_args

from .errors import InvalidMethod
from .options import PredictionMode


@dataclass(frozen=True, kw_only=True)
class QPP:
    """Quantization parameters predicted per sample by regression (QPP, CVPR 2021, sections 3 and 6).

    Fitted from calibration alone; a quantizer that too few or degenerate samples reached keeps its static parameters
    and a warning names it.

    Args:
        mode: "paper": least squares on the 0.9, 0.99, 0.999 quantile, mean and maximum of the site's tensor (eq. 15).
            "extended" (ours): log-space ridge on those, and on what the previous three quantized tensors showed: the
            logs of their outlier counts and of their mean magnitudes. Where leave-one-out gains by it, radial basis
            functions of the site's features are added.
        sites: tensors that features are taken of: "input" (or "input.<k>"), names of quantized sites, or of modules
            that contain some (the last one inside counts). Each quantizer reads the nearest site before it. None: the
            first quantized tensor, which is the network's input where the first layer is quantized, else usually the
            output of the first ReLU.
        intercept: mode="paper": fit one (eq. 15 has none). The extended mode always does.
        augment: mode="extended": True runs every calibration batch a second time with changed exposure, contrast
            and noise, half of the samples negative; False does not; a function (inputs: tuple, first_sample: int) ->
            inputs replaces the changes.
        seed: of the augmentation.

    Raises:
        InvalidMethod: a field has a value that it cannot have.
    """

    mode: PredictionMode = "extended"
    sites: tuple[str, ...] | None = None
    intercept: bool = False
    augment: bool | str | Callable[..., Any] = field(default=True, compare=False)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in get_args(PredictionMode):
            raise InvalidMethod(
                f"QPP(mode={self.mode!r}): mode must be one of {', '.join(map(repr, get_args(PredictionMode)))}."
            )
        if isinstance(self.sites, list):
            object.__setattr__(self, "sites", tuple(self.sites))
        named = isinstance(self.sites, tuple) and self.sites and all(isinstance(s, str) and s for s in self.sites)
        if self.sites is not None and not named:
            raise InvalidMethod(f"QPP(sites={self.sites!r}): sites is a tuple of names, like ('input', 'layer2').")
        if not isinstance(self.intercept, bool):
            raise InvalidMethod(f"QPP(intercept={self.intercept!r}): intercept must be True or False.")
        if not (isinstance(self.augment, bool) or callable(self.augment) or self.augment == "custom"):
            raise InvalidMethod(
                f"QPP(augment={self.augment!r}): augment is True, False or a function (inputs, first_sample) -> inputs."
            )
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise InvalidMethod(f"QPP(seed={self.seed!r}): seed must be an integer from 0.")

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible fields; a function for `augment` becomes "custom", which only calibration would miss."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["sites"] = None if self.sites is None else list(self.sites)
        fields["augment"] = self.augment if isinstance(self.augment, bool) else "custom"
        return fields


def check_qparams(value: Any, method: str) -> None:
    """Raise unless a value is a qparams source.

    Args:
        value: of the field `qparams`.
        method: class name, for the message.

    Raises:
        InvalidMethod: it is none.
    """
    if isinstance(value, QPP) or (isinstance(value, str) and value in ("static", "dynamic")):
        return
    hint = "; did you mean QPP()?" if value is QPP or value == "predicted" or value == "qpp" else ""
    raise InvalidMethod(f"{method}(qparams={value!r}): qparams must be one of 'static', 'dynamic', QPP(...){hint}.")


def qpp_from_dict(method: str, fields: dict[str, Any]) -> QPP:
    """A QPP from its fields, as JSON has them.

    Raises:
        InvalidMethod: unknown field or bad value.
    """
    known = {f.name for f in dataclasses.fields(QPP)}
    unknown = sorted(map(str, set(fields) - known))
    if unknown:
        raise InvalidMethod(f"{method}: qparams has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}.")
    return QPP(**fields)
