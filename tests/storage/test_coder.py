"""Code lengths, canonical codes, the kernels against the torch reference, and a bit-by-bit decoder against both."""

from __future__ import annotations

import heapq
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dqa_plugins import DQA, ActivationQuantizer
from dqa_plugins.errors import NonFiniteInput
from dqa_plugins.storage import CorruptFrame, pack
from dqa_plugins.storage.coder import codec, engine, reference
from dqa_plugins.storage.coder.histograms import best_table, cluster, entropy_bits, symbol_table
from dqa_plugins.storage.coder.huffman import code_lengths
from dqa_plugins.storage.format.data import cut
from dqa_plugins.storage.format.outliers import decode_positions, encode_positions
from dqa_plugins.storage.format.tables import NO_ESCAPE, canonical_codes, check_lengths
from tests.storage.cases import frozen, quantizer_for, tensor


def huffman_cost(weights: np.ndarray) -> float:
    """Total length of a Huffman code by the textbook's heap."""
    heap = list(weights)
    heapq.heapify(heap)
    total = 0.0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        total += merged
        heapq.heappush(heap, merged)
    return total


@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=40))
def test_lengths_are_optimal_without_a_limit(weights: list[int]) -> None:
    array = np.array(weights, np.float64)
    lengths = code_lengths(array, 40)
    check_lengths(lengths, 40)
    assert (lengths * array).sum() == huffman_cost(array)


@given(st.lists(st.integers(0, 10**9), min_size=8, max_size=60), st.integers(6, 12))
def test_limited_lengths_form_a_complete_code(weights: list[int], limit: int) -> None:
    array = np.array([*weights, 1, 1], np.float64)
    lengths = code_lengths(array, limit)
    check_lengths(lengths, limit)
    assert ((lengths > 0) == (array > 0)).all()
    used = np.flatnonzero(array)
    for a, b in itertools.pairwise(used[np.argsort(array[used])]):
        assert array[a] == array[b] or lengths[a] >= lengths[b], "a likelier unit has a longer code"


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=64))
def test_codes_are_prefix_free(weights: list[int]) -> None:
    lengths = code_lengths(np.array(weights, np.float64), 12)
    codes = canonical_codes(lengths)
    words = sorted(format(int(c), f"0{n}b")[::-1] for c, n in zip(codes, lengths, strict=True))
    assert not any(b.startswith(a) for a, b in itertools.pairwise(words))


def test_incomplete_codes_are_refused() -> None:
    for lengths in ([1, 2, 0], [1], [0, 0], [1, 1, 1], [13, 1, 2]):
        with pytest.raises(CorruptFrame):
            check_lengths(np.array(lengths, np.uint8), 12)


@settings(max_examples=30)
@given(frozen(), st.sampled_from(["none", "shift_error", "joint"]))
def test_kernels_and_reference_write_the_same_bytes(
    case: tuple[ActivationQuantizer, torch.Tensor], coding: str
) -> None:
    quantizer, x = case
    packed = pack(x, quantizer, coding)
    parts = cut(packed)
    codes = codec.decode_stored(packed.codebook, parts.layout, parts.streams)
    lengths, sizes, pieces = reference.encode(parts.layout, codes)
    assert (lengths == parts.streams.lengths).all()
    assert (sizes == parts.streams.sizes).all()
    assert b"".join(p.tobytes() for p in pieces) == parts.streams.source.tobytes()
    source = torch.from_numpy(parts.streams.source.copy())
    again = reference.decode(parts.layout, source, parts.streams.offsets, parts.streams.lengths)
    assert torch.equal(again.to(torch.int32), codes)


