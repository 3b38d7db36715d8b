"""A frozen quantizer under torch.compile and torch.export computes the same bits."""

from __future__ import annotations

import pytest
import torch

from dqa_plugins import DQA, DenseSparse, Direct, NoisyQuant
from tests.compare import assert_exact, calibrated

METHODS = [Direct(bits=3), Direct(bits=3, symmetric=False), DQA(bits=3), NoisyQuant(bits=3), DenseSparse(bits=3)]
METHODS += [m.replace(qparams="dynamic") for m in METHODS]
METHODS += [DQA(granularity="channel"), Direct(qparams="dynamic", clip=0.99), Direct.paper(bits=4, scope="batch")]
every_method = pytest.mark.parametrize(
    "method", METHODS, ids=lambda m: f"{type(m).__name__}-{m.qparams}-{m.granularity}"
)


def data(seed: int, batch: int = 4) -> torch.Tensor:
    """Behind a ReLU for even seeds: zeros, ties and outliers."""
    x = torch.randn(batch, 6, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2
    return torch.where(
        torch.rand(x.shape, generator=torch.Generator().manual_seed(seed + 100)) < 0.3, torch.round(x * 4) / 8, x
    )


@every_method
def test_exported_programs_are_exact(method):
    """torch.export with a dynamic batch; run at another batch size."""
    q = calibrated(method, [data(0)]).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(q, (data(1),), dynamic_shapes=({0: batch},)).module()
    for size in (4, 1, 7):
        assert_exact(program(data(2, size)), q(data(2, size)), f"batch of {size}")


@every_method
def test_graph_capture_has_no_break(method):
    """fullgraph=True with the eager backend: dynamo sees the whole quantizer."""
    q = calibrated(method, [data(0)])
    torch._dynamo.reset()
    compiled = torch.compile(q, fullgraph=True, backend="eager")
    assert_exact(compiled(data(1)), q(data(1)))


@pytest.mark.slow
@every_method
def test_compiled_kernels_are_exact(method):
    """Inductor's fused C++ kernels, also for half precision and with gradients."""
    q = calibrated(method, [data(0)])
    torch._dynamo.reset()
    compiled = torch.compile(q, fullgraph=True)
    for x in (data(1), data(3).half()):
        assert_exact(compiled(x), q(x), str(x.dtype))
