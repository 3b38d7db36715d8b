"""Models that several processes calibrate: each case gives the frozen model of one process or of many."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from dqa_plugins import (
    DQA,
    QPP,
    ActivationQuantizer,
    DenseSparse,
    Direct,
    NoisyQuant,
    allocate_bits,
    iter_quantizers,
    rank_channels,
)
from dqa_plugins.adapters.fx import get_qconfig_mapping
from dqa_plugins.distributed import sample_offset, synchronize
from dqa_plugins.storage import convert_stored, prepare_stored
from tests.nets import build

BATCH, PER_RANK = 5, 4  # samples of a batch, batches of a rank


def batches(ranks: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """All batches, those of rank 0 first: samples of very different size."""
    generator = torch.Generator().manual_seed(1)
    count = ranks * PER_RANK * BATCH
    widths = 10 ** (torch.rand(count, 1, 1, 1, generator=generator, dtype=torch.float64) * 6 - 3)
    x = torch.randn(count, 3, 9, 9, generator=generator, dtype=torch.float64) * widths
    return list(x.to(dtype).split(BATCH))


def own(rank: int, ranks: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The batches of a rank."""
    return batches(ranks, dtype)[rank * PER_RANK : (rank + 1) * PER_RANK]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    ).eval()


def by_hand(dtype: torch.dtype) -> nn.Module:
    """Every method and reduction, placed by hand."""
    methods = [
        DenseSparse(density=0.05),
        DQA(granularity="channel"),
        Direct(clip="mse", reduce="mean"),
        NoisyQuant(),
        DQA(qparams="dynamic"),
        DenseSparse(granularity="channel", density=0.1),
        Direct(symmetric=False, reduce="mean"),
    ]
    torch.manual_seed(0)
    layers: list[nn.Module] = [ActivationQuantizer(methods[0], name="q0", index=0)]
    for number, method in enumerate(methods[1:], 1):
        layers += [nn.Conv2d(3, 3, 1), ActivationQuantizer(method, name=f"q{number}", index=number)]
    return nn.Sequential(*layers).to(dtype).eval()


def prepared_fx(method: Any) -> nn.Module:
    mapping = get_qconfig_mapping(method, weight_bits=8)
    return prepare_fx(network(), mapping, (torch.zeros(1, 3, 9, 9),))


def brevitas_layers() -> nn.Module:
    """Brevitas' layers for the ReLUs, one of them with predicted parameters."""
    from dqa_plugins.adapters.brevitas import substitute_layers

    methods = {"1": DQA(bits=3), "3": Direct(bits=4, clip="mse", reduce="mean", qparams=QPP())}
    return substitute_layers(network(), dict(methods))


def calibrating(name: str, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """The host's own mode in which a case collects its records."""
    if name != "brevitas":
        return contextlib.nullcontext()
    from brevitas.graph.calibrate import calibration_mode

    mode: contextlib.AbstractContextManager[Any] = calibration_mode(model)
    return mode


def freeze(model: nn.Module) -> nn.Module:
    for _, quantizer in iter_quantizers(model):
        quantizer.freeze()
    return model


def prepared_stored_model() -> nn.Module:
    """A residual network, one of whose stored values is dynamic in what it is packed with."""
    return prepare_stored(build("residual"), DQA(bits=4, qparams="dynamic"), (torch.zeros(1, 3, 9, 9),))


Case = tuple[Callable[[], nn.Module], Callable[[nn.Module], nn.Module], torch.dtype]
CASES: dict[str, Case] = {
    "by hand": (lambda: by_hand(torch.float32), freeze, torch.float32),
    "float64": (lambda: by_hand(torch.float64), freeze, torch.float64),
    "fx": (lambda: prepared_fx(DQA(bits=3)), convert_fx, torch.float32),
    "qpp": (lambda: prepared_fx(DenseSparse(density=0.05, qparams=QPP())), convert_fx, torch.float32),
    "qpp per channel": (
        lambda: prepared_fx(Direct(granularity="channel", qparams=QPP(mode="paper"))),
        convert_fx,
        torch.float32,
    ),
    "brevitas": (brevitas_layers, nn.Module.eval, torch.float32),  # leaving the mode freezes
    "stored": (prepared_stored_model, lambda model: convert_stored(model, coding="joint"), torch.float32),
}


def run(name: str, parts: list[Tensor], *, several: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(state before freezing, state after) of a case.

    Args:
        parts: batches of this process.
        several: other processes run it too.
    """
    build, finish, _ = CASES[name]
    model = build()
    with torch.no_grad(), calibrating(name, model):
        if several:
            sample_offset(model, sum(map(len, parts)))
        for x in parts:
            model(x)
        if several:
            synchronize(model)
        before = {key: value.clone() for key, value in model.state_dict().items()}
    return before, finish(model).state_dict()


class Looping(nn.Module):
    """No graph: its quantizers are searched with forwards of the whole model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second, self.last = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 5, 1), nn.Linear(5, 4)
        self.q0 = ActivationQuantizer(DQA(bits=2), name="q0", index=0)
        self.q1 = ActivationQuantizer(DQA(bits=2), name="q1", index=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.q0(self.first(x).relu())
        for _ in range(int(x.shape[1] > 0) + 1):
            x = self.q1(self.second(x))
        return self.last(x.mean((2, 3)))


def allocations(rank: int, ranks: int) -> dict[str, list[int]]:
    """Extra bits by allocate_bits with targets, with inputs alone, and with nothing; calibration shared by `ranks`."""
    x = batches(3)
    labelled = [(b, torch.arange(len(b)) % 4) for b in x[:3]]
    found = {}
    for name, given in {"targets": labelled, "inputs": x[:3], "nothing": []}.items():
        model = prepare_stored(build("residual"), DQA(bits=4), (torch.zeros(1, 3, 9, 9),))
        with torch.no_grad():
            for b in x[:12] if ranks == 1 else x[:12][rank * 12 // ranks : (rank + 1) * 12 // ranks]:
                model(b)
        if ranks > 1:
            synchronize(model)
        bits = allocate_bits(model, given, target_bits=0.8)
        found |= {f"{name}/{site}": vector.tolist() for site, vector in bits.items()}
    return found


def rankings() -> dict[str, Callable[[Any], Any]]:
    """Every strategy, on models that all processes calibrate alike; each takes a path for greedy's checkpoint."""
    x = batches(1)
    labelled = [(b, torch.arange(len(b)) % 4) for b in x]

    def fed(model: nn.Module) -> nn.Module:
        with torch.no_grad():
            for b in x:
                model(b)
        return model

    def graph() -> nn.Module:
        return fed(prepared_fx(DQA(bits=2)))

    def metric(outputs: Tensor, targets: Tensor) -> Tensor:
        return -(outputs - targets[:, None]).square().mean(1)

    return {
        "greedy": lambda path: rank_channels(graph(), labelled, checkpoint=path, progress=False),
        "greedy, small passes": lambda path: rank_channels(graph(), labelled, progress=False, memory=1),
        "greedy, own metric": lambda path: rank_channels(graph(), labelled, metric=metric, progress=False),
        "greedy, no graph": lambda path: rank_channels(fed(Looping()), labelled, progress=False),
        "taylor": lambda path: rank_channels(graph(), labelled, "taylor", progress=False),
        "taylor, no graph": lambda path: rank_channels(fed(Looping()), labelled, "taylor", progress=False),
        "error": lambda path: rank_channels(graph(), strategy="error", progress=False),
        "error, frozen": lambda path: rank_channels(freeze(fed(Looping())), labelled, "error", progress=False),
        "random": lambda path: rank_channels(graph(), strategy="random", progress=False),
    }
