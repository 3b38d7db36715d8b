"""torchao's observers: one around an ActivationQuantizer, and those of weights."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from dqa_plugins.errors import FrameworkMismatch
from dqa_plugins.host.convert import convert_site, run_switched
from dqa_plugins.method import Method
from dqa_plugins.quantizer import ActivationQuantizer

from .host import FakeQuantize, FakeQuantizeBase, MinMaxObserver


class PT2EObserver(FakeQuantizeBase):
    """Carries an ActivationQuantizer through prepare_pt2e; `convert` leaves the quantizer itself in the graph.

    It is a FakeQuantizeBase rather than an ObserverBase so that torchao's own switches work on it:
    `prepared.apply(disable_observer)`, `enable_fake_quant` and so on.

    Args:
        method: of the quantizer.
        name, index, producer_axis: of the quantizer, known when the graph is annotated.
        consumer: the geometry of the next linear layer for objective="output" (see `graph.readers`); None: unknown.
        dtype, quant_min, quant_max, qscheme, is_dynamic: what torchao passes on from the QuantizationSpec; unused.
    """

    def __init__(
        self,
        method: Method,
        name: str = "",
        index: int | None = None,
        producer_axis: int = 1,
        consumer: tuple[Any, ...] | None = None,
        dtype: torch.dtype = torch.uint8,
        **_: Any,
    ) -> None:
        super().__init__()
        self.dtype, self.is_dynamic = dtype, False  # torchao reads both from every observer
        self.quantizer = ActivationQuantizer(method, name=name, index=index, producer_axis=producer_axis)
        if method.needs_next_layer:
            self.quantizer.consumer_geometry = consumer
            self.quantizer.consumer_missing = consumer is None

    def forward(self, x: Tensor) -> Tensor:
        """Observe, or in QAT fake-quantize, x of any shape.

        In QAT the observer learns while it is in training mode and torchao's observer switch is on. The first is
        set by torchao's move_exported_model_to_eval and _to_train (see `hooks`).
        """
        observing = bool(self.observer_enabled[0] == 1) and (self.training or self.quantizer.state == "observe")
        return run_switched(self.quantizer, x, observing=observing, quantizing=bool(self.fake_quant_enabled[0] == 1))

    def calculate_qparams(self, **_: Any) -> NoReturn:
        """torchao calls `convert` instead.

        Raises:
            FrameworkMismatch: torchao is about to put a stock int8 quantizer here, in silence otherwise.
        """
        raise FrameworkMismatch(
            f"{self.quantizer.label}: int8 qparams were asked for instead of calling `convert`. Convert the model with "
            "torchao's convert_pt2e."
        )

    def convert(self, model: GraphModule, node: Node) -> None:
        """Called by torchao for each node that calls this observer: put the frozen quantizer there."""
        convert_site(self.quantizer, model, node)

    @staticmethod
    def convert_host(model: GraphModule) -> GraphModule:
        """Convert the whole model, as its user would (`storage.convert_stored` does)."""
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

        converted: GraphModule = convert_pt2e(model)
        return converted


class PT2EWeight(FakeQuantize):
    """A weight's observer; in QAT (see `hooks`) also its fake quantizer.

    torchao does not tell a Quantizer which of the two it is asked for. Weights stay float while PTQ calibrates, as in
    FX: activations are measured behind float weights.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.disable_fake_quant()


class WeightRange(MinMaxObserver):
    """Eq. 16 of the QPP paper: s = (max - min) / (2^t - 1) over the whole tensor, w~ = round(w / s) * s.

    The zero point only moves the codes into t bits; as in MinMaxObserver the range is widened to hold zero. Every
    call sees the weight of that moment: in QAT a minimum of the past must not stay.
    """

    def forward(self, x_orig: Tensor) -> Tensor:
        self.reset_min_max_vals()
        return super().forward(x_orig)
