"""Damaged, truncated, spliced and hostile frames: a typed error each time, never a crash, never a large allocation."""

from __future__ import annotations

import random
import struct
import tracemalloc
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dqa_plugins import DQA, DenseSparse, Direct, NoisyQuant
from dqa_plugins.errors import DQAError
from dqa_plugins.storage import CorruptFrame, NotPackable, PackedActivation, UnsupportedFrame, calibrate_tables, pack
from dqa_plugins.storage.format.frame import HEADER
from dqa_plugins.storage.format.section import read_codebook, write_codebook
from tests.storage.cases import CODINGS, Banded, Narrow, quantizer_for, tensor

CRC = slice(HEADER.size - 4, HEADER.size)


def frames() -> list[bytes]:
    """One small frame of every kind."""
    found = []
    for seed, method in enumerate(
        (
            DQA(bits=4, ratio=0.5),
            DQA(bits=3, qparams="dynamic", signed=True),
            DQA(bits=8, extra_bits=8),
            Direct(bits=3),
            Direct(bits=4, symmetric=False),
            NoisyQuant(bits=3, amplitude=0.4),
            DenseSparse(bits=4, density=0.05),
            DenseSparse(bits=2, density=0.3, qparams="dynamic"),
            Narrow(bits=3),
            Banded(bits=4, qparams="dynamic"),
        )
    ):
        x = tensor((2, 6, 10, 10), seed, "relu" if seed % 2 else "normal")
        quantizer = quantizer_for(method, x)
        found += [pack(x, quantizer, coding).to_bytes() for coding in CODINGS]
    return found


def sealed(data: bytes) -> bytes:
    """The frame with its checksum made to match: what an attacker would send."""
    crc = zlib.crc32(data[HEADER.size :], zlib.crc32(data[: CRC.start]))
    return data[: CRC.start] + struct.pack("<I", crc) + data[CRC.stop :]


FRAMES = frames()


def survives(data: bytes) -> bool:
    """Read and unpack; True if that worked. Anything but a typed error fails the test."""
    try:
        packed = PackedActivation.from_bytes(data)
        out = packed.unpack()
    except DQAError:
        return False
    assert out.shape == packed.shape
    return True


def test_the_seal_of_these_tests_is_the_real_one() -> None:
    for data in FRAMES:
        assert sealed(data) == data
        assert survives(data)


@given(st.sampled_from(FRAMES), st.data())
def test_every_truncation_is_refused(frame: bytes, draw: st.DataObject) -> None:
    cut = draw.draw(st.integers(0, len(frame) - 1))
    with pytest.raises(CorruptFrame):
        PackedActivation.from_bytes(frame[:cut])


@given(st.sampled_from(FRAMES), st.binary(min_size=1, max_size=20))
def test_trailing_bytes_are_refused(frame: bytes, tail: bytes) -> None:
    with pytest.raises(CorruptFrame):
        PackedActivation.from_bytes(frame + tail)


