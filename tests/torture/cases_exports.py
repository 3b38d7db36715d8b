"""A quantizer in another backend, fed the identical tensor: every value on the step that torch rounds it to."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import assume
from hypothesis import strategies as st

from dqa_plugins import Method
from dqa_plugins.export.parity import Call, quantizer_parity
from dqa_plugins.export.program import exportable
from dqa_plugins.export.runners import Target, compiled

from .material import CHARACTERS, Spec, all_methods, quantizer_of, sample_shapes, samples, seeds
from .registry import case_class


class ExportCase(NamedTuple):
    """A quantizer, what it was calibrated on, and what it is fed."""

    method: Method
    shape: tuple[int, ...]
    characters: tuple[str, str]
    seed: int
    backend: str


characters = st.sampled_from([c for c in CHARACTERS if c not in ("denormal", "huge", "tiny")])
export_cases = st.builds(
    ExportCase,
    all_methods,
    st.builds(lambda size, rest: (size, *rest), samples, sample_shapes()),
    st.tuples(characters, characters),
    seeds,
    st.sampled_from(["onnxruntime", "onnxruntime", "openvino", "torch.export"]),
)


@case_class("quantizers in other backends", export_cases, needs=("onnxruntime", "openvino"), slow=True, share=2)
def exported(case: ExportCase) -> None:
    """ONNX Runtime (optimizations on and off), OpenVINO, torch.export: no value a step off."""
    assume(case.method.scope == "sample")
    calibration = Spec(case.shape, "float32", case.characters[0], seed=case.seed).dense()
    x = Spec(case.shape, "float32", case.characters[1], seed=case.seed + 1).dense()
    quantizer = quantizer_of(case.method, calibration)
    predictor = quantizer.predictor
    call = Call(quantizer, x, quantizer(x), None if predictor is None else predictor.predict(quantizer, x))
    for variant, run in compiled(case.backend, Target(exportable(quantizer, (x,)), (x,))):
        found = quantizer_parity(variant, call, run(x)[0])
        assert found.share_off == 0, str(found)
        assert found.max_difference <= 1e-5 * float(max(x.abs().max(), call.y.abs().max(), 1)), str(found)
