"""One network in one room: measured here, in the process that calls it. `run` gives each cell a process of its own."""

from __future__ import annotations

import copy
import io
import math
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dqa_plugins import DQA, ActivationQuantizer, Direct, iter_quantizers
from dqa_plugins.export import onnxruntime_session, to_onnx
from dqa_plugins.report import placement_report
from dqa_plugins.storage import NothingToStore, convert_stored, prepare_stored, stored_edges

from .hosts import ROOMS, STOCK, for_room, quantize_model
from .networks import NETWORKS
from .same_sites import EXCHANGE, at_sites_of_the_host
from .table import misses_stock

CALIBRATION, TEST = (1, 2), 9  # seeds of batches
METHODS = {8: Direct(bits=8), 4: DQA(bits=4)}
EXPORTED = 12  # quantizers of a network that go to ONNX Runtime, evenly spread
STORABLE = ("fx", "pt2e")  # what prepare_stored takes

Cell = dict[str, Any]


def flat(outputs: Any) -> list[Tensor]:
    """The floating-point tensors of a result."""
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() else []
    parts = outputs.values() if isinstance(outputs, dict) else outputs if isinstance(outputs, tuple | list) else ()
    return [tensor for part in parts for tensor in flat(part)]


def distance(found: Any, expected: Any) -> float:
    """Relative error over all outputs, each with the same weight; infinite where a value is not finite."""
    errors = [
        float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-12))
        for a, b in zip(flat(found), flat(expected), strict=True)
    ]
    mean = sum(errors) / len(errors)
    return mean if math.isfinite(mean) else math.inf


def equal(found: Any, expected: Any) -> bool:
    """Bit-equal outputs."""
    return all(torch.equal(a, b) for a, b in zip(flat(found), flat(expected), strict=True))