@given(st.sampled_from(FRAMES), st.data())
def test_every_flipped_bit_is_found(frame: bytes, draw: st.DataObject) -> None:
    bit = draw.draw(st.integers(0, 8 * len(frame) - 1))
    damaged = bytearray(frame)
    damaged[bit // 8] ^= 1 << (bit % 8)
    with pytest.raises((CorruptFrame, UnsupportedFrame)):
        PackedActivation.from_bytes(bytes(damaged))


@given(st.sampled_from(FRAMES), st.sampled_from(FRAMES), st.data())
def test_spliced_frames_are_found(first: bytes, second: bytes, draw: st.DataObject) -> None:
    cut = draw.draw(st.integers(1, min(len(first), len(second)) - 1))
    spliced = first[:cut] + second[cut:]
    if spliced not in (first, second):
        assert not survives(spliced)
    survives(sealed(spliced)) if len(spliced) >= HEADER.size else None


def test_forged_shapes_allocate_nothing() -> None:
    """The shape says 2^60 values; the checksum matches."""
    for frame in FRAMES:
        for shape in ((2**31, 2**29, 1, 1), (2, 6, 2**20, 2**20), (2**32 - 1, 6, 1, 1), (1, 6, 10**4, 10**4)):
            data = sealed(frame[: HEADER.size] + struct.pack("<4I", *shape) + frame[HEADER.size + 16 :])
            tracemalloc.start()
            with pytest.raises(CorruptFrame):
                PackedActivation.from_bytes(data)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 4_000_000, (shape, peak)


def test_forged_shapes_of_empty_tensors() -> None:
    """No values, but strides that torch cannot count."""
    x = torch.zeros(0, 6, 4, 4)
    frame = pack(x, quantizer_for(DQA(bits=4), torch.rand(2, 6, 4, 4)), "none").to_bytes()
    large = 2**32 - 1
    for shape in ((0, 6, large, large), (0, large, large, large), (large, 6, large, 0), (large, large, large, 0)):
        with pytest.raises(CorruptFrame):
            PackedActivation.from_bytes(sealed(frame[: HEADER.size] + struct.pack("<4I", *shape) + frame[40:]))
    assert survives(sealed(frame[: HEADER.size] + struct.pack("<4I", 0, 6, 2**16, 2**16) + frame[40:]))


def sections(frame: bytes) -> tuple[int, int]:
    """Where the codebook and the data section start."""
    (size,) = struct.unpack("<I", frame[8:12])
    start = HEADER.size + 4 * frame[6] + (16 if frame[7] & 4 else 0)
    return start, start + size


def test_the_codebook_of_another_frame() -> None:
    """Header, shape and data of one frame, codebook of another, all lengths and the checksum made to match."""
    for first in FRAMES:
        for second in FRAMES:
            (begin, middle), (start, end) = sections(first), sections(second)
            book = second[start:end]
            survives(sealed(first[:8] + struct.pack("<I", len(book)) + first[12:begin] + book + first[middle:]))


def test_every_byte_of_a_codebook_forged() -> None:
    """Each byte in front of the data set to its extremes, with a matching checksum: read, or refused by type."""
    for frame in FRAMES[::3]:
        for at in range(4, min(sections(frame)[1], 400)):
            for value in (0, 1, 128, 255, frame[at] ^ 1):
                survives(sealed(frame[:at] + bytes([value]) + frame[at + 1 :]))


def test_parameters_that_are_not_finite() -> None:
    """Static ones are refused; dynamic ones lie in the data and decode to what they say, without an error."""
    x = tensor((2, 6, 20, 20), 0, "normal")
    frame = pack(x, quantizer_for(Direct(bits=4), x), "none").to_bytes()
    at = sections(frame)[0] + 16 + 2  # behind the head: extra bits and groups of one channel each
    for bad in (float("nan"), float("inf")):
        forged = sealed(frame[:at] + struct.pack("<f", bad) + frame[at + 4 :])
        with pytest.raises(CorruptFrame, match="NaN or Inf"):
            PackedActivation.from_bytes(forged)
    frame = pack(x, quantizer_for(Direct(bits=4, qparams="dynamic"), x), "none").to_bytes()
    at = sections(frame)[1]
    assert survives(sealed(frame[:at] + struct.pack("<f", float("nan")) + frame[at + 4 :]))


def test_a_codebook_of_another_quantizer_is_refused() -> None:
    """Its channels and widths would send the kernels out of the tensor."""
    x = tensor((2, 6, 20, 20), 0, "normal")
    quantizer = quantizer_for(DQA(bits=4), x, name="layer5.relu")
    others = [
        quantizer_for(DQA(bits=4), tensor((2, 60, 20, 20), 0, "normal")),
        quantizer_for(DQA(bits=5), x),
        quantizer_for(Direct(bits=4), x),
        quantizer_for(DQA(bits=4), 2 * x),
    ]
    for other in others:
        size = other.num_channels or 6
        book = calibrate_tables(other, tensor((2, size, 20, 20), 0, "normal"), "joint")
        with pytest.raises(NotPackable, match=r"layer5\.relu"):
            pack(x, quantizer, "joint", book)


@pytest.mark.parametrize(
    ("mine", "other"),
    [
        ({"granularity": "channel", "qparams": "dynamic"}, {"channel_axis": 2}),
        ({"granularity": "channel", "qparams": "dynamic"}, {"granularity": "tensor"}),
        ({"qparams": "dynamic"}, {"scope": "batch"}),
        ({}, {"qparams": "dynamic"}),
        ({"granularity": "channel"}, {"symmetric": False}),
        ({"symmetric": False}, {"symmetric": False, "clip": 0.9}),
    ],
    ids=str,
)
def test_a_codebook_must_agree_in_everything(mine: dict[str, object], other: dict[str, object]) -> None:
    """Another axis decodes to other values; another source of parameters cannot be decoded at all."""
    x = tensor((2, 4, 4, 8), 0, "normal")
    quantizer = quantizer_for(Direct(**mine), x, name="layer6.relu")  # type: ignore[arg-type]
    theirs = calibrate_tables(quantizer_for(Direct(**{**mine, **other}), x), x, "joint")  # type: ignore[arg-type]
    with pytest.raises(NotPackable, match=r"layer6\.relu.*cannot pack with this codebook"):
        pack(x, quantizer, "joint", theirs)
    own = calibrate_tables(quantizer, x, "joint")
    assert torch.equal(pack(x, quantizer, "joint", own).unpack(), quantizer(x))


def test_forged_tables_are_refused() -> None:
    """Lengths of a complete code, but none for the word that rare words are written as: they would be lost."""
    x = tensor((2, 6, 30, 30), 0, "relu")
    book = calibrate_tables(quantizer_for(DQA(bits=2, extra_bits=0), x), x, "joint")
    (group,) = book.groups
    table = group.table
    assert table is not None
    assert table.word > 1
    lengths = table.lengths.copy()
    free = int(np.flatnonzero(lengths == 0)[0]) if (lengths == 0).any() else 0
    lengths[free], lengths[-1] = lengths[-1], 0
    if free == 0:
        lengths = np.zeros_like(lengths)
        lengths[:2] = 1
    forged = replace(book, groups=(replace(group, table=replace(table, lengths=lengths)),))
    with pytest.raises(CorruptFrame, match="no code"):
        read_codebook(memoryview(write_codebook(forged)))
    forged = replace(book, groups=(replace(group, table=replace(table, lowest=200)),))
    with pytest.raises(CorruptFrame, match="200"):
        read_codebook(memoryview(write_codebook(forged)))


def test_what_is_no_bytes() -> None:
    for data in ("DQAP", None, 3, [1, 2], memoryview(bytes(100))[::2]):
        with pytest.raises(CorruptFrame, match="a frame is read from bytes"):
            PackedActivation.from_bytes(data)  # type: ignore[arg-type]


def test_other_versions_and_other_files() -> None:
    frame = FRAMES[0]
    with pytest.raises(UnsupportedFrame, match="version 2"):
        PackedActivation.from_bytes(sealed(frame[:4] + b"\x02" + frame[5:]))
    with pytest.raises(CorruptFrame, match="no packed activation"):
        PackedActivation.from_bytes(b"PK\x03\x04" + frame[4:])
    for data in (b"", b"D", b"DQAP"):
        with pytest.raises(CorruptFrame):
            PackedActivation.from_bytes(data)


def mutated(frame: bytes, rng: random.Random) -> bytes:
    """One of the ways to damage a frame."""
    data = bytearray(frame)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
        kind = rng.randrange(6)
        at = rng.randrange(len(data)) if rng.random() < 0.5 else min(rng.randrange(200), len(data) - 1)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice((0, 1, 127, 128, 255))
        elif kind == 2:
            del data[at : at + rng.choice((1, 2, 8, 100))]
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.choice((1, 2, 8, 100)))
        elif kind == 4:
            other = rng.choice(FRAMES)
            data[at:] = other[at:]
        else:
            data[at : at + 8] = struct.pack("<Q", rng.choice((0, 2**16 - 1, 2**32 - 1, 2**63, 2**64 - 1)))
        if len(data) < 2:
            break
    return bytes(data)


