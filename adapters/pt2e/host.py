"""Everything this room takes from torchao, in one place, with the error for a missing or a changed torchao.

Observers must derive from the bases of torchao.quantization.pt2e: those of torch.ao stay in the graph as no-ops, in
silence (torchao 0.18).
"""

from __future__ import annotations

from dqa_plugins.errors import FrameworkMismatch, missing

try:
    import torchao
except ImportError as error:
    raise missing("torchao", "pt2e", "dqa_plugins.adapters.pt2e") from error

TESTED = "0.18.0"

try:
    from torchao.quantization.pt2e import (
        FakeQuantize,
        FakeQuantizeBase,
        MinMaxObserver,
        MovingAveragePerChannelMinMaxObserver,
        ObserverBase,
    )
    from torchao.quantization.pt2e.quantizer import (
        QuantizationAnnotation,
        QuantizationSpec,
        Quantizer,
        SharedQuantizationSpec,
    )
except ImportError as error:
    raise FrameworkMismatch(
        f"torchao {torchao.__version__} lacks what the PT2E adapter stands on ({error}); it was tested with "
        f"{TESTED}: pip install torchao=={TESTED}."
    ) from error

ANNOTATION = "quantization_annotation"  # key in Node.meta

__all__ = [
    "ANNOTATION",
    "TESTED",
    "FakeQuantize",
    "FakeQuantizeBase",
    "MinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "ObserverBase",
    "QuantizationAnnotation",
    "QuantizationSpec",
    "Quantizer",
    "SharedQuantizationSpec",
    "torchao",
]
