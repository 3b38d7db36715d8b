"""Greedy channel ranking against the naive search, side by side: same model, same batches, same threads.

    python -m examples.benchmarks.ranking                              # ResNet-32 on digits, several minutes
    python -m examples.benchmarks.ranking --every 16 --json            # a sixteenth of the naive candidates

The naive search is algorithm 3 written down: one full forward pass per channel and batch. It is written here on its
own, with nothing of `dqa_plugins.ranking`. Times are CPU seconds of the process, because the machine may be shared; the
ratio of wall times is reported too. With --json standard output is one JSON object and nothing else.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import prepare_fx

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs as a file, too

from dqa_plugins import DQA, ActivationQuantizer, iter_quantizers
from dqa_plugins.adapters.fx import get_qconfig_mapping
from dqa_plugins.ranking import RankTable, rank_channels
from examples.networks import load
from examples.networks.digits import batches as cut_batches
from examples.networks.digits import calibration_subset, load_split
from examples.quiet import quiet_hosts

Batches = list[tuple[Tensor, Tensor]]
Found = dict[str, dict[int, tuple[float, float]]]
NETWORKS = ("resnet32", "mobilenetv2")


class Candidate:
    """Forward of a frozen quantizer with zero extra bits: float, or Direct with one channel left out."""

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        self.quantizer = quantizer
        self.channel: int | None = None  # None: float

    def __call__(self, x: Tensor) -> Tensor:
        if self.channel is None:
            return x
        y = self.quantizer.fake_quantize(x)
        axis = self.quantizer.channel_axis % x.ndim
        y.select(axis, self.channel).copy_(x.select(axis, self.channel))
        return y


@torch.no_grad()
def naive_search(model: nn.Module, batches: Batches, every: int, guide: RankTable | None) -> Found:
    """One full forward pass per channel and batch.

    Args:
        model: prepared and calibrated; copied.
        every: score every so many channels only.
        guide: gives the best channel of each layer where not all are scored.

    Returns:
        {site name: {channel: (mean accuracy, mean cross-entropy)}}.
    """
    model = copy.deepcopy(model).eval()
    candidates = {}
    for name, quantizer in iter_quantizers(model):
        quantizer.set_extra_bits(torch.zeros(quantizer.num_channels, dtype=torch.int64))
        quantizer.freeze()
        candidates[name] = Candidate(quantizer)
        object.__setattr__(quantizer, "forward", candidates[name])
    found: Found = {}
    position = 0
    for name, candidate in candidates.items():
        found[name] = {}
        for channel in range(candidate.quantizer.num_channels or 0):
            position += 1
            if position % every:
                continue
            candidate.channel = channel
            hits, losses, count = [], [], 0
            for inputs, targets in batches:
                outputs = model(inputs)
                hits.append(float((outputs.argmax(1) == targets).sum()))
                losses += nn.functional.cross_entropy(outputs.double(), targets, reduction="none").tolist()
                count += len(targets)
            found[name][channel] = (math.fsum(hits) / count, math.fsum(losses) / count)
        if every == 1:
            candidate.channel = min(found[name], key=lambda c: (-found[name][c][0], found[name][c][1], c))
        elif guide is not None:
            candidate.channel = guide[name].order[0]
    return found


def compare(table: RankTable, naive: Found) -> dict[str, Any]:
    """Order, accuracies and cross-entropies of the table against those of the naive search."""
    same_order = same_accuracy = True
    largest = 0.0
    for layer in table:
        scored = naive[layer.name]
        expected = sorted(scored, key=lambda c: (-scored[c][0], scored[c][1], c))
        same_order &= [c for c in layer.order if c in scored] == expected
        for channel, (accuracy, loss) in scored.items():
            same_accuracy &= layer.scores[channel] == accuracy
            if layer.losses is not None:
                largest = max(largest, abs(layer.losses[channel] - loss))
    return {"same_order": same_order, "same_accuracy": same_accuracy, "largest_loss_difference": largest}


def timed(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """(result, CPU seconds of the process, wall seconds)."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return result, time.process_time() - cpu, time.perf_counter() - wall


def readable(result: dict[str, Any]) -> str:
    """The result as a short table."""
    lines = [
        f"{result['network']}, {result['images']} images, {result['channels']} channels in {result['layers']} layers",
        f"{'search':<14} {'CPU s':>8}  naive / this",
    ]
    for search in ("naive", "greedy", "taylor", "error"):
        seconds = result[f"{search}_seconds"]
        lines.append(f"{search:<14} {seconds:>8.2f}  {result['naive_seconds'] / seconds:>12.1f}")
    lines.append(f"greedy: same order {result['same_order']}, same accuracies {result['same_accuracy']}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet32", choices=NETWORKS)
    parser.add_argument("--images", type=int, default=128, help="images that channels are ranked on")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--qparams", default="static", choices=("static", "dynamic"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--every", type=int, default=1, help="time the naive search on every so many channels only")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    quiet_hosts()
    model, _ = load(options.network)
    images, labels = calibration_subset(load_split(), options.images)
    batches = cut_batches(images, labels, options.batch)
    method = DQA(bits=options.bits, qparams=options.qparams)
    prepared = prepare_fx(model, get_qconfig_mapping(method, weight_bits=None), (images[:2],))
    with torch.no_grad():
        for inputs, _ in batches:
            prepared(inputs)

    def rank(**settings: Any) -> Callable[[], RankTable]:
        return lambda: rank_channels(copy.deepcopy(prepared), batches, progress=False, **settings)

    # what torch prepares at its first passes is not part of the time
    rank_channels(copy.deepcopy(prepared), [tuple(part[:4] for part in batches[0])], progress=False)
    # ours before and after the naive search: the load of a shared machine drifts
    table, cpu_before, wall_before = timed(rank())
    naive, naive_cpu, naive_wall = timed(
        lambda: naive_search(prepared, batches, options.every, table if options.every > 1 else None)
    )
    _, cpu_after, wall_after = timed(rank())
    candidates = sum(layer.channels for layer in table)
    scored = sum(len(channels) for channels in naive.values())
    scale = candidates / scored
    cpu, wall = (cpu_before + cpu_after) / 2, (wall_before + wall_after) / 2
    result: dict[str, Any] = {
        "network": options.network,
        "method": repr(method),
        "images": options.images,
        "batch": options.batch,
        "threads": options.threads,
        "layers": len(table),
        "channels": candidates,
        "naive_channels_timed": scored,
        "naive_seconds": naive_cpu * scale,
        "greedy_seconds": cpu,
        "speedup_vs_naive": naive_cpu * scale / cpu,
        "naive_wall_seconds": naive_wall * scale,
        "greedy_wall_seconds": wall,
        "speedup_wall": naive_wall * scale / wall,
        **compare(table, naive),
    }
    for strategy in ("taylor", "error"):
        _, seconds, _ = timed(rank(strategy=strategy))
        result[f"{strategy}_seconds"] = seconds
    result["machine"] = f"{platform.machine()}, torch {torch.__version__}"

    sys.stdout.write((json.dumps(result, indent=1) if options.json else readable(result)) + "\n")
    return result


if __name__ == "__main__":
    main()
