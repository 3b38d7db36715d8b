"""What stays in float and why; density, fallbacks, and what a lowered model does beside computing."""

from __future__ import annotations

import copy
import os
import threading

import pytest
import torch
from torch import Tensor, nn

from dqa_plugins import DQA, DenseSparse, Direct, Method, NoisyQuant
from dqa_plugins.errors import UncalibratedQuantizer, UnsupportedCombination
from dqa_plugins.runtime import lower, lowering_report, set_engine
from tests.runtime.nets import assert_close, batches, converted, net
from tests.torture.cases_processes import forked


def pair(layer: nn.Module) -> nn.Module:
    """A layer of 8 channels behind a ReLU."""
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), layer).eval()


def images(size: int = 8) -> list[Tensor]:
    torch.manual_seed(3)
    return [torch.randn(3, 3, size, size) for _ in range(3)]


@pytest.mark.parametrize(
    ("layer", "method", "reason"),
    [
        (nn.Conv2d(8, 6, 3), DenseSparse(), ""),
        (nn.Conv2d(8, 8, 3, groups=8), Direct(granularity="channel", bits=8), ""),  # folds into the weight
        (nn.Conv2d(8, 6, 3, padding="same", dilation=2), DQA(), ""),
        (nn.Conv2d(8, 6, 3), NoisyQuant(amplitude=0.4), ""),  # folds into the bias
        (nn.Conv2d(8, 6, 3, padding=1), NoisyQuant(amplitude=0.4), "zero padding"),
        (nn.Conv2d(8, 6, 2, padding="same"), DQA(), "differs between the sides"),
        (nn.Conv2d(8, 6, 3), Direct(granularity="channel"), "granularity='channel'"),
        (nn.Conv2d(8, 6, 3), DQA(bits=6, extra_bits=3), "9 bits"),
        (nn.Conv2d(8, 6, 3), None, "no quantizer"),
        (nn.ConvTranspose2d(8, 6, 3), DenseSparse(), "conv_transpose2d"),
    ],
)
def test_reasons(layer: nn.Module, method: Method | None, reason: str) -> None:
    model = converted("fx", {"0": method, "1": method, "2": Direct(bits=8)}, pair(layer), calibration=images())
    lowered, x = lower(model, images()[0]), images()[1]
    found = next(row for row in lowering_report(lowered).layers if row.name == "2")
    assert (reason in found.reason) if reason else found.lowered, found
    assert found.name in str(lowering_report(lowered))
    with torch.no_grad():
        assert_close(lowered(x), model(x))


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d])
def test_other_ranks_stay_in_float(kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind(3, 4, 3), nn.ReLU(), kind(4, 2, 3)).eval()
    x = torch.rand(2, 3, *[9] * int(kind.__name__[4]))
    model = converted("fx", Direct(bits=8), model, calibration=[x])
    lowered = lower(model, x)
    reasons = [row.reason for row in lowering_report(lowered).layers]
    assert reasons == [f"no int8 kernel for {kind.__name__.lower()}"] * 2
    with torch.no_grad():
        assert_close(lowered(x), model(x))


def test_float_weights_and_other_models() -> None:
    lowered = lower(converted("fx", DenseSparse(), weight_bits=None), batches()[0])
    assert all("weight_bits=8" in row.reason or "no quantizer" in row.reason for row in lowering_report(lowered).layers)
    with pytest.raises(UnsupportedCombination, match=r"what dqa_plugins\.runtime\.lower returned"):
        lowering_report(net())
    from torch.ao.quantization.quantize_fx import prepare_fx

    from dqa_plugins.adapters.fx import get_qconfig_mapping

    with pytest.raises(UncalibratedQuantizer):
        lower(prepare_fx(net(), get_qconfig_mapping(DQA()), (batches()[0],)), batches()[0])


def test_too_many_outliers_and_nan_are_computed_in_float() -> None:
    model = converted("fx", DenseSparse(bits=8))
    lowered, x = lower(model, batches()[0]), batches()[1]
    with torch.no_grad():
        for bright in (x * 50, x):
            assert_close(lowered(bright), model(bright))
        spoilt = x.clone()
        spoilt[0, 0, 3, 3] = float("nan")
        assert torch.equal(lowered(spoilt).isnan(), model(spoilt).isnan())
        assert model(spoilt).isnan().any()
    report = lowering_report(lowered)
    first = report.sites[0]
    assert first.name == "input.0"
    assert first.fallbacks == 2
    assert first.calls == 1
    assert first.density == pytest.approx(0.02, abs=0.02)
    assert "2 in float" in str(report)


def test_dark_tensors_and_empty_batches() -> None:
    """An empty range, where every value but zero is kept; and no sample at all."""
    dark = pair(nn.Conv2d(8, 6, 3))
    nn.init.constant_(dark[0].bias, -2.0)  # nearly everything is below zero
    model = converted("fx", DenseSparse(qparams="dynamic", density=0.1), dark, calibration=images())
    lowered, x = lower(model, images()[0]), images()[1]
    with torch.no_grad():
        assert_close(lowered(x), model(x))
        assert lowered(x[:0]).shape == (0, 6, 6, 6)
    assert lowering_report(lowered).sites[1].calls == 1


def test_copies_and_states() -> None:
    model = converted("fx", DenseSparse(bits=8))
    lowered, x = lower(model, batches()[0]), batches()[1]
    with torch.no_grad():
        y = lowered(x)
        twin = copy.deepcopy(lowered)
        assert torch.equal(twin(x), y)
        assert lowering_report(twin).sites[0].calls == 1
        for buffer in twin.buffers():
            buffer.zero_()
        twin.load_state_dict(lowered.state_dict())
        assert torch.equal(twin(x), y)
        assert torch.equal(lowered(x), y)


def test_two_threads_compute_what_one_does() -> None:
    lowered = lower(converted("fx", DenseSparse(bits=8, qparams="dynamic")), batches()[0])
    inputs = batches(8)
    with torch.no_grad():
        expected = [lowered(x) for x in inputs]
    wrong: list[int] = []

    def work() -> None:
        with torch.no_grad():
            for _ in range(5):
                wrong.extend(i for i, x in enumerate(inputs) if not torch.equal(lowered(x), expected[i]))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert lowering_report(lowered).sites[0].calls == 8 * 11


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_computes_the_same() -> None:
    """After kernels of several threads have run: those of GNU OpenMP do not survive a fork."""
    lowered, x = lower(converted("fx", DenseSparse(bits=8)), batches()[0]), torch.randn(64, 3, 14, 14)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            expected = lowered(x).numpy().tobytes()
            assert forked(lambda: lowered(x).numpy().tobytes(), 30) == expected
    finally:
        torch.set_num_threads(threads)


def test_without_int8_instructions() -> None:
    lowered = lower(converted("fx", DenseSparse(bits=8)), batches()[0])
    x = batches()[1]
    with torch.no_grad():
        expected = lowered(x)
        set_engine("float")
        try:
            assert_close(lowered(x), expected)
        finally:
            set_engine(None)
