"""pack -> unpack gives exactly the fake-quantized tensor, for everything that can be packed."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dqa_plugins import DQA, ActivationQuantizer, DenseSparse, Direct, NoisyQuant
from dqa_plugins.errors import ChannelMismatch, InvalidArgument, NonFiniteInput, UncalibratedQuantizer
from dqa_plugins.storage import (
    NotPackable,
    PackedActivation,
    calibrate_tables,
    pack,
    set_threads,
)
from tests.storage.cases import CODINGS, DTYPES, frozen, quantizer_for, tensor


def assert_same(found: torch.Tensor, wanted: torch.Tensor, what: object = "") -> None:
    assert found.dtype == wanted.dtype, what
    assert found.shape == wanted.shape, what
    if not torch.equal(found, wanted):
        difference = (found.double() - wanted.double()).abs().flatten()
        worst = int(difference.argmax())
        raise AssertionError(
            f"{what}: {int((difference > 0).sum())} of {found.numel()} values differ; at {worst}: "
            f"{found.flatten()[worst]} instead of {wanted.flatten()[worst]}"
        )


@given(frozen(), st.sampled_from(CODINGS))
def test_unpacking_gives_the_fake_quantized_tensor(case: tuple[ActivationQuantizer, torch.Tensor], coding: str) -> None:
    quantizer, x = case
    packed = pack(x, quantizer, coding)
    assert_same(packed.unpack(), quantizer(x), (quantizer.method, coding))


@given(frozen(), st.sampled_from(CODINGS))
def test_bytes_stand_for_themselves(case: tuple[ActivationQuantizer, torch.Tensor], coding: str) -> None:
    quantizer, x = case
    packed = pack(x, quantizer, coding)
    data = packed.to_bytes()
    assert len(data) == packed.nbytes + packed.codebook_nbytes
    again = PackedActivation.from_bytes(data)
    assert_same(again.unpack(), quantizer(x), (quantizer.method, coding))
    assert again.to_bytes() == data
    assert again.nbytes == packed.nbytes


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_number_of_extra_bits(bits: int, coding: str) -> None:
    """m from 1 - n to n, all in one tensor, more than a chunk of each."""
    extra = torch.arange(1 - bits, bits + 1)
    for kind in ("normal", "relu"):
        x = tensor((3, len(extra), 40, 40), bits, kind)
        quantizer = quantizer_for(DQA(bits=bits), x)
        quantizer.set_extra_bits(extra)
        assert_same(pack(x, quantizer, coding).unpack(), quantizer(x), (bits, coding, kind))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 0), (2, 3, 0, 5)])
def test_empty_tensors(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    channels = shape[1] if shape[1:2] != (0,) else 3
    calibrated = quantizer_for(DQA(), torch.rand(2, channels, 4, 4))
    x = torch.empty(shape, dtype=dtype)
    others = quantizer_for(Direct(), torch.rand(2, 3)), quantizer_for(DenseSparse(), torch.rand(2, 9))
    for quantizer in (calibrated, *others):
        packed = pack(x, quantizer, "auto")
        assert_same(packed.unpack(), x)
        assert packed.bits_per_activation == 0
        assert_same(PackedActivation.from_bytes(packed.to_bytes()).unpack(), x)


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("shape", [(1,), (5,), (1, 1), (1, 1, 1, 1), (3, 1)])
def test_one_element_and_one_dimension(shape: tuple[int, ...], coding: str) -> None:
    x = torch.full(shape, 0.7)
    for method in (DQA(), Direct(), Direct(symmetric=False), NoisyQuant(amplitude=0.3), DenseSparse()):
        quantizer = quantizer_for(method, x)
        assert_same(pack(x, quantizer, coding).unpack(), quantizer(x), method)


@pytest.mark.parametrize("coding", ["none", "joint"])
def test_layouts_of_the_input_do_not_matter(coding: str) -> None:
    x = tensor((4, 6, 30, 30), 0, "relu")
    quantizer = quantizer_for(DQA(bits=3), x)
    wanted = quantizer(x)
    assert_same(pack(x.to(memory_format=torch.channels_last), quantizer, coding).unpack(), wanted)
    assert_same(pack(torch._neg_view(-x), quantizer, coding).unpack(), wanted)
    wide = tensor((4, 6, 30, 60), 0, "relu")
    assert_same(pack(wide[..., ::2], quantizer, coding).unpack(), quantizer(wide[..., ::2].contiguous()))
    grown = x.clone().requires_grad_()
    assert_same(pack(grown, quantizer, coding).unpack(), wanted)


def test_ties_round_to_even_as_in_functional() -> None:
    """Values on and next to ties: multiplying by the inverse would round some of them to the other side."""
    for step in (0.1, 1 / 3, 0.7, 2.0**-20, 3e-39, 1e-45, 1e30):
        base = (torch.arange(-128, 128, dtype=torch.float64) + 0.5) * step
        x = base.float()
        around = torch.stack([x, torch.nextafter(x, torch.tensor(1e38)), torch.nextafter(x, torch.tensor(-1e38))])
        quantizer = quantizer_for(DQA(bits=4, extra_bits=3, ratio=1.0, signed=True), around.view(1, 1, -1))
        quantizer.scale = torch.tensor(step * 8, dtype=torch.float32)
        assert_same(pack(around.view(1, 1, -1), quantizer, "none").unpack(), quantizer(around.view(1, 1, -1)), step)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_threads_give_the_same_bytes(threads: int) -> None:
    x = tensor((8, 16, 64, 64), 1, "relu")
    quantizer = quantizer_for(DQA(bits=4, ratio=0.5), x)
    try:
        set_threads(1)
        alone = pack(x, quantizer, "joint")
        set_threads(threads)
        together = pack(x, quantizer, "joint")
        assert torch.equal(alone.data, together.data)
        assert_same(together.unpack(), quantizer(x))
    finally:
        set_threads(None)


def test_unpack_into_a_given_tensor() -> None:
    x = tensor((4, 6, 30, 30), 0, "relu")
    quantizer = quantizer_for(DQA(), x)
    packed = pack(x, quantizer, "shift_error")
    out = torch.full_like(x, 7)
    assert packed.unpack(out=out) is out
    assert_same(out, quantizer(x))
    with pytest.raises(NotPackable, match="contiguous"):
        packed.unpack(out=torch.empty(4, 6, 30))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", [DQA(), Direct(symmetric=False), DenseSparse(), NoisyQuant(amplitude=0.1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_nan_and_inf_name_the_layer(bad: float, method: object, dtype: torch.dtype) -> None:
    x = tensor((2, 4, 40, 40), 0, "normal", dtype)
    quantizer = quantizer_for(method, x, name="layer3.relu")  # type: ignore[arg-type]
    for place in (0, 4095, 5000, x.numel() - 1):
        broken = x.clone()
        broken.view(-1)[place] = bad
        with pytest.raises(NonFiniteInput, match=r"layer3\.relu"):
            pack(broken, quantizer, "joint")


def test_wrong_input_names_the_layer_and_the_way_out() -> None:
    x = tensor((2, 4, 5, 5), 0, "normal")
    quantizer = quantizer_for(DQA(), x, name="layer3.relu")
    with pytest.raises(ChannelMismatch, match=r"layer3\.relu"):
        pack(torch.zeros(2, 5, 5, 5), quantizer)
    with pytest.raises(NotPackable, match=r"layer3\.relu.*int64"):
        pack(torch.zeros(2, 4, dtype=torch.int64), quantizer)
    with pytest.raises(InvalidArgument, match=r"huffman.*shift_error"):
        pack(x, quantizer, "huffman")
    observing = ActivationQuantizer(DQA(), name="layer4.relu")
    observing(x)
    with pytest.raises(NotPackable, match=r"layer4\.relu.*freeze"):
        pack(x, observing)


@pytest.mark.parametrize("how", ["sparse", "mkldnn", "nested", "meta"])
def test_tensors_that_are_not_dense_are_refused(how: str) -> None:
    x = tensor((2, 4, 5), 0, "normal")
    quantizer = quantizer_for(DQA(), x)
    makers = {"sparse": x.to_sparse, "mkldnn": x.to_mkldnn, "meta": lambda: x.to("meta")}
    other = makers.get(how, lambda: torch.nested.nested_tensor([*x]))()
    with pytest.raises(NotPackable, match=rf"'block\.relu'.*{how}"):
        pack(other, quantizer)


def test_auto_is_never_larger_than_fixed_width() -> None:
    """Tables from smooth data, then white noise over the whole range: the coder can only lose."""
    smooth = tensor((4, 8, 64, 64), 0, "normal") * 0.01
    smooth.view(-1)[0] = 1.0
    noise = torch.rand(4, 8, 64, 64) * 2 - 1
    quantizer = quantizer_for(DQA(bits=4, ratio=1.0, signed=True), smooth)
    books = {coding: calibrate_tables(quantizer, smooth, coding) for coding in ("auto", "joint", "shift_error")}
    for coding, book in books.items():
        assert pack(smooth, quantizer, coding, book).nbytes < pack(smooth, quantizer, "none").nbytes
    packed = pack(noise, quantizer, "auto", books["auto"])
    assert packed.nbytes <= pack(noise, quantizer, "none").nbytes
    assert_same(packed.unpack(), quantizer(noise))
    assert pack(noise, quantizer, "joint", books["joint"]).nbytes <= pack(noise, quantizer, "none").nbytes + 10 * 33


def test_bytes_depend_on_the_tensor_and_the_quantizer_only() -> None:
    """Not on what was packed or calibrated before."""
    x = tensor((2, 4, 30, 30), 0, "normal")
    quantizer = quantizer_for(DQA(), x)
    first = pack(x, quantizer, "joint")
    pack(torch.zeros_like(x), quantizer, "joint")
    calibrate_tables(quantizer, x.clamp(min=0), "joint")
    assert pack(x, quantizer, "joint").to_bytes() == first.to_bytes()
    assert pack(x, copy.deepcopy(quantizer), "joint").to_bytes() == first.to_bytes()
    fresh = quantizer_for(DQA(), x)
    pack(torch.zeros_like(x), fresh, "joint")
    assert pack(x, fresh, "joint").to_bytes() == first.to_bytes()


def test_codebook_follows_the_quantizer() -> None:
    x = tensor((2, 4, 30, 30), 0, "normal")
    quantizer = quantizer_for(DQA(), x)
    first = pack(x, quantizer, "joint")
    quantizer.set_extra_bits(torch.tensor([4, 0, -1, 2]))
    assert_same(pack(x, quantizer, "joint").unpack(), quantizer(x))
    assert_same(first.unpack(), PackedActivation.from_bytes(first.to_bytes()).unpack())
    twin = copy.deepcopy(quantizer)
    assert_same(pack(x, twin, "joint").unpack(), quantizer(x))


def test_tables_from_calibration_tensors() -> None:
    """Tables made beforehand do not depend on which tensor is packed first, and fit later ones better."""
    smooth, other = tensor((8, 6, 40, 40), 0, "relu"), tensor((8, 6, 40, 40), 1, "relu")
    quantizer = quantizer_for(DQA(bits=4), smooth)
    odd = torch.zeros_like(smooth)
    book = calibrate_tables(quantizer, [smooth[:4], smooth[4:]], "joint")
    assert pack(odd, quantizer, codebook=book).codebook is book
    calibrated = pack(other, quantizer, codebook=book)
    assert calibrated.codebook is book
    assert_same(calibrated.unpack(), quantizer(other))
    assert pack(other, quantizer, "joint").codebook is not book
    accidental = calibrate_tables(quantizer, odd, "joint")
    assert calibrated.nbytes < pack(other, quantizer, codebook=accidental).nbytes
    with pytest.raises(UncalibratedQuantizer, match="no values"):
        calibrate_tables(quantizer, torch.empty(0, 6, 4, 4))
    with pytest.raises(ChannelMismatch):
        calibrate_tables(quantizer, torch.zeros(2, 5, 4, 4))


def test_a_negative_zero_is_stored_as_zero() -> None:
    """Fake quantization of a small negative value gives -0.0; unpacking gives 0.0, which compares equal."""
    x = torch.tensor([[-0.01, 1.0, -1.0]])
    quantizer = quantizer_for(Direct(bits=4, signed=True), x)
    assert torch.signbit(quantizer(x))[0, 0]
    found = pack(x, quantizer, "none").unpack()
    assert torch.equal(found, quantizer(x))
    assert not torch.signbit(found)[0, 0]


def test_sparse_tensors_go_below_one_bit() -> None:
    x = torch.where(torch.rand(8, 8, 64, 64, generator=torch.Generator().manual_seed(0)) > 0.98, 1.0, 0.0)
    quantizer = quantizer_for(Direct(bits=2, signed=False), x)
    assert pack(x, quantizer, "joint").bits_per_activation < 0.4
