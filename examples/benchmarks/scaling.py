"""How preparing, calibrating, converting, merging and ranking grow with sites, channels and processes.

    python -m examples.benchmarks.scaling                                       # one process: sites
    torchrun --nproc-per-node 2 -m examples.benchmarks.scaling                  # merging and ranking

CPU seconds of a process (of rank 0), so that a busy machine does not count. The tables of docs/distributed.md.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from dqa_plugins import DQA, ActivationQuantizer, DenseSparse, iter_quantizers, rank_channels
from dqa_plugins.adapters.fx import get_qconfig_mapping
from dqa_plugins.distributed import synchronize
from examples.quiet import quiet_hosts


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What work returns, and its CPU seconds."""
    begun = time.process_time()
    return work(), time.process_time() - begun


class Residual(nn.Module):
    """Linear layers, ReLUs and additions: three sites for each pair of `layers`."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(layers))
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x) * 0.01
        return self.last(x)


def sites() -> None:
    """Prepare, one forward of 16 samples, and convert, of a network with 200, 600 and 2,000 sites."""
    print("room, sites, prepare, calibrate, convert")
    x = torch.randn(16, 8)
    for layers in (66, 200, 666):
        net = Residual(layers).eval()
        prepared, first = timed(lambda net=net: prepare_fx(net, get_qconfig_mapping(DQA()), (x,)))
        _report("fx", prepared, x, first, convert_fx)
    try:
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    except ImportError:
        return
    from dqa_plugins.adapters.pt2e import PluginQuantizer

    for layers in (66, 200, 666):
        graph = torch.export.export(Residual(layers).eval(), (x,)).module()
        prepared, first = timed(lambda graph=graph: prepare_pt2e(graph, PluginQuantizer().set_global(DQA())))
        _report("pt2e", prepared, x, first, convert_pt2e)


def _report(room: str, prepared: nn.Module, x: Tensor, first: float, convert: Callable[[nn.Module], nn.Module]) -> None:
    with torch.no_grad():
        _, second = timed(lambda: prepared(x))
    quantized, third = timed(lambda: convert(prepared))
    print(f"{room}, {len(list(iter_quantizers(quantized)))}, {first:.2f}, {second:.2f}, {third:.2f}")


def merging() -> None:
    """synchronize on models of quantizers alone."""
    rank = dist.get_rank()
    if rank == 0:
        print("method, layers, channels, ranks, KiB per site, synchronize")
    for method in (DQA(), DenseSparse()):
        for layers, channels in ((100, 64), (300, 64), (1000, 64), (100, 1000), (10, 10_000), (10, 100_000)):
            model = nn.Sequential(*(ActivationQuantizer(method, name=f"q{k}", index=k) for k in range(layers)))
            x = torch.randn(32, channels, 8 if channels < 10_000 else 1, generator=torch.Generator().manual_seed(rank))
            for _ in range(2):
                model(x)
            held = sum(b.numel() * b.element_size() for b in model[0].calibration.buffers())
            _, seconds = timed(lambda model=model: synchronize(model))
            if rank == 0:
                kind = type(method).__name__
                print(f"{kind}, {layers}, {channels}, {dist.get_world_size()}, {held / 1024:.1f}, {seconds:.3f}")


def ranking() -> None:
    """Greedy ranking of 64 channels in each of 5 layers, on 64 images."""
    torch.manual_seed(0)
    layers = [layer for k in range(6) for layer in (nn.Conv2d(3 if k == 0 else 64, 64, 3), nn.ReLU())]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()
    x, labels = torch.randn(64, 3, 20, 20), torch.arange(64) % 10
    prepared = prepare_fx(net, get_qconfig_mapping(DQA(bits=3), skip=("first", "last")), (x[:1],))
    with torch.no_grad():
        prepared(x)
    _, seconds = timed(lambda: rank_channels(prepared, [(x, labels)], progress=False))
    if not dist.is_initialized() or dist.get_rank() == 0:
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        print(f"greedy, {ranks} ranks, {seconds:.1f} CPU seconds of rank 0")


def main() -> None:
    quiet_hosts()
    torch.set_num_threads(1)
    if "WORLD_SIZE" not in os.environ:
        if "ranking" not in sys.argv:
            sites()
        ranking()
        return
    dist.init_process_group("gloo")
    merging()
    ranking()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
