"""The predictor of one quantizer: its calibration rows, then its regression."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from dqa_plugins.errors import DQAWarning, StateMismatch
from dqa_plugins.grid import QParams
from dqa_plugins.kernels import eager
from dqa_plugins.method import Method
from dqa_plugins.ranges import lay_out, qparams_of, resolved, valid
from dqa_plugins.rounding import compute_dtype
from dqa_plugins.source import Site
from dqa_plugins.state import StateModule

from .features import (
    PAPER_FEATURES,
    SCALE,
    SLOPES,
    SUMMARY_FEATURES,
    OwnStatistic,
    Summary,
    site_features,
    site_size,
    sum_of,
)
from .radial import radial
from .record import SampleRecord
from .session import Session, current, not_run

_READ = ("weight", "bias", "logarithmic", "low", "high", "rate", "centres", "bumps")
_arrays: WeakKeyDictionary[nn.Module, tuple[Any, Any]] = (
    WeakKeyDictionary()
)  # beside predictors, so that no copy has them
_REGRESSION = ("weight", "bias", "logarithmic", "low", "high", "static")  # all of them, or none: not fitted


class Predictor(StateModule):
    """Regression from features and summaries to the statistic behind a quantizer's qparams: a `QParamsSource`.

    Buffers once fitted (K features, S statistics, G groups), float64:
        weight: (K, S * G), bias: (S * G,).
        logarithmic: (S * G,) bool, where the logarithm is what is linear; elsewhere the extended mode predicts in
            units of the site's 0.99 quantile.
        low, high: (S * G,), every prediction is moved inside.
        static: (S * G,), what static parameters would have been made of.
        rate, centres, bumps: (F,), (R, F), (R, S * G): radial basis functions of the site's features and their
            weights, see `radial`; R = 0 in the paper's mode, and where calibration samples are few.

    Attributes:
        site: name of the tensor whose features it reads; "" if none comes before: then the prediction is the static
            statistic; None if nobody connected it: then it reads its own tensor.
        history: quantizers whose summaries it reads, oldest first.
        reason: why it fell back to the static statistic; "" if it predicts.
    """

    weight: Tensor
    bias: Tensor
    logarithmic: Tensor
    low: Tensor
    high: Tensor
    static: Tensor
    rate: Tensor
    centres: Tensor
    bumps: Tensor

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.mode = method.prediction.mode
        self.record = SampleRecord()
        self.summary, self.own = Summary(1), OwnStatistic(method, 1)
        self.site: str | None = None
        self.reason = ""
        self.history: tuple[str, ...] = ()
        self.groups = 0
        self.other_rows = False  # calibration saw a tensor with another first dimension than its site's
        for name in ("weight", "bias", "low", "high", "static"):
            self.register_buffer(name, torch.empty(0, dtype=torch.float64))
        for name in ("rate", "centres", "bumps"):
            self.register_buffer(name, torch.empty((0,) * (1 + (name != "rate")), dtype=torch.float64))
        self.register_buffer("logarithmic", torch.empty(0, dtype=torch.bool))

    @property
    def fitted(self) -> bool:
        """True once it predicts (or holds the static statistic it fell back to)."""
        return self.bias.numel() > 0

    def connect(self, site: str, history: tuple[str, ...]) -> None:
        """Set what it reads, see the attributes."""
        self.site, self.history = site, history

    def reads_itself(self, name: str) -> bool:
        """True at a site of the extended mode: its statistic is taken with its features."""
        return self.mode == "extended" and self.site in (name, None)

    def forward(self, features: Tensor, *summaries: Tensor) -> Tensor:
        """Predict.

        Args:
            features: (B, F) float64 of the site.
            summaries: of each quantizer in `history`, see `features.Summary`; the last one gives its channels too.

        Returns:
            (B, S, G) float32, extents as `ranges.extents` gives them.
        """
        earlier = [summary[:, :SUMMARY_FEATURES] for summary in summaries[:-1]]
        known = torch.cat([features, *earlier, *summaries[-1:]], 1) if summaries else features
        if eager.usable(known, (torch.float64,)):
            return _by_kernel(self, known)
        # a sum, not a matrix product: its rounding would depend on the batch size
        linear = sum_of(known.unsqueeze(1) * self.weight.t()) + self.bias
        if self.centres.shape[0]:
            near = radial(features, self.rate, self.centres)
            linear = linear + sum_of(near.unsqueeze(1) * self.bumps.t())
        value = linear
        if self.mode == "extended":
            scale = features[:, SCALE : SCALE + 1].exp()
            value = torch.where(self.logarithmic, linear.clamp(-80.0, 80.0).exp(), linear * scale)
        value = torch.minimum(torch.maximum(value, self.low), self.high)
        return value.unflatten(1, (-1, self.groups)).float()

    def extents(self, site: Site, x: Tensor, prediction: Tensor | None) -> Tensor:
        """See `QParamsSource`; without a prediction, made from what the running session holds."""
        return (self.predict(site, x) if prediction is None else prediction).to(compute_dtype(x.dtype))

    def qparams(self, site: Site, x: Tensor, prediction: Tensor | None) -> QParams:
        """See `QParamsSource`; of `extents`."""
        found = self.extents(site, x, prediction).unbind(1)
        qparams = valid(qparams_of(site.method, found, site.signed, site.clip_factor))
        return qparams.map(lambda p: lay_out(p, x, site.channel_axis, per_sample=True))

    def observe(self, site: Site, x: Tensor, statistic: Tensor) -> bool:
        """See `QParamsSource`."""
        self.summary.axis = self.own.axis = site.channel_axis
        session = current() or Session(self.record.forwards + 1, self.record.next_sample)
        features = self._features(site, x, session)
        if len(features) != len(x):  # rows of another batch: nothing to learn from
            self.other_rows = True
        else:
            samples = torch.arange(session.first_sample, session.first_sample + len(x), device=x.device)
            source, axis = site.method.prediction, site.channel_axis
            twins = self.mode == "extended" and source.augment is not False
            granularity = site.method.granularity
            self.record.observe(x, samples, features, statistic, granularity, axis, session.number, twins)
        return not session.augmented

    def freeze(self, site: Site) -> None:
        """See `QParamsSource`: drops the calibration rows.

        Warns (DQAWarning): nobody called `qpp.fit`, so its parameters become static ones.
        """
        if not self.fitted:
            self.reason = "frozen without having been fitted"
            warnings.warn(
                DQAWarning(f"QPP: static parameters at {site.label}: frozen before dqa_plugins.qpp.fit(model)."),
                stacklevel=4,
            )
            self.keep_static(site)
        self.record.reset()

    def keep_static(self, site: Site) -> None:
        """Read nothing, and give the static statistic."""
        self.connect("", ())
        self.groups, self.own.signed = site.calibration.maximum.shape[1], site.signed
        self.static = static = self.static_statistic(site)
        weight = static.new_zeros(site_size(self.mode), len(static))
        self.finish(weight, static, torch.zeros_like(static, dtype=torch.bool), (static, static), None)

    def static_statistic(self, site: Site) -> Tensor:
        """(S * G,) float64, the statistic that static parameters are made of, for the resolved sign."""
        reduced = site.calibration.reduced(site.method)
        return torch.stack(resolved(site.method, reduced.unbind(0), site.signed)).flatten().double()

    def predict(self, site: Site, x: Tensor, regression: nn.Module | None = None) -> Tensor:
        """The prediction for x from what the running session holds; leaves a summary for the quantizers after.

        Args:
            site: the quantizer whose predictor this is.
            x: (B, ...).
            regression: to use in place of this module (export).
        """
        session = current() or Session()
        if self.reads_itself(site.name):
            prediction: Tensor = self.own(x)
        else:
            features = self._features(site, x, session)
            for name in self.history:
                if name not in session.summaries:
                    raise not_run(site.label, name)
            prediction = (regression or self)(features, *(session.summaries[name] for name in self.history))
        if self.mode == "extended":
            session.summaries[site.name] = self.summary(x, prediction)
        return prediction

    def _features(self, site: Site, x: Tensor, session: Session) -> Tensor:
        if self.site == "":
            return torch.zeros((x.shape[0], site_size(self.mode)), dtype=torch.float64, device=x.device)
        if self.site in (site.name, None):
            return site_features(x, self.mode)
        return session.read(str(self.site), self.mode, site.label)

    def finish(
        self,
        weight: Tensor,
        bias: Tensor,
        logarithmic: Tensor,
        limits: tuple[Tensor, Tensor],
        bumps: tuple[Tensor, Tensor, Tensor] | None,
    ) -> None:
        """Set the regression; its arguments are the buffers of these names (bumps: rate, centres, bumps)."""
        self.weight, self.bias, self.logarithmic = weight, bias, logarithmic
        self.low, self.high = limits
        if bumps is not None:
            self.rate, self.centres, self.bumps = bumps

    # ------------------------------------------------------------ state, inside the quantizer's extra state

    def describe(self) -> dict[str, Any]:
        """What is not a buffer, JSON-compatible."""
        return {
            "site": self.site,
            "history": list(self.history),
            "groups": self.groups,
            "axis": self.summary.axis,
            "signed": self.own.signed,
            "reason": self.reason,
        }

    def shapes(self) -> dict[str, tuple[str, ...]]:
        """See `StateModule.shapes`."""
        return {
            **dict.fromkeys(("bias", "logarithmic", "low", "high", "static"), ("P",)),
            "weight": ("K P",),
            "rate": ("F",),
            "centres": ("R F",),
            "bumps": ("R P",),
        }

    def check_loaded(self, loaded: Mapping[str, Any], sizes: dict[str, int], label: str) -> None:
        """See `StateModule.check_loaded`; with the rows of calibration."""
        super().check_loaded(loaded, {**sizes, "F": site_size(self.mode)}, label)
        filled = {name for name in _REGRESSION if isinstance(loaded.get(name), Tensor) and loaded[name].numel()}
        if 0 < len(filled) < len(_REGRESSION):
            lacking = ", ".join(name for name in _REGRESSION if name not in filled)
            raise StateMismatch(f"{label}: the regression in the state_dict has no {lacking}.")
        rows = {k.removeprefix("record."): v for k, v in loaded.items() if k.startswith("record.")}
        self.record.check_loaded(rows, {**sizes, "F": site_size(self.mode)}, label)

    def check_description(self, state: Any, label: str) -> None:
        """Refuse what `describe` does not give. Changes nothing.

        Raises:
            StateMismatch: a field is missing or of another type.
        """
        kinds: dict[str, Any] = {"groups": int, "axis": int, "signed": bool, "reason": str}
        good = isinstance(state, dict) and all(type(state.get(key)) is kind for key, kind in kinds.items())
        good = good and type(state.get("history")) is list and all(type(name) is str for name in state["history"])
        if not good or not (state.get("site", 0) is None or type(state["site"]) is str) or state["groups"] < 0:
            raise StateMismatch(f"{label}: the predictor in the state_dict is damaged: {state!r}.")

    def restore(self, state: dict[str, Any], label: str) -> None:
        """Inverse of `describe`.

        Raises:
            StateMismatch: it is not from there.
        """
        self.check_description(state, label)
        self.site, self.history, self.groups = state["site"], tuple(state["history"]), state["groups"]
        self.reason, self.own.signed = state["reason"], state["signed"]
        self.summary.axis = self.own.axis = state["axis"]


def _by_kernel(predictor: Any, known: Tensor) -> Tensor:
    """`Predictor.forward` in one loop: its sums add up in another order, which float32 does not see."""
    from dqa_plugins.kernels.predict import regress

    buffers = list(predictor._buffers.values())
    held = _arrays.get(predictor)
    if held is None or any(map(operator.is_not, held[0], buffers)):  # arrays see what is written into buffers
        held = _arrays[predictor] = buffers, [getattr(predictor, name).contiguous().numpy() for name in _READ]
    logarithms = PAPER_FEATURES + SLOPES if predictor.mode == "extended" else 0
    out = np.empty((len(known), held[1][1].size), np.float32)
    regress(known.detach().numpy(), *held[1], logarithms, SCALE if logarithms else 0, out)
    return torch.from_numpy(out.reshape(len(out), -1, predictor.groups))