def test_a_chunk_decoded_bit_by_bit() -> None:
    """The format page's description, followed literally for one chunk of shift errors."""
    x = tensor((1, 1, 64, 64), 3, "normal")
    quantizer = quantizer_for(DQA(bits=4, extra_bits=3, ratio=1.0, signed=True), x)
    packed = pack(x, quantizer, "shift_error")
    (group,) = packed.codebook.groups
    data = packed.data.numpy()
    lengths = data[:8].view(np.uint16).astype(int)
    at = 8 + 4 * 512  # four stored lengths, then 4-bit planes of 512 bytes
    sizes = group.table.lengths
    codes = canonical_codes(sizes)
    words = {format(int(c), f"0{n}b")[::-1]: s for s, (c, n) in enumerate(zip(codes, sizes, strict=True))}
    errors = np.zeros(4096, int)
    for s in range(4):
        bits = iter(np.unpackbits(data[at : at + lengths[s]], bitorder="little"))
        for k in range(1024):
            word = ""
            while word not in words:
                word += str(next(bits))
            errors[(k // 16) * 64 + 16 * s + k % 16] = words[word]
        at += lengths[s]
    high = [(int(data[8 + (4 * (i // 512)) // 8 * 512 + i % 512]) >> (4 * (i // 512) % 8)) & 15 for i in range(4096)]
    q = np.array([(h - 16 if h > 7 else h) * 8 for h in high]) + errors
    step = float(quantizer.scale) / 8
    wanted = quantizer(x).flatten().numpy()
    assert (q.astype(np.float32) * np.float32(step) == wanted).all()


def test_decoder_entries_always_advance() -> None:
    """No window of bits, valid or not, may stall the decoder or make it emit more than six symbols."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        values = rng.geometric(rng.uniform(0.05, 0.95), (4, 400)) % 128
        for neighbours in (False, True):
            table, _ = best_table(values.astype(np.int64), 7, True, neighbours)
            count, bits = (table.decoder >> np.uint64(48)) & np.uint64(255), table.decoder >> np.uint64(56)
            assert count.min() >= 1
            assert count.max() <= 6
            assert bits.min() >= 1
            assert bits.max() <= 12


def test_tables_come_close_to_the_entropy() -> None:
    rng = np.random.default_rng(0)
    for spread in (0.2, 0.5, 1.0, 3.0, 10.0):
        values = np.clip(np.rint(rng.laplace(0, spread, (8, 8192))), -64, 63).astype(np.int64) & 127
        entropy = float(entropy_bits(np.bincount(values.ravel(), minlength=128).astype(float))) / values.size
        _, cost = best_table(values, 7, True, False)
        assert entropy - 1e-6 <= cost <= entropy * 1.02 + 0.06, (spread, entropy, cost)


def test_words_learn_from_neighbours() -> None:
    """Runs of equal symbols cost less than their order-0 entropy."""
    rng = np.random.default_rng(0)
    values = np.repeat(rng.integers(0, 4, (4, 2048)), 4, axis=1)
    _, known = best_table(values, 2, False, True)
    _, unknown = best_table(values, 2, False, False)
    assert known < 0.7 < 1.9 < unknown


def test_like_channels_share_a_table() -> None:
    rng = np.random.default_rng(0)
    counts = np.stack([np.bincount(rng.geometric(p, 4000) % 64, minlength=64) for p in [0.1, 0.9] * 10]).astype(float)
    labels = cluster(counts)
    assert set(labels[::2]).isdisjoint(labels[1::2])
    assert labels.max() < 8


def test_symbols_that_calibration_missed_still_have_a_code() -> None:
    table, _ = best_table(np.zeros((1, 100), np.int64), 7, True, False)
    assert table.word > 1 or (table.lengths > 0).all()
    full = symbol_table(np.full(128, 1 / 128))
    assert full.escape == NO_ESCAPE
    assert (full.lengths == 7).all()


@given(st.lists(st.booleans(), max_size=300), st.integers(0, 40))
def test_outlier_positions(mask: list[bool], stretch: int) -> None:
    array = np.array(mask, bool)
    if stretch:
        array = np.pad(array, (stretch * 400, stretch))
    data, bitmap = encode_positions(array)
    found = decode_positions(data, int(array.sum()), array.size, bitmap)
    assert (found == np.flatnonzero(array)).all()
    assert len(data) <= (array.size + 7) // 8


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_give_the_same_bytes(threads: int) -> None:
    """Ranges are coded by whichever thread is free, and put together in order."""
    x = torch.rand(3, 5, 400, 401, generator=torch.Generator().manual_seed(0))
    quantizer = quantizer_for(DQA(bits=3), x)
    engine.set_threads(1)
    try:
        wanted = pack(x, quantizer, "joint")
        engine.set_threads(threads)
        found = pack(x, quantizer, "joint")
        assert torch.equal(found.data, wanted.data)
        assert torch.equal(found.unpack(), quantizer(x))
        x[2, 4, -1, -1] = float("nan")  # in the last range
        with pytest.raises(NonFiniteInput):
            pack(x, quantizer, "joint")
    finally:
        engine.set_threads(None)


FORK = """
import os, signal, sys, torch
from dqa_plugins import ActivationQuantizer, DQA
from dqa_plugins.storage import pack, set_threads
torch.set_num_threads(2)
set_threads(2)
quantizer, x = ActivationQuantizer(DQA(bits=4), name="site"), torch.randn(8, 64, 64, 64)
quantizer(x)
quantizer.freeze()
wanted = pack(x, quantizer, "joint")
child = os.fork()
if child == 0:
    signal.alarm(40)  # ends it if it waits
    found = pack(x, quantizer, "joint")
    os._exit(0 if found.to_bytes() == wanted.to_bytes() and torch.equal(found.unpack(), quantizer(x)) else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_packs_too() -> None:
    """The threads of the parent are not its own: it must not wait for them."""
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
