"""The worst case is known beforehand, and nothing ever exceeds it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dqa_plugins import DQA, ActivationQuantizer, DenseSparse
from dqa_plugins.errors import ChannelAxisError, ChannelMismatch
from dqa_plugins.storage import NotPackable, pack, storage_bound
from tests.storage.cases import CODINGS, DTYPES, frozen, quantizer_for


@settings(max_examples=30)
@given(frozen(), st.sampled_from(CODINGS), st.booleans())
def test_no_tensor_exceeds_the_bound(
    case: tuple[ActivationQuantizer, torch.Tensor], coding: str, hostile: bool
) -> None:
    quantizer, x = case
    pack(x, quantizer, coding)  # tables from x, then the most expensive tensor for them
    if hostile:
        x = (torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) * 100).to(x.dtype)
    packed = pack(x, quantizer, coding)
    bound = storage_bound(quantizer, tuple(x.shape), coding)
    itemsize = max(x.element_size(), 4)
    assert packed.nbytes <= bound + (itemsize - 4) * packed.outliers


def test_the_bound_is_tight_enough_to_plan_with() -> None:
    """At most 0.5% above fixed-width codes for a large tensor."""
    x = torch.rand(8, 16, 64, 64)
    quantizer = quantizer_for(DQA(bits=4, ratio=0.5), x)
    fixed = pack(x, quantizer, "none").nbytes
    assert fixed <= storage_bound(quantizer, (8, 16, 64, 64), "none") <= 1.005 * fixed
    assert storage_bound(quantizer, (8, 16, 64, 64), "shift_error") <= 1.01 * fixed


def test_bad_shapes_and_quantizers() -> None:
    x = torch.rand(2, 4, 3, 3)
    with pytest.raises(ChannelMismatch, match="4 channels"):
        storage_bound(quantizer_for(DQA(), x), (2, 5, 3, 3))
    with pytest.raises(NotPackable):
        storage_bound(ActivationQuantizer(DQA()), (2, 4, 3, 3))


@pytest.mark.parametrize("coding", CODINGS)
def test_outliers_of_every_dtype(coding: str) -> None:
    """Almost every value is kept in float: eight bytes each for float64."""
    shape = (4, 8, 16, 16)
    x = torch.randn(shape)
    quantizer = quantizer_for(DenseSparse(bits=4), x)
    for dtype in DTYPES:
        packed = pack((1000 * x).to(dtype), quantizer, coding)
        assert packed.nbytes <= storage_bound(quantizer, tuple(x.shape), coding)
        assert packed.nbytes <= storage_bound(quantizer, tuple(x.shape), coding, dtype)
    assert storage_bound(quantizer, (4, 8, 16, 16), coding, torch.float32) < storage_bound(
        quantizer, (4, 8, 16, 16), coding
    )


@pytest.mark.parametrize("shape", [(2,), (), (2, -4), (2, 4.0), ("2", 4)])
def test_what_is_no_shape_of_its_tensors(shape: tuple[int, ...]) -> None:
    quantizer = quantizer_for(DQA(channel_axis=2), torch.rand(2, 3, 4, 3))
    with pytest.raises((ChannelMismatch, ChannelAxisError), match=r"block\.relu"):
        storage_bound(quantizer, shape)
