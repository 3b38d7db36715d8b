"""allocate_bits meets its target, in place, and spends bits where the loss is sensitive."""

from __future__ import annotations

import pytest
import torch

from dqa_plugins import DQA, Direct, iter_quantizers
from dqa_plugins.errors import (
    InvalidArgument,
    NonFiniteInput,
    UncalibratedQuantizer,
    UnsupportedCombination,
)
from dqa_plugins.storage import allocate_bits, convert_stored, prepare_stored, storage_report
from tests.storage.test_pipeline import fake_quantized, network


def prepared_with(bits: int = 4, **fields: object) -> tuple[torch.fx.GraphModule, torch.Tensor]:
    model, _ = network()
    x = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    prepared = prepare_stored(model, DQA(bits=bits, **fields), x[:2])  # type: ignore[arg-type]
    with torch.no_grad():
        prepared(x)
    return prepared, x


@pytest.mark.parametrize("target", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("labels", [True, False])
def test_stored_bits_meet_the_target(target: float, labels: bool) -> None:
    prepared, x = prepared_with()
    batches = [(x, torch.arange(32) % 5)] if labels else [x]
    vectors = allocate_bits(prepared, batches, target)
    assert {name for name, _ in iter_quantizers(prepared)} == set(vectors)
    assert all(torch.equal(q.extra_bits, vectors[name]) for name, q in iter_quantizers(prepared))
    stored = convert_stored(prepared, "joint")
    report = storage_report(stored, x)
    assert 8 * report.nbytes / report.elements == pytest.approx(target, rel=0.08)
    with torch.no_grad():
        assert torch.equal(stored(x), fake_quantized(prepared)(x))


def test_statistics_are_left_alone() -> None:
    prepared, x = prepared_with()
    before = {name: q.calibration.count for name, q in iter_quantizers(prepared)}
    allocate_bits(prepared, [(x, torch.arange(32) % 5)], 2.0)
    assert {name: q.calibration.count for name, q in iter_quantizers(prepared)} == before


def test_a_channel_that_matters_more_gets_more_bits() -> None:
    """A channel that the late reader ignores gets the coarsest step; nothing else about it differs."""
    model, _ = network()
    with torch.no_grad():
        model.blocks[2].shortcut.weight[:, 3] = 0  # the stored value blocks.1.relu2 is read by this convolution alone
    x = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    prepared = prepare_stored(model, DQA(bits=4), x[:2])
    with torch.no_grad():
        prepared(x)
    vector = allocate_bits(prepared, [(x, torch.arange(32) % 5)], 2.0)["blocks.1.relu2"]
    assert vector[3] == -3
    assert vector.max() > -3


def test_bad_requests() -> None:
    prepared, x = prepared_with()
    for target in (0.0, 20, "two"):
        with pytest.raises(InvalidArgument, match="target_bits"):
            allocate_bits(prepared, [x], target)  # type: ignore[arg-type]
    model, _ = network()
    with pytest.raises(UncalibratedQuantizer):
        allocate_bits(prepare_stored(model, DQA(), x[:2]), [x])
    direct = prepare_stored(model, Direct(), x[:2])
    with pytest.raises(UnsupportedCombination, match="DQA"):
        allocate_bits(direct, [x])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_batches_with_nan_are_refused(bad: float) -> None:
    """It would spread over every channel; the vectors stay as they were."""
    prepared, x = prepared_with()
    x[3, 0, 4, 4] = bad
    before = {name: q.extra_bits.clone() for name, q in iter_quantizers(prepared)}
    with pytest.raises(NonFiniteInput, match=r"allocate_bits got a batch with \d+ values"):
        allocate_bits(prepared, [x], 2.0)
    assert all(torch.equal(q.extra_bits, before[name]) for name, q in iter_quantizers(prepared))
