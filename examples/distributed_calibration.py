"""Calibrate and rank on several processes; every one ends with the same model, that of a single process.

    torchrun --nproc-per-node 2 -m examples.distributed_calibration

Real digits, offline, CPU (gloo), about half a minute. Works without torchrun too, as one process.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

sys.path.insert(0, str(Path(__file__).parents[1]))  # torchrun starts this file from anywhere

from dqa_plugins import DQA, QPP, DenseSparse, rank_channels
from dqa_plugins.adapters.fx import get_qconfig, get_qconfig_mapping
from dqa_plugins.distributed import sample_offset, synchronize
from examples.networks import load
from examples.networks.digits import calibration_subset, load_split
from examples.networks.scores import accuracy
from examples.quiet import quiet_hosts

SAMPLES, BATCH = 48, 8


def prepare() -> nn.Module:
    """ResNet-32, 4-bit DQA on its activations, thresholds predicted per sample on one of them."""
    model, _ = load("resnet32")
    mapping = get_qconfig_mapping(DQA(bits=4), skip=("first", "last"))
    mapping.set_module_name("blocks.7.relu2", get_qconfig(DenseSparse(bits=3, qparams=QPP(sites=("input",)))))
    prepared: nn.Module = prepare_fx(model, mapping, (torch.zeros(1, 1, 16, 16),))
    return prepared


@torch.no_grad()
def calibrate(prepared: nn.Module, images: Tensor) -> None:
    """Run a share of the images."""
    for batch in images.split(BATCH):
        prepared(batch)


def digest(model: nn.Module) -> str:
    """Of every parameter and buffer, and of the quantizers' states."""
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(name.encode())
        if isinstance(value, Tensor) and not value.is_quantized:
            found.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def main() -> None:
    quiet_hosts()
    torch.set_num_threads(1)
    several = "WORLD_SIZE" in os.environ
    if several:
        dist.init_process_group("gloo")
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)

    split = load_split()
    images, labels = calibration_subset(split, SAMPLES)
    mine = images.chunk(ranks)[rank]

    prepared = prepare()
    sample_offset(prepared, samples=len(mine))  # QPP draws its augmentation by the number of a sample
    calibrate(prepared, mine)
    synchronize(prepared)
    table = rank_channels(prepared, [(images[:32], labels[:32])], strategy="taylor", progress=False)
    quantized = convert_fx(prepared)
    print(f"rank {rank} of {ranks}: {len(mine)} images, model {digest(quantized)}, {len(table.layers)} layers ranked")

    if several:
        dist.destroy_process_group()
    if rank == 0:
        alone = prepare()
        calibrate(alone, images)
        rank_channels(alone, [(images[:32], labels[:32])], strategy="taylor", progress=False)
        same = digest(convert_fx(alone)) == digest(quantized)
        print(f"one process: {'the same model' if same else 'ANOTHER MODEL'}")
        print(f"accuracy {accuracy(quantized, split.test_images[:200], split.test_labels[:200]):.1f} %")


if __name__ == "__main__":
    main()
