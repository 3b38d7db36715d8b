"""Models in half precision and in float64, with quantized weights: right in every room, or refused by name."""

from __future__ import annotations

import pytest
import torch

from dqa_plugins import Direct
from dqa_plugins.errors import UnsupportedCombination
from dqa_plugins.host.weights import quantized_weights
from tests.adapters.networks import batches, build
from tests.adapters.test_conformance import output, quantize_model, rooms

TOLERANCE = {torch.float16: 0.01, torch.bfloat16: 0.06, torch.float64: 1e-5}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def off(room: str, dtype: torch.dtype, *, converted: bool) -> float:
    """Relative difference to the quantized float32 model: quantized in a dtype, or converted to it afterwards."""
    expected = output(quantize_model(room)(build("branches"), Direct(bits=8), batches("branches")), "branches")
    model, data = build("branches"), batches("branches")
    if not converted:
        model, data = model.to(dtype), [x.to(dtype) for x in data]
    quantized = quantize_model(room)(model, Direct(bits=8), data).to(dtype)
    with torch.no_grad():
        found = quantized(batches("branches", 1, seed=9)[0].to(dtype))
    assert found.dtype == dtype
    weights = quantized_weights(quantized)
    assert {weight.dequantize().dtype for weight in weights.values()} == {dtype}, "read in another dtype"
    return float((found.double() - expected).norm() / expected.norm())


@dtypes
@rooms
def test_a_model_of_another_dtype(room: str, dtype: torch.dtype) -> None:
    if room == "pt2e" and dtype == torch.float64:
        with pytest.raises(UnsupportedCombination, match=r"left: torchao .* float64.*weight_bits=None"):
            off(room, dtype, converted=False)
        return
    assert off(room, dtype, converted=False) < TOLERANCE[dtype]


@dtypes
@rooms
def test_a_converted_model_moved_to_another_dtype(room: str, dtype: torch.dtype) -> None:
    if room == "pt2e":
        pytest.skip("a converted PT2E graph names the dtype of its weights: docs/reliability.md")
    assert off(room, dtype, converted=True) < TOLERANCE[dtype]
