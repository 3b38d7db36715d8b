"""ActivationQuantizer against the whole reference: calibrate, freeze, and fake-quantize, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dqa_plugins import DQA, ActivationQuantizer, DenseSparse, Direct, DQAWarning, NoisyQuant
from tests.compare import assert_exact, assert_matches_reference, calibrated, same_bits
from tests.strategies import (
    cases,
    dense_sparse_methods,
    direct_methods,
    dqa_methods,
    methods,
    noisyquant_methods,
    sample_data,
)

# signed=False on data with negative values warns: on purpose here
ignore_negative = pytest.mark.filterwarnings("ignore::dqa_plugins.errors.DQAWarning")

STATIC = [Direct(bits=3), Direct(bits=3, symmetric=False), DQA(bits=3), NoisyQuant(bits=3), DenseSparse(bits=3)]
DYNAMIC = [method.replace(qparams="dynamic") for method in STATIC]
ids = [f"{type(m).__name__}{'' if getattr(m, 'symmetric', True) else '-asymmetric'}" for m in STATIC]
every_method = pytest.mark.parametrize(
    "method", STATIC + DYNAMIC, ids=[f"{i}-{s}" for s in ("static", "dynamic") for i in ids]
)


def in_reach(case, method) -> bool:
    """A float64 mean depends on the order of summation in its last bit: see test_calibration."""
    return not (case.x.dtype == torch.float64 and method.qparams == "static" and method.reduction == "mean")


# ---------------------------------------------------------------- exactness


@ignore_negative
@given(cases(), direct_methods())
@settings(max_examples=150)
def test_direct_is_exact(case, method):
    """Symmetric and asymmetric, static and dynamic, every clip, granularity, sign, scope, layout and dtype."""
    assume(in_reach(case, method))
    q = calibrated(method, case.batches, producer_axis=case.channel_axis)
    assert_matches_reference(q, case.batches, case.x)


@ignore_negative
@given(cases(), dqa_methods(), st.data())
@settings(max_examples=150)
def test_dqa_is_exact(case, method, data):
    """With the channels that calibration chose, and with any vector of extra bits, negative ones too."""
    assume(in_reach(case, method))
    q = calibrated(method, case.batches, producer_axis=case.channel_axis)
    assert_matches_reference(q, case.batches, case.x)
    channels = case.x.shape[case.channel_axis]
    allowed = st.lists(st.integers(1 - method.bits, method.bits), min_size=channels, max_size=channels)
    q.set_extra_bits(torch.tensor(data.draw(allowed)))
    assert_matches_reference(q, case.batches, case.x)


@ignore_negative
@given(cases(), noisyquant_methods())
@settings(max_examples=60)
def test_noisyquant_is_exact(case, method):
    assume(in_reach(case, method))
    q = calibrated(method, case.batches, producer_axis=case.channel_axis)
    assert_matches_reference(q, case.batches, case.x)


@ignore_negative
@given(cases(), dense_sparse_methods())
@settings(max_examples=100)
def test_dense_sparse_is_exact(case, method):
    assume(in_reach(case, method))
    q = calibrated(method, case.batches, producer_axis=case.channel_axis)
    assert_matches_reference(q, case.batches, case.x)


@every_method
def test_sites_with_many_values_are_exact(method):
    """Real sizes: 64 channels of 16 x 16, a ReLU's output and a signed one."""
    for relu in (False, True):
        batches = [sample_data(seed, (4, 64, 16, 16)) for seed in (1, 2)]
        batches = [b.relu() for b in batches] if relu else batches
        x = sample_data(3, (4, 64, 16, 16)) * 1.5
        q = calibrated(method, batches)
        assert q.signed is not relu
        assert_matches_reference(q, batches, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@every_method
def test_the_dtype_of_the_input_comes_back(method, dtype):
    """Arithmetic is float32 (float64 for float64) with one cast at the end: against the reference, any mix."""
    batches = [sample_data(1).to(dtype)]
    q = calibrated(method, batches)
    assert_matches_reference(q, batches, sample_data(2).to(dtype))
    assert q(sample_data(2)).dtype == torch.float32


@pytest.mark.parametrize("shape", [(5,), (1,), (4, 7), (1, 7), (2, 3, 7), (1, 3, 4, 4), (2, 3, 2, 2, 2)])
@every_method
def test_every_rank_and_a_batch_of_one(method, shape):
    batches = [sample_data(1, shape), sample_data(2, shape)]
    assert_matches_reference(calibrated(method, batches), batches, sample_data(3, shape))


@every_method
def test_memory_layout_does_not_matter(method):
    """channels_last, transposed, strided and expanded inputs give what a contiguous copy gives."""
    data = sample_data(1, (6, 4, 4, 4))
    views = [
        data.to(memory_format=torch.channels_last),
        data.transpose(2, 3),
        sample_data(2, (12, 4, 4, 4))[::2],
        sample_data(2, (6, 4, 4, 8))[..., ::2],
        sample_data(2, (6, 1, 4, 4)).expand(6, 4, 4, 4),
    ]
    for view in views:
        plain = view.contiguous().clone()
        q, expected = calibrated(method, [view]), calibrated(method, [plain])
        assert_exact(q(view), expected(plain), f"strides {view.stride()}")
        for name, buffer in q.state_dict().items():
            assert torch.equal(buffer, expected.state_dict()[name]) or name.endswith("_extra_state"), name


def test_channel_axis_of_tokens():
    """(B, T, C) behind a Linear: the producer's axis -1, or the method's own, which wins."""
    batches, x = [sample_data(1, (3, 4, 6))], sample_data(2, (3, 4, 6))
    by_producer = calibrated(Direct(granularity="channel"), batches, producer_axis=-1)
    by_method = calibrated(Direct(granularity="channel", channel_axis=2), batches, producer_axis=1)
    assert by_producer.scale.shape == (6,)
    assert_exact(by_producer.scale, batches[0].abs().amax((0, 1)) / 8)
    assert_exact(by_producer(x), by_method(x))
    assert calibrated(Direct(granularity="channel"), batches).scale.shape == (4,)
    assert calibrated(DQA(), batches, producer_axis=-1).extra_bits.shape == (6,)


# ---------------------------------------------------------------- zeros


@every_method
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_all_zero_tensors_give_zeros(method, granularity):
    method = method.replace(granularity=granularity)
    zeros = torch.zeros(3, 4, 5, 5)
    q = calibrated(method, [zeros])
    assert_exact(q(zeros), zeros)
    assert torch.isfinite(q(sample_data(1, (3, 4, 5, 5)))).all()


@every_method
def test_a_zero_channel_gives_zeros_and_leaves_the_others_alone(method):
    method = method.replace(granularity="channel")
    x = sample_data(1).relu()
    x[:, 2] = 0
    q = calibrated(method, [x])
    out = q(x)
    assert torch.isfinite(out).all()
    assert_exact(out[:, 2], x[:, 2])
    assert_matches_reference(q, [x], x)


@every_method
@pytest.mark.parametrize("kept", [0.004, 0.0005])
def test_more_than_99_percent_zeros(method, kept):
    """Quantiles are then zero (b = a = 0): the few values are outliers of Dense+Sparse, the zeros stay zeros."""
    generator = torch.Generator().manual_seed(4)
    x = torch.where(torch.rand(4, 5, 20, 20, generator=generator) < kept, 1.0, 0.0)
    x = x * torch.randn(x.shape, generator=generator)
    q = calibrated(method, [x])
    out = q(x)
    assert_matches_reference(q, [x], x)
    if isinstance(method, DenseSparse):
        assert_exact(out, x)
        assert same_bits(out[x != 0], x[x != 0])
    elif not isinstance(method, NoisyQuant):
        assert (out[x == 0] == 0).all()


def test_a_dynamic_sample_of_zeros_among_others():
    x = sample_data(1)
    x[2] = 0
    for method in DYNAMIC:
        q = calibrated(method, [x])
        assert_exact(q(x)[2], x[2], repr(method))


# ---------------------------------------------------------------- batches


@every_method
def test_a_sample_does_not_depend_on_its_batch(method):
    """Output and qparams of a sample alone, in its batch, and in another order are bit-equal."""
    q = calibrated(method, [sample_data(1)])
    x = sample_data(2)
    whole = q(x)
    assert same_bits(torch.cat([q(sample[None]) for sample in x]), whole)
    assert same_bits(q(x.flip(0)).flip(0), whole)
    if method.qparams == "dynamic":
        for alone, together in zip(q.runtime_qparams(x[3:4]), q.runtime_qparams(x), strict=True):
            assert alone is None or same_bits(alone, together[3:4])


@pytest.mark.parametrize("kind", [Direct, DQA, NoisyQuant])
def test_scope_batch_is_the_maximum_over_the_batch(kind):
    """The paper's literal max|A| over the layer's batch, as its table needs; per sample it differs."""
    x = sample_data(1)
    q = calibrated(kind.paper(bits=4, scope="batch"), [x])
    scale = q.runtime_qparams(x).scale
    assert scale.numel() == 1
    assert float(scale) == float(x.abs().max() / 8)
    assert_matches_reference(q, [x], x)
    assert not torch.equal(q(x), torch.cat([q(sample[None]) for sample in x]))


def test_dynamic_parameters_are_one_per_sample_and_channel():
    x = sample_data(1)
    assert calibrated(Direct(qparams="dynamic"), [x]).runtime_qparams(x).scale.shape == (6, 1, 1, 1)
    q = calibrated(Direct(qparams="dynamic", granularity="channel"), [x])
    assert_exact(q.runtime_qparams(x).scale, x.abs().amax((2, 3), keepdim=True) / 8)


# ---------------------------------------------------------------- signs


def test_codes_are_unsigned_where_calibration_saw_no_negative_value():
    """Twice as many steps behind a ReLU; one negative value in any batch makes codes signed."""
    positive, mixed = sample_data(1).abs(), sample_data(2)
    unsigned = calibrated(Direct(), [positive])
    assert not unsigned.signed
    assert_exact(unsigned.scale, positive.max() / 16)
    signed = calibrated(Direct(), [positive, mixed])
    assert signed.signed
    assert_exact(signed.scale, torch.maximum(positive.max(), mixed.abs().max()) / 8)
    assert (unsigned(mixed)[mixed < 0] == 0).all(), "unsigned codes have no negative value"
    assert unsigned(positive).unique().numel() > 8


def test_forcing_unsigned_on_negative_data_warns_with_the_value():
    q = calibrated(Direct(signed=False), [torch.tensor([[-1.5, 2.0]])], freeze=False)
    with pytest.warns(DQAWarning, match=r"'site'.*signed=False.*-1\.5"):
        q.freeze()
    assert_exact(q(torch.tensor([[-1.5, 2.0]])), torch.tensor([[0.0, 1.875]]))


# ---------------------------------------------------------------- gradients


@every_method
def test_gradients_reach_the_input_and_nothing_else(method):
    """Inside the range one, outside zero; Dense+Sparse one everywhere; no buffer asks for a gradient."""
    data = sample_data(1)
    q = calibrated(method, [data])
    x = (data * 2).requires_grad_()
    q(x).sum().backward()
    assert set(x.grad.unique().tolist()) <= {0.0, 1.0}
    if isinstance(method, DenseSparse):
        assert (x.grad == 1).all()
    elif method.qparams == "static":
        assert (x.grad[x.detach().abs() > 1.2 * data.abs().max()] == 0).all()
        assert (x.grad[x.detach().abs() < 0.5 * data.abs().max()] == 1).all()
    assert not any(buffer.requires_grad for buffer in q.buffers())
    assert not list(q.parameters())
    with torch.no_grad():
        assert same_bits(q(x), q(x.detach()))


# ---------------------------------------------------------------- shared by several calls


@every_method
def test_a_quantizer_called_twice_in_a_forward_sees_both(method):
    """A shared module: every call contributes its samples, and each call is quantized by itself."""

    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quantizer = ActivationQuantizer(method, name="shared")

        def forward(self, x):
            return self.quantizer(torch.relu(self.quantizer(x)) - 3)

    model, x = Twice(), sample_data(1)
    model(x)
    assert model.quantizer.calibration.count == 12
    model.quantizer.freeze()
    batches = [x, torch.relu(x) - 3]
    y = sample_data(2)
    first = model.quantizer(y)
    assert_matches_reference(model.quantizer, batches, y)
    assert_matches_reference(model.quantizer, batches, torch.relu(first) - 3)
    assert same_bits(model(y), model.quantizer(torch.relu(first) - 3))


@ignore_negative
@given(cases(), methods)
@settings(max_examples=30)
def test_observing_returns_the_input_untouched(case, method):
    q = ActivationQuantizer(method, producer_axis=case.channel_axis)
    for batch in case.batches:
        before = batch.clone()
        assert q(batch) is batch or same_bits(q(batch), before)
        assert same_bits(batch, before)
