"""Speed and size of the packed-storage codec on real activations, beside memcpy, bitarray and zstd.

    python -m examples.benchmarks.storage --json

Fused quantize + encode and decode + dequantize of at least 6 M activations, n = 4, m = 3, every channel important (the
worst case), one thread unless said. All candidates run side by side in one process, in shuffled order, over rotating
inputs; times are medians of CPU time of the thread (wall-clock for two threads). Needs bitarray and zstandard.

Fields, all dimensionless ratios unless a unit is in the name (`_joint`: coding "joint", else "shift_error"):
    encode_vs_memcpy, decode_vs_memcpy      time over that of a float32 copy of the tensor; lower is better
    encode_vs_bitarray, decode_vs_bitarray  speed of the Huffman coder over bitarray's canonical one: the same shift
                                            errors (joint: whole codes) in, bits out, and back; higher is better
    encode_fused_vs_bitarray, decode_fused_vs_bitarray   the same against all that pack and unpack do: ours quantizes
                                            and packs the n-bit codes besides, bitarray only codes the shift errors
    encode_huffman_vs_memcpy, decode_huffman_vs_memcpy   time of the Huffman coder alone over that of the copy
    encode_vs_zstd1, decode_vs_zstd1        speed of pack and unpack over zstd level 1 on the packed codes
    encode_two_threads, decode_two_threads  speed of two threads over one, wall-clock
    encode_two_threads_cpu, decode_two_threads_cpu   the same by CPU time of the calling thread: what a second core that
                                            is idle would give, where the machine has none to spare
    bits_none, bits_shift_error, bits_joint, bits_auto, bits_zstd1   stored bits per activation, all side information
    bits_entropy_shift_error, bits_entropy_joint                     n + order-0 entropy; order-0 entropy of the codes
With --json also "machine": cores, threads, the load at the end.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs as a file, too

from dqa_plugins import DQA, ActivationQuantizer
from dqa_plugins.storage import Codebook, calibrate_tables, pack, set_threads
from dqa_plugins.storage.coder import engine
from dqa_plugins.storage.format.layout import Group, Layout
from examples.benchmarks.machine import machine

COUNT = 6_291_456  # values of one input
SLICE = 16  # bitarray works on one part in 16
BITS, EXTRA = 4, 3


def activations(inputs: int, seed: int = 0) -> list[Tensor]:
    """`inputs` tensors (B, 16, 16, 16) of COUNT values: the first shortcuts of the digits ResNet-32, shuffled."""
    from examples.networks import load
    from examples.networks.digits import augment, load_split

    model, _ = load("resnet32")
    images = load_split().train_images
    captured: list[Tensor] = []
    handles = [
        block.relu2.register_forward_hook(lambda _m, _i, out: captured.append(out.detach().clone()))
        for block in model.blocks[:4]
    ]
    generator = torch.Generator().manual_seed(seed)
    while sum(t.numel() for t in captured) < inputs * COUNT:
        with torch.no_grad():
            model(augment(images, generator))
    for handle in handles:
        handle.remove()
    per_input = COUNT // captured[0][0].numel()
    pool = torch.cat(captured)
    pool = pool[torch.randperm(len(pool), generator=generator)]
    return [pool[i * per_input : (i + 1) * per_input].clone() for i in range(inputs)]


class Clock:
    """Medians of many candidates that take turns."""

    def __init__(self, repeats: int, timer: Callable[[], float] = time.thread_time) -> None:
        self.repeats, self.timer = repeats, timer

    def run(self, jobs: dict[str, Callable[[int], Any]]) -> dict[str, float]:
        """Median seconds of each job; a job takes the number of the input to work on."""
        times: dict[str, list[float]] = {name: [] for name in jobs}
        order = list(jobs)
        shuffle = random.Random(0)
        for name in order:
            jobs[name](0)
        for turn in range(self.repeats):
            shuffle.shuffle(order)
            for name in order:
                start = self.timer()
                jobs[name](turn)
                times[name].append(self.timer() - start)
        return {name: float(np.median(t)) for name, t in times.items()}


def entropy(symbols: np.ndarray) -> float:
    """Order-0 entropy in bits per symbol."""
    share = np.bincount(symbols) / symbols.size
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def bitarray_jobs(symbols: list[np.ndarray]) -> dict[str, Callable[[int], Any]]:
    """Encoding and decoding with bitarray's canonical Huffman code, on lists of symbols."""
    from bitarray import bitarray, util

    counts = np.bincount(np.concatenate(symbols))
    code, lengths, order = util.canonical_huffman({i: int(c) for i, c in enumerate(counts) if c})
    lists = [s.tolist() for s in symbols]
    coded = []
    for values in lists:
        bits = bitarray()
        bits.encode(code, values)
        coded.append(bits)

    def encode(turn: int) -> None:
        bitarray().encode(code, lists[turn % len(lists)])

    def decode(turn: int) -> list[int]:
        return list(util.canonical_decode(coded[turn % len(coded)], lengths, order))

    return {"encode": encode, "decode": decode}


