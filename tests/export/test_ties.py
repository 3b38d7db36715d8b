"""Values on a lattice of half steps, every second one an exact rounding tie: every backend rounds it as torch does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dqa_plugins import DQA, ActivationQuantizer, DenseSparse, Direct, Method, NoisyQuant
from dqa_plugins.export import compare_backends, to_openvino
from dqa_plugins.export.openvino import F32, exact_divisions, require_openvino

METHODS = [
    Direct(bits=4),
    Direct(bits=4, symmetric=False),
    DQA(bits=3, granularity="channel"),
    NoisyQuant(bits=5, amplitude=0.4),
    DenseSparse(bits=4),
    Direct(bits=4, qparams="dynamic"),  # a scale of its own behind a reduction
    Direct(bits=4, symmetric=False, qparams="dynamic"),
]


def on_the_lattice(method: Method, seed: int = 0) -> tuple[ActivationQuantizer, Tensor]:
    """A quantizer whose steps are no round numbers, and what it is to round."""
    generator = torch.Generator().manual_seed(seed)
    quantizer = ActivationQuantizer(method, name="site")
    quantizer(torch.randn(64, 6, 5, 5, generator=generator))
    x = torch.randint(-20, 21, (8, 6, 5, 5), generator=generator).float()
    if method.qparams == "dynamic":
        return quantizer.freeze(), x * torch.rand(8, 1, 1, 1, generator=generator)
    grid = quantizer.freeze().grid(x)
    return quantizer, x * grid.step / 2 - (0 if grid.bias is None else grid.bias)


def moved_by_the_reciprocal(quantizer: ActivationQuantizer, x: Tensor) -> bool:
    """Whether x * (1 / step) falls on other codes than x / step."""
    grid = quantizer.grid(x)
    y = x if grid.bias is None else x + grid.bias
    return not torch.equal(torch.round(y * (1 / grid.step)), torch.round(y / grid.step))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_no_value_is_a_step_off(method: Method) -> None:
    cases = (on_the_lattice(method, seed) for seed in range(50))
    quantizer, x = next(((q, x) for q, x in cases if moved_by_the_reciprocal(q, x)), on_the_lattice(method))
    for found in compare_backends(quantizer, x, ("onnxruntime", "openvino"), raise_errors=True):
        assert found.share_off == 0, str(found)
        assert found.max_difference <= 1e-5, str(found)


@pytest.mark.parametrize(
    ("source", "read"),
    [("static", lambda model: model), ("static", exact_divisions), ("dynamic", exact_divisions)],
    ids=["static, as it is read", "static", "dynamic"],
)
def test_files_keep_exact_divisions_by_static_steps(source: str, read: Callable[[Any], Any], tmp_path: Path) -> None:
    """What docs/support_matrix.md says of saved models."""
    method = METHODS[0].replace(qparams=source)
    cases = (on_the_lattice(method, seed) for seed in range(50))
    quantizer, x = next(((q, x) for q, x in cases if moved_by_the_reciprocal(q, x)), on_the_lattice(method))
    to_openvino(quantizer, x, tmp_path / "q.xml")
    core = require_openvino().Core()
    compiled = core.compile_model(read(core.read_model(str(tmp_path / "q.xml"))), "CPU", F32)
    off = (torch.from_numpy(compiled([x.numpy()])[0]) - quantizer(x)).abs() > 0.5 * quantizer.grid(x).step
    assert not off.any()