def measure(network: str, room: str, save: Callable[[Cell], None]) -> Cell:
    """Everything of one cell.

    Args:
        network: a name in NETWORKS.
        room: in ROOMS.
        save: called after every step with what is known so far and, as "step", what begins: a cell that is stopped
            keeps it.

    Returns:
        sites, floats ({reason: layers}), error8, error4, stock (or what failed, by step) and the checks. Where 8 bits
        miss what the host reaches, same_sites: their error with quantizers where the host's int8 has its own only.
    """
    begun = time.process_time()
    entry, cell = NETWORKS[network], Cell(network=network, room=room, failed={})

    @contextmanager
    def step(name: str) -> Iterator[None]:
        save({**cell, "step": name})
        try:
            yield
        except Exception as error:
            cell["failed"][name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            cell.setdefault("trace", {})[name] = _lines(error)

    with torch.no_grad(), step("float"):
        model = entry.model()
        batches, test = [entry.batch_of(seed) for seed in CALIBRATION], entry.batch_of(TEST)
        expected = model(*test)
    if cell["failed"]:
        return {**cell, "seconds": 0.0}
    given = model
    with step("trace"):
        model, cell["tracer"] = for_room(model, room, test)
    if cell["failed"]:
        return {**cell, "seconds": 0.0}
    with torch.no_grad(), step("stock"):
        started = time.process_time()
        stock, cell["stock_by"] = STOCK[room](given if room == "brevitas" else model, batches)
        cell["stock_seconds"] = round(time.process_time() - started, 2)
        cell["stock"] = distance(stock(*test), expected)
    quantized: dict[int, nn.Module] = {}
    for bits, method in METHODS.items():
        with torch.no_grad(), step(f"{bits} bits"):
            started = time.process_time()
            quantized[bits] = quantize_model(room)(copy.deepcopy(model), method, batches)
            cell[f"seconds{bits}"] = round(time.process_time() - started, 2)
            cell[f"error{bits}"] = distance(quantized[bits](*test), expected)
    if misses_stock(cell) and room in EXCHANGE:
        with torch.no_grad(), step("same sites"):
            same = at_sites_of_the_host(room, stock, METHODS[8], batches)
            cell["same_sites"] = distance(same(*test), expected)
    if 4 in quantized:
        _check(cell, step, quantized[4], batches, test)
    cell["seconds"] = round(time.process_time() - begun, 1)
    return cell


def _check(
    cell: Cell, step: Any, model: nn.Module, batches: list[tuple[Tensor, ...]], test: tuple[Tensor, ...]
) -> None:
    """What has to hold of a quantized model."""
    sites = dict(iter_quantizers(model))
    cell["sites"] = len(sites)
    with step("floats"):
        report = placement_report(model)
        cell["floats"] = dict(Counter(reason for _, reason in report.floats))
        cell["default_axes"] = sum(not row.axis_told for row in report.sites)
    with torch.no_grad(), step("batch"):
        result, calls = recorded(model, sites, test)
        cell["silent"] = [name for name in sites if name not in calls]
        cell["batch"] = [name for name, x in calls.items() if not independent(sites[name], x)]
    with torch.no_grad(), step("deepcopy"):
        cell["deepcopy"] = equal(copy.deepcopy(model)(*test), result)
    with torch.no_grad(), step("state_dict"):
        cell["state_dict"] = reloads(model, test, result)
    if cell["room"] in STORABLE:
        with torch.no_grad(), step("stored"):
            cell["stored"] = stored(model, batches, test, result)
    if cell["room"] == ROOMS[list(NETWORKS).index(cell["network"]) % len(ROOMS)]:
        with torch.no_grad(), step("onnxruntime"):
            cell["onnxruntime"] = exported(sites, calls)


def recorded(
    model: nn.Module, sites: dict[str, ActivationQuantizer], test: tuple[Tensor, ...]
) -> tuple[Any, dict[str, Tensor]]:
    """(the output, {site: what its quantizer was fed, at its first call})."""
    calls: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(_module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            calls.setdefault(name, inputs[0])

        return record

    hooks = [quantizer.register_forward_hook(hook(name)) for name, quantizer in sites.items()]
    result = model(*test)
    for handle in hooks:
        handle.remove()
    return result, calls


def independent(quantizer: ActivationQuantizer, x: Tensor) -> bool:
    """Whether every sample alone gives what it gives in the batch, with static and with dynamic parameters."""
    probe = ActivationQuantizer(
        quantizer.method.replace(qparams="dynamic"), name=quantizer.name, producer_axis=quantizer.channel_axis
    )
    probe(x)
    probe.freeze()
    return all(
        torch.equal(q(x)[k : k + 1], q(x[k : k + 1])) for q in (quantizer, probe) for k in {0, len(x) // 2, len(x) - 1}
    )


def reloads(model: nn.Module, test: tuple[Tensor, ...], result: Any) -> bool:
    """Whether a copy with other weights and scales computes the same once it has the model's state again."""
    with io.BytesIO() as file:
        torch.save(model.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    other = copy.deepcopy(model)
    for name, tensor in (*other.named_parameters(), *other.named_buffers()):
        if name in state and tensor.is_floating_point():
            tensor.mul_(1.25)
    other.load_state_dict(state)
    return equal(other(*test), result)


def stored(model: nn.Module, batches: list[tuple[Tensor, ...]], test: tuple[Tensor, ...], result: Any) -> str:
    """Whether the model computes the same with the room's quantized values held as packed bytes."""
    own = {name for name, _ in iter_quantizers(model)}
    try:
        prepared = prepare_stored(model, METHODS[4], batches[0])
        others = tuple(edge.name for edge in stored_edges(prepared) if edge.name not in own)
        if others:
            prepared = prepare_stored(model, METHODS[4], batches[0], skip=others)
    except NothingToStore:
        return "nothing"
    if any(edge.name not in own for edge in stored_edges(prepared)):
        return "other values too"  # which quantizes more than the room did
    for batch in batches:
        prepared(*batch)
    return "equal" if equal(convert_stored(prepared, coding="none")(*test), result) else "differs"


class SideBySide(nn.Module):
    """Several quantizers, each fed its own tensor: one export for all of them."""

    def __init__(self, quantizers: list[ActivationQuantizer]) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList(quantizers)

    def forward(self, *xs: Tensor) -> list[Tensor]:
        return [quantizer(x) for quantizer, x in zip(self.quantizers, xs, strict=True)]


def exported(sites: dict[str, ActivationQuantizer], calls: dict[str, Tensor]) -> dict[str, Any]:
    """Quantizers in ONNX Runtime, fed the tensors of the network: how many, and which are a step off anywhere."""
    names = list(calls)[:: max(1, -(-len(calls) // EXPORTED))]
    side = SideBySide([copy.deepcopy(sites[name]) for name in names]).eval()
    tensors = tuple(calls[name].contiguous() for name in names)
    off = set()
    with tempfile.TemporaryDirectory() as folder:
        path = to_onnx(side, tensors, Path(folder) / "quantizers.onnx", dynamic_batch=False)
        for optimize in (True, False):
            found = onnxruntime_session(path, optimize=optimize, threads=1)(*tensors)
            for name, x, y, z in zip(names, tensors, side(*tensors), found, strict=True):
                tolerance = torch.minimum(0.5 * sites[name].grid(x).step, 1e-6 * x.abs().max())
                if not bool(((y - z).abs() <= tolerance).all()):
                    off.add(name)
    return {"quantizers": len(names), "off": sorted(off)}


def _lines(error: Exception) -> list[str]:
    """Where an error was raised: the last lines of its traceback, without folders."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return [f"{'/'.join(Path(f.filename).parts[-3:])}:{f.lineno} {f.name}" for f in frames]