def fuzz(count: int, seed: int) -> tuple[int, int]:
    """Mutate frames, half of them with a matching checksum and, of those, half with matching lengths too."""
    rng = random.Random(seed)
    read = refused = 0
    for i in range(count):
        frame = rng.choice(FRAMES)
        data = mutated(frame, rng)
        if i % 2 and len(data) > HEADER.size:
            if i % 4 == 3 and data[:5] == b"DQAP\x01":
                data = _with_matching_size(data)
            data = sealed(data)
        if survives(data):
            read += 1
            assert i % 2 or data in FRAMES, "damage went unnoticed although the checksum was not forged"
        else:
            refused += 1
    return read, refused


def _with_matching_size(data: bytes) -> bytes:
    """Announce as many data bytes as there are."""
    dimensions, flags = data[6], data[7]
    (codebook,) = struct.unpack("<I", data[8:12])
    rest = len(data) - HEADER.size - 4 * dimensions - (16 if flags & 4 else 0) - codebook
    return data[:12] + struct.pack("<Q", max(rest, 0)) + data[20:]


def test_fuzz_a_little() -> None:
    read, refused = fuzz(3000, seed=1)
    assert refused > 2000
    assert read > 0


@pytest.mark.slow
def test_fuzz_a_hundred_thousand() -> None:
    read, refused = fuzz(100_000, seed=2)
    assert read + refused == 100_000
    assert read > 1000, "the forged frames must get past the checks, or the decoder is not tested"


def test_unpacking_never_reads_outside_the_payload() -> None:
    """Frames with random payloads behind valid lengths decode to some tensor, the same each time."""
    x = tensor((2, 6, 40, 40), 0, "relu")
    packed = pack(x, quantizer_for(DQA(bits=4, ratio=1.0), x), "joint")
    data = packed.to_bytes()
    start = len(data) - len(packed.data) + 200
    for seed in range(50):
        noise = random.Random(seed).randbytes(len(data) - start)
        hostile = sealed(data[:start] + noise)
        try:
            first = PackedActivation.from_bytes(hostile).unpack()
        except DQAError:
            continue
        assert torch.equal(first, PackedActivation.from_bytes(hostile).unpack())
