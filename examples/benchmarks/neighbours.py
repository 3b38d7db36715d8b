"""What neighbours would tell the entropy coder: bits per activation with and without contexts.

    python -m examples.benchmarks.neighbours --target 1.4 [--json]

The stored codes of ResNet-32 (digits), steps allocated for --target bits; tables from 256 calibration images, bits on
the test images. Conditional entropies are those of an ideal arithmetic coder; units are runs of 2 or 4 symbols with a
prefix code of at most 12 bits, as the package codes them, alone or with one of 8 tables chosen by a context.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs as a file, too

from dqa_plugins import DQA
from dqa_plugins.storage import PackedActivation, allocate_bits, convert_stored, prepare_stored
from dqa_plugins.storage.coder import codec
from dqa_plugins.storage.coder.histograms import word_table
from dqa_plugins.storage.format.data import cut
from dqa_plugins.storage.model.sites import Pack

UNITS = ((2, 4), (2, 5), (4, 2), (4, 3))  # symbols of a unit, bits of a symbol
EDGES = (1, 2, 3, 5, 8, 12, 18)  # of the sums that choose one of 8 tables
CONTEXTS = ("none", "left", "up", "left and up")


@dataclass
class Codes:
    """Whole codes of one group of channels, (N, C, H, W): of the calibration and of the test images."""

    width: int
    signed: bool
    seen: NDArray[np.int64]
    test: NDArray[np.int64]


def stored_codes(target: float) -> tuple[list[Codes], float]:
    """The codes of every group of every stored value, and the bits that they really take."""
    from examples.networks import load
    from examples.networks.digits import calibration_subset, load_split

    model, _ = load("resnet32")
    split = load_split()
    images, labels = calibration_subset(split, 256, 0)
    prepared = prepare_stored(model, DQA(bits=4, granularity="channel"), images[:2])
    with torch.no_grad():
        prepared(images)
    allocate_bits(prepared, zip(images.split(64), labels.split(64), strict=True), target)
    stored = convert_stored(prepared, "joint")
    found: list[list[PackedActivation]] = []
    for x in (images, split.test_images):
        packed: list[PackedActivation] = []
        handles = [
            m.register_forward_hook(lambda _m, _i, out, packed=packed: packed.append(out))
            for m in stored.modules()
            if isinstance(m, Pack)
        ]
        with torch.no_grad():
            stored(x)
        for handle in handles:
            handle.remove()
        found.append(packed)
    result = []
    for pair in zip(*found, strict=True):
        whole = []
        for p in pair:
            parts = cut(p)
            whole.append(codec.decode_stored(p.codebook, parts.layout, parts.streams).view(p.shape).numpy())
        for g in pair[0].codebook.groups:
            seen, test = (w[:, list(g.channels)].astype(np.int64) for w in whole)
            result.append(Codes(g.width, g.signed, seen, test))
    bits = 8 * sum(p.nbytes for p in found[1]) / sum(p.numel for p in found[1])
    return result, bits


def sizes(codes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """|code| up to 7: of each value, of its left and of its upper neighbour (0 where there is none)."""
    own = np.minimum(np.abs(codes), 7)
    left, up = np.zeros_like(own), np.zeros_like(own)
    left[..., 1:], up[..., 1:, :] = own[..., :-1], own[..., :-1, :]
    return own, left, up


def conditional_bits(codes: Codes, context: str) -> float:
    """Bits of the test codes under an ideal coder."""
    low = min(int(codes.seen.min()), int(codes.test.min()))
    alphabet = max(int(codes.seen.max()), int(codes.test.max())) - low + 1

    def contexts(values: NDArray[np.int64]) -> NDArray[np.int64]:
        _, left, up = sizes(values)
        chosen = {"none": 0 * left, "left": left, "up": up, "left and up": left + up}[context]
        return np.minimum(chosen, 7).ravel()

    counts = np.zeros((8, alphabet))
    np.add.at(counts, (contexts(codes.seen), codes.seen.ravel() - low), 1)
    prior = (counts.sum(0) + 0.02) / (counts.sum(0) + 0.02).sum()
    chance = (counts + 4 * prior) / (counts.sum(1, keepdims=True) + 4)
    return float(-np.log2(chance[contexts(codes.test), codes.test.ravel() - low]).sum())


def unit_bits(codes: Codes, context: str) -> float:
    """Bits of the test codes with prefix coded units and their tables, the cheapest kind of unit."""
    alphabet, best = 1 << codes.width, np.inf
    for word, bits in UNITS:
        if bits > codes.width + 1 or codes.seen.shape[-1] % word:
            continue
        escape = (1 << bits) - 1
        lowest = (-(escape // 2)) % alphabet if codes.signed else 0
        size = 1 << (bits * word)

        def split(
            values: NDArray[np.int64], word: int = word, bits: int = bits, lowest: int = lowest
        ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
            symbols = np.minimum((values - lowest) % alphabet, (1 << bits) - 1).reshape(-1, word)
            _, left, up = sizes(values)
            total = up.reshape(-1, word).sum(1) + (word // 2) * left.reshape(-1, word)[:, 0] * (context != "up")
            chosen = np.searchsorted(EDGES, total, side="right") if context != "none" else np.zeros_like(total)
            return (symbols << (bits * np.arange(word))).sum(1), chosen

        (seen, seen_context), (test, test_context) = split(codes.seen), split(codes.test)
        counts = np.zeros((8, size))
        np.add.at(counts, (seen_context, seen), 1)
        prior = (counts.sum(0) + 0.01) / (counts.sum(0) + 0.01).sum()
        escapes = (((np.arange(size)[:, None] >> (bits * np.arange(word))) & escape) == escape).sum(1)
        cost = 0.0
        for k in range(8):
            if not counts[k].sum() and not (test_context == k).any():
                continue
            distinct = (counts[k] > 0).sum() + 1
            table = word_table((counts[k] + distinct * prior) / (counts[k].sum() + distinct), word, lowest, escape)
            length = table.lengths.astype(np.float64)
            each = np.where(length > 0, length + codes.width * escapes, length[-1] + codes.width * word)
            cost += each[test[test_context == k]].sum() + 8 * len(zlib.compress(table.lengths.tobytes(), 9))
        best = min(best, cost)
    return float(best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--target", type=float, default=1.4, help="stored bits that the steps are allocated for")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    arguments = parser.parse_args()
    target = arguments.target
    torch.set_num_threads(1)
    codes, stored = stored_codes(target)
    total = sum(c.test.size for c in codes)
    result = {"stored": stored}
    for context in CONTEXTS:
        result[f"entropy, context: {context}"] = sum(conditional_bits(c, context) for c in codes) / total
    for context in ("none", "up", "left and up"):
        result[f"units and tables, context: {context}"] = sum(unit_bits(c, context) for c in codes) / total
    if arguments.json:
        print(json.dumps({name: round(value, 3) for name, value in result.items()}, indent=1))
        return
    for name, value in result.items():
        print(f"{name:45s} {value:6.3f}")


if __name__ == "__main__":
    main()
