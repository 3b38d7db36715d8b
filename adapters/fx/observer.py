"""FX's observer around an ActivationQuantizer."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.ao.quantization import FakeQuantizeBase
from torch.fx import GraphModule, Node

from dqa_plugins.errors import FrameworkMismatch
from dqa_plugins.host.convert import convert_site, run_switched
from dqa_plugins.method import Method
from dqa_plugins.quantizer import ActivationQuantizer


class FXObserver(FakeQuantizeBase):
    """Carries an ActivationQuantizer through prepare_fx; `convert` leaves the quantizer itself in the graph.

    It claims to be a quint8 observer, because FX places observers only for dtypes that the native backend lists.
    The numerics are those of the quantizer; the eight bits are never used. It is a FakeQuantizeBase so that torch.ao's
    own switches work on it: `prepared.apply(disable_observer)`, `enable_fake_quant` and so on.

    Args:
        method: of the quantizer.
    """

    def __init__(self, method: Method, **_: Any) -> None:
        super().__init__()
        self.quantizer = ActivationQuantizer(method)
        self.by_name = False  # placed because its site was named: no node around it has a QConfig
        # FX and its backend checks read these; they describe the claimed quint8
        self.dtype, self.is_dynamic = torch.quint8, False
        self.qscheme = torch.per_tensor_affine
        self.quant_min, self.quant_max, self.eps = 0, 255, 2**-12

    def forward(self, x: Tensor) -> Tensor:
        """Observe, or in QAT fake-quantize, x of any shape."""
        observing = bool(self.observer_enabled[0] == 1) and (self.training or self.quantizer.state == "observe")
        return run_switched(self.quantizer, x, observing=observing, quantizing=bool(self.fake_quant_enabled[0] == 1))

    @property
    def activation_post_process(self) -> FXObserver:
        """Itself: FX asks a fake quantizer for the observer in it, to check the claimed quint8."""
        return self

    def calculate_qparams(self, **_: Any) -> NoReturn:
        """Never called while the convert hook is in place.

        Raises:
            FrameworkMismatch: FX is about to put a stock int8 quantizer here, in silence otherwise.
        """
        raise FrameworkMismatch(
            f"{self.quantizer.label}: FX asked for int8 qparams instead of calling `convert`, so the hook on "
            "torch.ao.quantization.fx.convert is gone. Import dqa_plugins.adapters.fx before convert_fx, and do not "
            "reload torch.ao."
        )

    def convert(self, model: GraphModule, node: Node) -> None:
        """Called by FX for each node that calls this observer: put the frozen quantizer there."""
        convert_site(self.quantizer, model, node)

    @staticmethod
    def convert_host(model: GraphModule) -> GraphModule:
        """Convert the whole model, as its user would (`storage.convert_stored` does)."""
        from torch.ao.quantization.quantize_fx import convert_fx

        converted: GraphModule = convert_fx(model)
        return converted
