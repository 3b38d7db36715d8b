"""Everything this room takes from torchao, in one place, with the error for a missing or a changed torchao.

Observers must derive from the bases of torchao.quantization.pt2e: those of torch.ao stay in the graph as no-ops, in
silence (torchao 0.18).
"""

from __future__ import annotations

import sys

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
_X86 = "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer"


def annotation_class() -> type[QuantizationAnnotation]:
    """The class of our annotations.

    X86InductorQuantizer asserts that the annotations of its neighbours are of its own class (torchao 0.18): where it is
    loaded, ours are.
    """
    return getattr(sys.modules.get(_X86), "_X86InductorQuantizationAnnotation", QuantizationAnnotation)


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
    "annotation_class",
    "torchao",
]
