"""Bad input ends in a typed error that names the layer and the value, and is the built-in a caller would guess."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from dqa_plugins import DQA, ActivationQuantizer, DenseSparse, Direct, DQAError, NoisyQuant, errors
from tests.compare import calibrated, same_bits

METHODS = [Direct(), DQA(), NoisyQuant(), DenseSparse(), DQA(qparams="dynamic"), DenseSparse(qparams="dynamic")]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{type(m).__name__}-{m.qparams}")


def data(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (4, 5, 3, 3), generator=torch.Generator().manual_seed(0))


def all_errors() -> list[type]:
    found = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, DQAError) and e is not DQAError]
    assert len(found) >= 10
    return found


@pytest.mark.parametrize("error", all_errors(), ids=lambda e: e.__name__)
def test_every_error_is_a_built_in_one_as_well(error):
    assert issubclass(error, ValueError | TypeError | RuntimeError)


@pytest.mark.parametrize(("value", "text"), [(float("nan"), "1 NaN and 0 Inf"), (float("-inf"), "0 NaN and 1 Inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@every_method
def test_nan_and_inf_raise_in_the_forward_that_observes_them(method, value, text, dtype):
    """Named with their number and the shape; nothing of the bad batch is recorded; in qat too."""
    bad = data().to(dtype)
    bad[1, 2, 0, 0] = value
    for state in ("observe", "qat"):
        q = ActivationQuantizer(method, name="layer1.relu")
        if state == "qat":
            q.start_qat().train()
        q(data().to(dtype))
        before = copy.deepcopy(q.state_dict())
        with pytest.raises(
            errors.NonFiniteInput, match=rf"'layer1\.relu' \({type(method).__name__}, 4 bits\).*{text}.*\(4, 5, 3, 3\)"
        ):
            q(bad)
        assert all(same_bits(v, before[k]) for k, v in q.state_dict().items()), "the bad batch left a trace"


@pytest.mark.parametrize("state", ["observe", "frozen"])
@pytest.mark.parametrize(
    "bad",
    [torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 3, dtype=torch.complex64)],
    ids=["int64", "bool", "complex64"],
)
def test_tensors_that_are_not_floating_point(bad, state):
    q = calibrated(Direct(), [data(2, 3)], freeze=state == "frozen", name="layer1.relu")
    with pytest.raises(errors.UnsupportedInput, match=rf"'layer1\.relu'.*{bad.dtype}"):
        q(bad)


@pytest.mark.parametrize("state", ["observe", "frozen", "qat"])
@pytest.mark.parametrize(
    "bad", [[1.0, 2.0], np.ones((2, 3), np.float32), None, 3.0], ids=["list", "array", "None", "float"]
)
def test_values_that_are_no_tensor(bad, state):
    q = calibrated(Direct(), [data(2, 3)], freeze=state == "frozen", name="layer1.relu")
    if state == "qat":
        q = ActivationQuantizer(Direct(), name="layer1.relu").start_qat().train()
    with pytest.raises(errors.UnsupportedInput, match=rf"'layer1\.relu'.*{type(bad).__name__}"):
        q(bad)


@pytest.mark.parametrize("state", ["observe", "frozen"])
@every_method
def test_a_tensor_without_a_batch_axis(method, state):
    q = calibrated(method, [data(2, 3)], freeze=state == "frozen", name="layer1.relu")
    with pytest.raises((errors.UnsupportedInput, errors.ChannelAxisError), match=r"'layer1\.relu'"):
        q(torch.tensor(1.0))


@pytest.mark.parametrize("axis", [4, 9, -4, -5])
@pytest.mark.parametrize("kind", [DQA, NoisyQuant, Direct])
def test_a_channel_axis_that_does_not_exist(kind, axis):
    """Or is the batch, counted from the end."""
    fields = {"granularity": "channel"} if kind is Direct else {}
    q = ActivationQuantizer(kind(channel_axis=axis, **fields), name="layer1.relu")
    with pytest.raises(errors.ChannelAxisError, match=rf"'layer1\.relu'.*axis {axis} .*\(4, 5, 3, 3\)"):
        q(data())
    with pytest.raises(ValueError, match="axis"):
        q(data())


def test_a_channel_axis_that_is_not_looked_at_may_be_any():
    """One scale per tensor has no channels: an axis of 3 does no harm to a (B, C) tensor."""
    q = calibrated(Direct(channel_axis=3), [data(4, 5)])
    assert q(data(4, 5)).shape == (4, 5)
    q = calibrated(Direct(channel_axis=3, qparams="dynamic"), [data(4, 5)])
    assert q(data(4, 5)).shape == (4, 5)


@pytest.mark.parametrize("state", ["observe", "frozen", "qat"])
@pytest.mark.parametrize("kind", [DQA, NoisyQuant, Direct])
def test_another_number_of_channels_than_calibrated(kind, state):
    method = kind(granularity="channel")
    q = calibrated(method, [data()], freeze=state == "frozen", name="layer1.relu")
    if state == "qat":
        q = ActivationQuantizer(method, name="layer1.relu").start_qat().train()
        q(data())
    with pytest.raises(errors.ChannelMismatch, match=r"'layer1\.relu'.*5 channels.*\(4, 6, 3, 3\)"):
        q(data(4, 6, 3, 3))
    q(data(2, 5, 7, 7))


@pytest.mark.parametrize("bad", [DQA, "dqa", 4, None, {"bits": 4}, ActivationQuantizer(Direct())], ids=repr)
def test_something_that_is_no_method(bad):
    with pytest.raises(errors.NotAMethod) as caught:
        ActivationQuantizer(bad)
    assert isinstance(caught.value, TypeError)
    assert "DQA" in str(caught.value)
    if bad is DQA:
        assert "did you mean DQA()?" in str(caught.value)


def test_predictions_need_a_predicting_method():
    with pytest.raises(errors.UnsupportedCombination, match=r"'site'.*static"):
        calibrated(Direct(), [data()])(data(), torch.ones(4, 1))


# ---------------------------------------------------------------- set_extra_bits


@pytest.mark.parametrize(
    ("vector", "error", "text"),
    [
        (torch.zeros(4, dtype=torch.int64), errors.ChannelMismatch, r"5 channels.*\(4,\)"),
        (torch.zeros(5, 1, dtype=torch.int64), errors.InvalidArgument, r"\(C,\)"),
        (torch.tensor([0, 0, 5, 0, 0]), errors.InvalidArgument, r"to 5.*\[-3, 4\]"),
        (torch.tensor([0, 0, -4, 0, 0]), errors.InvalidArgument, r"from -4.*\[-3, 4\]"),
        (torch.zeros(5), errors.InvalidArgument, "integers"),
    ],
)
def test_extra_bits_that_do_not_fit(vector, error, text):
    q = calibrated(DQA(bits=4), [data()], name="layer1.relu")
    before = q.extra_bits.clone()
    with pytest.raises(error, match=rf"'layer1\.relu'.*{text}"):
        q.set_extra_bits(vector)
    assert torch.equal(q.extra_bits, before)


@pytest.mark.parametrize("bad", [[3, 0, 0, 0, 0], np.zeros(5, np.int64), None], ids=["list", "array", "None"])
def test_extra_bits_that_are_no_tensor(bad):
    """A typed error or a conversion: never an AttributeError from inside."""
    q = calibrated(DQA(bits=4), [data()], name="layer1.relu")
    try:
        q.set_extra_bits(bad)
    except DQAError as error:
        assert "layer1.relu" in str(error)  # noqa: PT017
    else:
        assert q.extra_bits.tolist() == list(bad)


def test_extra_bits_at_their_limits_are_accepted():
    q = calibrated(DQA(bits=4), [data()])
    q.set_extra_bits(torch.tensor([-3, 4, 0, 4, -3], dtype=torch.int8))
    assert q.extra_bits.tolist() == [-3, 4, 0, 4, -3]
    assert q.extra_bits.dtype == torch.int64


@pytest.mark.parametrize("method", [Direct(), NoisyQuant(), DenseSparse()])
def test_a_method_without_important_channels(method):
    q = calibrated(method, [data()], name="layer1.relu")
    with pytest.raises(errors.UnsupportedCombination, match=r"'layer1\.relu'.*no important channels"):
        q.set_extra_bits(torch.zeros(5, dtype=torch.int64))


def test_extra_bits_chosen_before_calibration_are_checked_by_the_first_batch():
    q = ActivationQuantizer(DQA(), name="layer1.relu")
    q.set_extra_bits(torch.zeros(6, dtype=torch.int64))
    with pytest.raises(errors.ChannelMismatch, match=r"'layer1\.relu'.*5 channels.*\(6,\)"):
        q(data())


@every_method
def test_tensors_beyond_two_to_the_31_values_are_refused(method):
    """Before anything is allocated: a stride-0 tensor of 2^31 values, which takes four bytes."""
    from dqa_plugins.storage import pack

    huge = torch.zeros(1, 1, 1, 1).expand(2, 5, 2**15, 2**15)
    assert huge.numel() > 2**31
    for state in ("observe", "qat", "frozen"):
        q = ActivationQuantizer(method, name="layer2.0")
        if state != "observe":
            q = calibrated(method, [data()], name="layer2.0", freeze=state == "frozen")
        if state == "qat":
            q.start_qat()
        with pytest.raises(errors.UnsupportedInput, match=r"'layer2\.0'.*and got 10737418240.*smaller"):
            q(huge)
    with pytest.raises(errors.DQAError, match=r"'layer2\.0'.*2\^31 - 1 values, got 10737418240"):
        pack(huge, q)


@pytest.mark.parametrize("state", ["observe", "frozen"])
@pytest.mark.parametrize("how", ["coo", "csr", "mkldnn", "nested", "jagged", "e4m3fn", "e5m2", "e8m0fnu", "float4"])
def test_layouts_and_dtypes_without_arithmetic(how, state):
    q = calibrated(Direct(), [data(2, 3)], freeze=state == "frozen", name="layer1.relu")
    rows = [torch.ones(2, 3), torch.ones(1, 3)]
    bad = {
        "coo": lambda: data(2, 3).to_sparse(),
        "csr": lambda: data(2, 3).to_sparse_csr(),
        "mkldnn": lambda: data(2, 3).to_mkldnn(),
        "nested": lambda: torch.nested.nested_tensor(rows),
        "jagged": lambda: torch.nested.nested_tensor(rows, layout=torch.jagged),
        "e4m3fn": lambda: data(2, 3).to(torch.float8_e4m3fn),
        "e5m2": lambda: data(2, 3).to(torch.float8_e5m2),
        "e8m0fnu": lambda: data(2, 3).to(torch.float8_e8m0fnu),
        "float4": lambda: torch.zeros(2, 3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    }[how]()
    with pytest.raises(errors.UnsupportedInput, match=r"'layer1\.relu'.*(Make it dense|Convert it)"):
        q(bad)


def test_meta_tensors_are_quantized_and_not_observed():
    q = ActivationQuantizer(Direct(), name="layer1.relu")
    with pytest.raises(errors.UnsupportedInput, match=r"'layer1\.relu'.*meta"):
        q(data(2, 3).to("meta"))
    frozen = calibrated(DQA(qparams="dynamic"), [data(2, 3)])
    assert frozen(torch.empty(5, 3, dtype=torch.float16, device="meta")).shape == (5, 3)


@pytest.mark.parametrize("qparams", ["static", "dynamic"])
@pytest.mark.parametrize("kind", [DenseSparse, Direct])
def test_a_range_wider_than_float32(kind, qparams):
    """-1.6e38 to 1.6e38 and more: b - a overflows, the grid does not."""
    fields = {"symmetric": False} if kind is Direct else {"signed": True, "density": 0.0}
    x = torch.linspace(-1, 1, 64).reshape(2, 4, 8) * 3e38
    q = calibrated(kind(bits=8, qparams=qparams, **fields), [x])
    assert float((q(x) / 1e38 - x / 1e38).abs().max()) <= 6 / 255