def huffman_jobs(symbols: list[Tensor], book: Codebook) -> dict[str, Callable[[int], Any]]:
    """Encoding and decoding with our Huffman coder and nothing else, on int16 symbols (B, C, I) of the coded part."""
    batch, channels, inner = symbols[0].shape
    groups = tuple(Group(g.channels, g.coded[1], False, (), (0, g.coded[1]), g.table) for g in book.groups)
    plan = engine.KernelPlan(Layout(batch, channels, inner, groups))
    ones = torch.ones(1, channels)
    coded = []
    for values in symbols:
        lengths, sizes, pieces = engine.encode(plan, None, values, ones)
        coded.append((np.concatenate(pieces), np.concatenate([[0], np.cumsum(sizes)]), lengths))
    out = torch.empty_like(symbols[0])

    def encode(turn: int) -> None:
        engine.encode(plan, None, symbols[turn % len(symbols)], ones)

    def decode(turn: int) -> None:
        engine.decode(plan, *coded[turn % len(coded)], ones, None, out)

    for turn, values in enumerate(symbols):
        decode(turn)
        if not torch.equal(out, values):
            raise RuntimeError("the Huffman coder did not give the symbols back")
    return {"encode": encode, "decode": decode}


def measure(repeats: int) -> dict[str, float]:
    """All fields."""
    import zstandard

    torch.set_num_threads(1)
    inputs = activations(3)
    method = DQA(bits=BITS, extra_bits=EXTRA, ratio=1.0, signed=True)
    quantizer = ActivationQuantizer(method, name="shortcut")
    quantizer(inputs[0])
    quantizer.freeze()
    step = float(quantizer.scale) / 2**EXTRA
    out = torch.empty_like(inputs[0])
    result: dict[str, float] = {"activations": float(inputs[0].numel())}
    codes = [(quantizer(x) / step).round().to(torch.int16).numpy().ravel() for x in inputs]
    errors = [(c & (2**EXTRA - 1)).astype(np.int64) for c in codes]
    whole = [(c & (2 ** (BITS + EXTRA) - 1)).astype(np.int64) for c in codes]
    codebooks = {c: calibrate_tables(quantizer, inputs[0], c) for c in ("none", "shift_error", "joint", "auto")}
    packed = {c: [pack(x, quantizer, c, book) for x in inputs] for c, book in codebooks.items()}
    for coding, tensors in packed.items():
        if not all(torch.equal(p.unpack(), quantizer(x)) for p, x in zip(tensors, inputs, strict=True)):
            raise RuntimeError(f"{coding}: unpacking did not give the fake-quantized tensor")
        result[f"bits_{coding}"] = 8 * (tensors[0].nbytes + tensors[0].codebook_nbytes) / tensors[0].numel
    result["bits_entropy_shift_error"] = BITS + entropy(errors[0])
    result["bits_entropy_joint"] = entropy(whole[0])

    compressor, decompressor = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
    plain = [p.data.numpy().tobytes() for p in packed["none"]]
    squeezed = [compressor.compress(p) for p in plain]
    result["bits_zstd1"] = 8 * len(squeezed[0]) / inputs[0].numel()
    count = len(inputs)
    jobs: dict[str, Callable[[int], Any]] = {
        "memcpy": lambda t: out.copy_(inputs[t % count]),
        "zstd encode": lambda t: compressor.compress(plain[t % count]),
        "zstd decode": lambda t: decompressor.decompress(squeezed[t % count]),
    }
    for coding in ("none", "shift_error", "joint"):
        jobs[f"{coding} encode"] = lambda t, c=coding: pack(inputs[t % count], quantizer, c, codebooks[c])
        jobs[f"{coding} decode"] = lambda t, c=coding: packed[c][t % count].unpack(out=out)
    part = inputs[0].numel() // SLICE
    for coding, symbols in (("shift_error", errors), ("joint", whole)):
        for name, job in bitarray_jobs([s[:part] for s in symbols]).items():
            jobs[f"bitarray {coding} {name}"] = job
        rows = [
            torch.from_numpy(s.astype(np.int16)).view(*x.shape[:2], -1) for s, x in zip(symbols, inputs, strict=True)
        ]
        for name, job in huffman_jobs(rows, codebooks[coding]).items():
            jobs[f"huffman {coding} {name}"] = job
    set_threads(1)
    seconds = Clock(repeats).run(jobs)
    for coding, suffix in (("shift_error", ""), ("joint", "_joint"), ("none", "_none")):
        for way in ("encode", "decode"):
            ours = seconds[f"{coding} {way}"]
            result[f"{way}_vs_memcpy{suffix}"] = ours / seconds["memcpy"]
            if coding != "none":
                alone, theirs = seconds[f"huffman {coding} {way}"], seconds[f"bitarray {coding} {way}"] * SLICE
                result[f"{way}_vs_bitarray{suffix}"] = theirs / alone
                result[f"{way}_fused_vs_bitarray{suffix}"] = theirs / ours
                result[f"{way}_huffman_vs_memcpy{suffix}"] = alone / seconds["memcpy"]
                result[f"{way}_vs_zstd1{suffix}"] = seconds[f"zstd {way}"] / ours
    result.update(two_threads(inputs, quantizer, packed, out, repeats))
    result["memcpy_gb_per_s"] = inputs[0].numel() * 4 / seconds["memcpy"] / 1e9
    return result


