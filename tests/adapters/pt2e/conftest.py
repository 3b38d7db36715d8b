"""torchao's batch-norm patterns, exported once for all tests of a process."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def batch_norm_patterns_once() -> Iterator[None]:
    """convert_pt2e and prepare_qat_pt2e export the same hundred conv-bn patterns in every call (torchao 0.18).

    That takes 25 s and has nothing to do with the model. A pattern is known by its function, what that function closes
    over, and its example inputs.
    """
    from torchao.quantization.pt2e import qat_utils

    export = qat_utils._get_aten_graph_module_for_pattern
    found: dict[str, Any] = {}

    def once(pattern: Any, inputs: tuple[Any, ...], is_cuda: bool = False, **kwargs: Any) -> Any:
        function = pattern.fn
        cells = [
            (n, str(c.cell_contents))
            for n, c in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        ]
        shapes = [(k, tuple(x.shape), x.dtype) for k, x in [*enumerate(inputs), *sorted(kwargs.items())]]
        key = str((function.__qualname__, cells, shapes, is_cuda))
        if key not in found:
            found[key] = export(pattern, inputs, is_cuda, **kwargs)
        return copy.deepcopy(found[key])

    qat_utils._get_aten_graph_module_for_pattern = once
    yield
    qat_utils._get_aten_graph_module_for_pattern = export
