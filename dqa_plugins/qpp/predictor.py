"""The predictor of one quantizer: its calibration rows, then its regression."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dqa_plugins.calibration import StateModule
from dqa_plugins.errors import UncalibratedQuantizer
from dqa_plugins.methods import Method

from .bus import Bus
from .features import NOTE_FEATURES, SCALE, Note, Own, site_features, site_size, sum_of
from .radial import radial
from .record import SampleRecord

if TYPE_CHECKING:
    from dqa_plugins.quantizer import ActivationQuantizer


class Predictor(StateModule):
    """Regression from features and notes to the statistic behind a quantizer's qparams.

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
            statistic.
        history: quantizers whose notes it reads, oldest first.
        bus: shared by the quantizers of the model.
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
        self.note, self.own = Note(1), Own(method, 1)
        self.site, self.reason = "", ""
        self.history: tuple[str, ...] = ()
        self.bus: Bus | None = None
        self.groups = 0
        for name in ("weight", "bias", "low", "high", "static"):
            self.register_buffer(name, torch.empty(0, dtype=torch.float64))
        for name in ("rate", "centres", "bumps"):
            self.register_buffer(name, torch.empty((0,) * (1 + (name != "rate")), dtype=torch.float64))
        self.register_buffer("logarithmic", torch.empty(0, dtype=torch.bool))

    @property
    def fitted(self) -> bool:
        """True once it predicts (or holds the static statistic it fell back to)."""
        return self.bias.numel() > 0

    def reads_itself(self, quantizer: ActivationQuantizer) -> bool:
        """True at a site of the extended mode: its statistic is taken with its features."""
        return self.mode == "extended" and self.site == quantizer.name

    def forward(self, features: Tensor, *notes: Tensor) -> Tensor:
        """Predict.

        Args:
            features: (B, F) float64 of the site.
            notes: of each quantizer in `history`, see `features.Note`; the last one gives its channels too.

        Returns:
            (B, S, G) float32, extents as `statistics.extents` gives them.
        """
        known = torch.cat([features, *(note[:, :NOTE_FEATURES] for note in notes[:-1]), *notes[-1:]], 1)
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

    def observe(self, quantizer: ActivationQuantizer, x: Tensor, statistic: Tensor) -> None:
        """Record a calibration batch, x (B, ...) with its statistic (B, S, G)."""
        bus = self.bus
        if bus is None:
            raise TypeError("not connected")
        features = bus.read(self.site, self.mode, quantizer.label) if self.site else self._nothing(x)
        if len(features) != len(x):  # rows of another batch: nothing to learn from
            return
        samples = torch.arange(bus.first_sample, bus.first_sample + len(x), device=x.device)
        self.record.observe(
            x, samples, features.double(), statistic, quantizer.method.granularity, quantizer.channel_axis, bus.step
        )

    def predict(self, quantizer: ActivationQuantizer, x: Tensor, regression: nn.Module | None = None) -> Tensor:
        """The prediction for x from what the bus knows; leaves a note for the quantizers after.

        Args:
            quantizer: whose predictor this is.
            x: (B, ...).
            regression: to use in place of this module (export).
        """
        bus = self.bus
        if bus is None:
            raise UncalibratedQuantizer(f"{quantizer.label} is not connected to the quantizers of its model.")
        if self.reads_itself(quantizer):
            prediction: Tensor = self.own(x)
            bus.notes[quantizer.name] = self.note(x, prediction)
            return prediction
        if self.site == quantizer.name:
            features = site_features(x, self.mode)
        else:
            features = bus.read(self.site, self.mode, quantizer.label) if self.site else self._nothing(x)
        missing = [name for name in self.history if name not in bus.notes]
        if missing:
            raise UncalibratedQuantizer(
                f"{quantizer.label} reads what '{missing[0]}' showed, which has not run in this forward. Run the whole "
                "model; after load_state_dict into a freshly built one call dqa_plugins.qpp.link(model)."
            )
        prediction = (regression or self)(features, *(bus.notes[name] for name in self.history))
        if self.mode == "extended":
            bus.notes[quantizer.name] = self.note(x, prediction)
        return prediction

    def _nothing(self, x: Tensor) -> Tensor:
        return torch.zeros((x.shape[0], site_size(self.mode)), dtype=torch.float64, device=x.device)

    def start(self, quantizer: ActivationQuantizer, x: Tensor) -> None:
        """Fix what a calibration tensor told: the channel axis, and its own site if nobody connected it."""
        self.note.axis = self.own.axis = quantizer.channel_axis
        if self.bus is None:
            from .bus import connect

            bus = connect([quantizer], inputs=0)
            if bus is not None:
                bus.alone = True
        if self.bus is not None and self.bus.alone:
            self.bus.begin((x,))

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

    def forget(self) -> None:
        """Drop the calibration rows."""
        self.record.reset()

    # ------------------------------------------------------------ state, inside the quantizer's extra state

    def describe(self) -> dict[str, Any]:
        """What is not a buffer, JSON-compatible."""
        return {
            "site": self.site,
            "history": list(self.history),
            "groups": self.groups,
            "axis": self.note.axis,
            "signed": self.own.signed,
            "reason": self.reason,
            "bus": None if self.bus is None else self.bus.name,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Inverse of `describe`; a quantizer that has a bus keeps it."""
        self.site, self.history = str(state["site"]), tuple(state["history"])
        self.groups, self.reason, self.own.signed = int(state["groups"]), str(state["reason"]), bool(state["signed"])
        self.note.axis = self.own.axis = int(state["axis"])
        if self.bus is None and state["bus"] is not None:
            self.bus = Bus.named(state["bus"])
