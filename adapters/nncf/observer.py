"""NNCF's hook module and NNCF's statistics collector, both around an ActivationQuantizer."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from nncf.common.tensor_statistics.collectors import TensorCollector
from nncf.torch.layer_utils import StatefulModuleInterface
from nncf.torch.utils import is_tracing_state
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from dqa_plugins.errors import UncalibratedQuantizer, UnsupportedCombination
from dqa_plugins.method import Method
from dqa_plugins.methods import method_from_dict, method_to_dict
from dqa_plugins.qpp import Forwards, Session
from dqa_plugins.qpp.session import end
from dqa_plugins.quantizer import ActivationQuantizer


def quantize_activation(x: Tensor, quantizer: NNCFQuantizer) -> Tensor:
    """Run a quantizer as a single operation of NNCF's graph.

    NNCF's FunctionHookMode names and hooks every torch function that it sees; through handle_torch_function it sees
    this one, and none of those inside. NNCF does the same for its own quantizers.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(quantize_activation, (x,), x, quantizer)
    # torch.jit.trace, as in openvino.convert_model(model), refuses the autograd function of the straight-through pass
    with torch.set_grad_enabled(torch.is_grad_enabled() and not is_tracing_state()):
        return ActivationQuantizer.forward(quantizer, x)


class NNCFQuantizer(ActivationQuantizer, StatefulModuleInterface):
    """The ActivationQuantizer, as NNCF's get_config and load_from_config want it.

    Not a BaseQuantizer of NNCF: `nncf.strip` would turn those into torch's int8 FakeQuantize, or refuse them.
    """

    def __dir__(self) -> list[str]:
        """Without properties: torch.jit.trace, as in openvino.convert_model(model), reads all names; some raise."""
        return [name for name in super().__dir__() if not isinstance(getattr(type(self), name, None), property)]

    def forward(self, x: Tensor, prediction: Tensor | None = None) -> Tensor:
        """Observe or fake-quantize x, (B, ...)."""
        if prediction is not None:
            return super().forward(x, prediction)
        return quantize_activation(x, self)

    def __prepare_scriptable__(self) -> NoReturn:
        """Called by torch.jit.script.

        Raises:
            UnsupportedCombination: always; NNCF's models replace `forward` by what scripting does not take.
        """
        raise UnsupportedCombination(
            f"{self.label}: torch.jit.script takes no model of NNCF. Use torch.jit.trace, or torch.export."
        )

    def get_config(self) -> dict[str, Any]:
        """What rebuilds the module before its state_dict is loaded, as JSON-compatible values."""
        return {
            "method": method_to_dict(self.method),
            "name": self.name,
            "index": self.index,
            "producer_axis": self.producer_axis,
        }

    @classmethod
    def from_config(cls, state: dict[str, Any]) -> NNCFQuantizer:
        """Inverse of `get_config`; the result is frozen once its state_dict is loaded.

        Raises:
            NotAMethod, InvalidMethod: the config is of another version, or was changed by hand.
        """
        method: Method = method_from_dict(state["method"])
        return cls(method, name=state["name"], index=state["index"], producer_axis=state["producer_axis"])


class SiteCollector(TensorCollector):
    """Feeds a quantizer where NNCF would collect its own statistics.

    NNCF's reducers would give the mean over samples of per-tensor maxima, and channel statistics of axis 1 only.

    Args:
        quantizer: in the observe state.
        num_samples: dataset items that NNCF should run, None for all.
    """

    def __init__(self, quantizer: ActivationQuantizer, num_samples: int | None = None) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.forwards: Forwards | None = None  # QPP: of the model, where this is its first site
        self._session: Session | None = None
        self._limit = num_samples
        self._items = 0

    @property
    def num_samples(self) -> int | None:
        return self._limit

    def register_input_for_all_reducers(self, input_: Any) -> None:
        """Observe one tensor, an nncf Tensor around (B, ...)."""
        # NNCF calls this inside its function mode, which would hook every operation of the statistics
        with torch._C.DisableTorchFunction():
            if self.forwards is not None:
                self._end()
                self._session = self.forwards.start((input_.data,))
            ActivationQuantizer.forward(self.quantizer, input_.data)

    def _end(self) -> None:
        """Nobody tells a collector that a forward is over: the next one does, and freezing."""
        if self._session is not None:
            end(self._session)

    def freeze(self) -> ActivationQuantizer:
        """Freeze the quantizer.

        Raises:
            UncalibratedQuantizer: no calibration item reached the site.
        """
        self._end()
        if self.quantizer.calibration.count == 0:
            raise UncalibratedQuantizer(
                f"{self.quantizer.label}: no calibration item reached this site. Give the dataset items that run this "
                f"part of the model, or leave it float with scope_overrides: {{'activations': "
                f"{{'{self.quantizer.name}': null}}}}."
            )
        return self.quantizer.freeze()
