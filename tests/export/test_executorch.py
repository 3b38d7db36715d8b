"""ExecuTorch: every method and source computes the same numbers there, and 8-bit networks in integers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from dqa_plugins import DQA, DenseSparse, Direct, NoisyQuant
from dqa_plugins.errors import InvalidArgument, UncalibratedQuantizer
from dqa_plugins.export import compare_backends, to_executorch
from dqa_plugins.export.executorch import executorch_method
from dqa_plugins.quantizer import ActivationQuantizer
from tests.export.test_parity import frozen
from tests.export.test_qdq import converted, data

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("executorch") is None, reason="executorch is not installed"),
]
METHODS = [Direct(bits=4), DQA(bits=3), NoisyQuant(bits=4, amplitude=0.4), DenseSparse(bits=3, density=0.05)]


@pytest.mark.parametrize("backend", ["xnnpack", "portable"])
@pytest.mark.parametrize("source", ["static", "dynamic"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_single_quantizer_has_its_numbers(method: Any, source: str, backend: str, tmp_path: Path) -> None:
    quantizer, x = frozen(method.replace(qparams=source))
    run = executorch_method(to_executorch(quantizer, x, tmp_path / "q.pte", backend=backend))
    expected = quantizer(x)
    for _ in range(2):  # its memory is used again
        assert float((run(x)[0] - expected).abs().max()) <= min(1e-5, float(expected.unique().diff().min()) / 2 + 1e-5)


def test_8_bits_per_tensor_run_in_integers(tmp_path: Path) -> None:
    model = converted(Direct(bits=8))
    path = to_executorch(model, data(), tmp_path / "m.pte", form="qdq")
    assert set(path.sites.values()) == {"int8"}
    assert set(path.weights.values()) == {"int8"}
    whole = to_executorch(model, data(), tmp_path / "f.pte")
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert whole.stat().st_size - path.stat().st_size > 2.5 * weights
    with torch.no_grad():
        expected = model(data())
    step = expected.unique().diff().min()
    difference = (executorch_method(path)(data())[0] - expected).abs() / step
    assert float((difference > 0.5).double().mean()) < 0.05
    assert float(difference.max()) < 2.5


def test_what_xnnpack_has_not_stays_float(tmp_path: Path) -> None:
    path = to_executorch(converted(DQA(bits=4)), data(), tmp_path / "m.pte", form="qdq")
    assert set(path.sites.values()) == {"float"}
    assert set(path.weights.values()) == {"float32"}


def test_compare_backends_runs_it() -> None:
    (found,) = compare_backends(converted(DQA(bits=4)), data(), ("executorch",))
    assert len(found.quantizers) == 4
    assert found.max_difference <= 1e-5, str(found)
    assert found.network.only_ties, str(found)


def test_what_cannot_be_written_says_so(tmp_path: Path) -> None:
    quantizer, x = frozen(Direct())
    for wrong in ({"backend": "coreml"}, {"backend": "portable", "form": "qdq"}, {"form": "int"}):
        with pytest.raises(InvalidArgument, match="one of"):
            to_executorch(quantizer, x, tmp_path / "q.pte", **wrong)  # type: ignore[arg-type]
    with pytest.raises(UncalibratedQuantizer):
        to_executorch(ActivationQuantizer(DQA(), name="relu"), x, tmp_path / "q.pte")
    assert not list(tmp_path.iterdir())