def two_threads(
    inputs: list[Tensor], quantizer: ActivationQuantizer, packed: dict[str, list[Any]], out: Tensor, repeats: int
) -> dict[str, float]:
    """Speed of two threads over one. Wall-clock is only meaningful where a second core is idle."""
    jobs = {}
    for threads in (1, 2):

        def encode(turn: int, threads: int = threads) -> None:
            set_threads(threads)
            pack(inputs[turn % len(inputs)], quantizer, "shift_error", packed["shift_error"][0].codebook)

        def decode(turn: int, threads: int = threads) -> None:
            set_threads(threads)
            packed["shift_error"][turn % len(inputs)].unpack(out=out)

        jobs[f"encode {threads}"], jobs[f"decode {threads}"] = encode, decode
    result = {}
    for suffix, timer in (("", time.perf_counter), ("_cpu", time.thread_time)):
        seconds = Clock(repeats, timer).run(jobs)
        for way in ("encode", "decode"):
            result[f"{way}_two_threads{suffix}"] = seconds[f"{way} 1"] / seconds[f"{way} 2"]
    set_threads(None)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--repeats", type=int, default=25)
    arguments = parser.parse_args()
    result = measure(arguments.repeats)
    if arguments.json:
        print(json.dumps({**result, "machine": machine()}, indent=2))
        return
    for name, value in result.items():
        print(f"{name:28s} {value:12.4g}")


if __name__ == "__main__":
    main()
