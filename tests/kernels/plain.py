"""The plain path beside the kernels, and equality to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar
from unittest import mock

from torch import Tensor

from dqa_plugins.kernels import eager

T = TypeVar("T")


def plain(run: Callable[[], T]) -> T:
    """What `run` gives where kernels serve nothing."""
    with mock.patch.object(eager, "usable", return_value=False):
        return run()


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal values and NaN at the same places (the sign of a zero is not looked at), dtype and order of memory."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    axes = [d for d, size in enumerate(found.shape) if size > 1]
    assert [found.stride(d) for d in axes] == [expected.stride(d) for d in axes]
    same = (found == expected) | (found.isnan() & expected.isnan())
    assert bool(same.all()), (found[~same][:5], expected[~same][:5])
