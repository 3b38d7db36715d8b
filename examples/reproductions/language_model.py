"""A real language model: perplexity of SmolLM2-135M with weights of 8 bits and activations of 8, 6 and 4.

    python -m examples.reproductions.language_model --quick

Every method on the inputs of linear layers in Brevitas, PT2E and NNCF, which is what each host's own int8 quantizes,
and on every activation in PT2E and NNCF, whose default that is: sums, products and norms' outputs as well. Beside them
torchao's dynamic int8. Static parameters, one scale per tensor; the last layer stays float.
What is measured is written at once, and not measured again. --quick: 4 windows of 512 tokens instead of 8, 2 instead
of 4 to calibrate with.
"""

from __future__ import annotations

import copy
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dqa_plugins import DQA, DenseSparse, Direct, Method, NoisyQuant, iter_quantizers
from examples.networks.smollm import LanguageModel, perplexity, smollm, windows
from examples.reproductions import common

BITS = (8, 6, 4)
METHODS: tuple[type[Method], ...] = (Direct, DQA, NoisyQuant, DenseSparse)
LAST = "network.lm_head"
NAME, STOCK_NAME = "language_model", "int8 of the host"

Model = tuple[nn.Module, list[Tensor]]  # float, with its calibration windows


def judged(room: str, everywhere: bool) -> Callable[[LanguageModel, list[Tensor], Method], nn.Module]:
    """The room's quantize_model: of every activation but the logits, or of the inputs of linear layers."""

    def quantize(model: LanguageModel, calibration: list[Tensor], method: Method) -> nn.Module:
        import importlib

        found = importlib.import_module(f"dqa_plugins.adapters.{room}").quantize_model
        left = (LAST,) if everywhere else (LAST, *read_by_no_layer(model, calibration[0]))
        source = exported(model, calibration[0]) if room == "pt2e" else model
        quantized: nn.Module = found(source, {"": method} | dict.fromkeys(left), calibration)
        return quantized

    return quantize


def exported(model: LanguageModel, window: Tensor) -> nn.Module:
    """The model as PT2E takes it, exported once."""
    if not hasattr(exported, "module"):
        exported.module = torch.export.export(model, (window,)).module()  # type: ignore[attr-defined]
    return copy.deepcopy(exported.module)  # type: ignore[attr-defined,no-any-return]


@functools.cache
def read_by_no_layer(model: LanguageModel, window: Tensor) -> tuple[str, ...]:
    """The sites of a room that no linear layer reads, by its report; names are the same in all rooms."""
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    from dqa_plugins.adapters.pt2e import PluginQuantizer
    from dqa_plugins.report import placement_report

    quantizer = PluginQuantizer().set_global(Direct()).set_module_name(LAST, None)
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != LAST}
    sites = placement_report(prepare_pt2e(exported(model, window), quantizer)).sites
    return tuple(site.site for site in sites if not layers & set(site.readers))


def layer_by_layer(model: LanguageModel, calibration: list[Tensor], act_quant: Any, weight_quant: Any) -> nn.Module:
    """Brevitas' layerwise_quantize of the linear layers, with these quantizers of inputs and weights."""
    import brevitas.nn as qnn
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import layerwise_quantize

    options = {"input_quant": act_quant, "weight_quant": weight_quant, "return_quant_tensor": False}
    layers = {nn.Linear: (qnn.QuantLinear, options)}
    quantized: nn.Module = layerwise_quantize(copy.deepcopy(model), layers, name_blacklist=[LAST]).eval()
    with torch.no_grad(), calibration_mode(quantized):
        for window in calibration:
            quantized(window)
    return quantized


def brevitas(model: LanguageModel, calibration: list[Tensor], method: Method) -> nn.Module:
    """A method on the inputs of Brevitas' linear layers."""
    from brevitas.quant import Int8WeightPerChannelFloat

    from dqa_plugins.adapters.brevitas import get_act_quant

    return layer_by_layer(model, calibration, get_act_quant(method), Int8WeightPerChannelFloat)


LAYERS, EVERYWHERE = "inputs of linear layers", "every activation"
PLACES: dict[tuple[str, str], Callable[[LanguageModel, list[Tensor], Method], nn.Module]] = {
    ("brevitas", LAYERS): brevitas,
    ("pt2e", LAYERS): judged("pt2e", False),
    ("nncf", LAYERS): judged("nncf", False),
    ("pt2e", EVERYWHERE): judged("pt2e", True),
    ("nncf", EVERYWHERE): judged("nncf", True),
}


def stock_pt2e(model: LanguageModel, calibration: list[Tensor]) -> nn.Module:
    """X86InductorQuantizer: inputs of linear layers."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(model, (calibration[0],)).module(), quantizer)
    for window in calibration:
        prepared(window)
    quantized: nn.Module = convert_pt2e(prepared)
    return quantized


def stock_nncf(model: LanguageModel, calibration: list[Tensor]) -> nn.Module:
    """nncf.quantize for a transformer."""
    import nncf

    quantized: nn.Module = nncf.quantize(
        copy.deepcopy(model),
        nncf.Dataset(calibration),
        subset_size=len(calibration),
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(patterns=[".*lm_head.*"]),
    )
    return quantized


def stock_brevitas(model: LanguageModel, calibration: list[Tensor]) -> nn.Module:
    """Brevitas' 8-bit quantizers of inputs (a high percentile, per tensor) and weights."""
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat

    return layer_by_layer(model, calibration, Int8ActPerTensorFloat, Int8WeightPerChannelFloat)


def dynamic_torchao(model: LanguageModel, calibration: list[Tensor]) -> nn.Module:
    """torchao's int8 with a scale per token, found at run time."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantized = copy.deepcopy(model)
    quantize_(
        quantized,
        Int8DynamicActivationInt8WeightConfig(),
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and name != LAST,
    )
    return quantized


STOCK: dict[str, Callable[[LanguageModel, list[Tensor]], nn.Module]] = {
    "pt2e": stock_pt2e,
    "nncf": stock_nncf,
    "brevitas": stock_brevitas,
    "torchao, dynamic": dynamic_torchao,
}


Job = tuple[str, str, str, int]  # host, what is quantized, method, bits


def jobs() -> list[Job]:
    """Every cell: what needs least time and says most first."""
    found = [("", "", "float", 32), *((host, LAYERS, STOCK_NAME, 8) for host in STOCK)]
    for places, widths in ((LAYERS, BITS), (EVERYWHERE, BITS)):
        for host, at in PLACES:
            if at == places:
                found += [(host, at, method.__name__, bits) for bits in widths for method in METHODS]
    return found


def key_of(cell: dict[str, Any]) -> Job:
    """The job that a cell is the result of."""
    return cell["host"], cell["places"], cell["method"], cell["bits"]


@torch.no_grad()
def measure(job: Job, model: LanguageModel, test: list[Tensor], calibration: list[Tensor]) -> dict[str, Any]:
    """One cell: perplexity, sites and seconds of processor time, or the error."""
    host, places, name, bits = job
    cell: dict[str, Any] = {"host": host, "places": places, "method": name, "bits": bits}
    started = time.process_time()
    try:
        if not host:
            quantized: nn.Module = model
        elif name == STOCK_NAME:
            quantized = STOCK[host](model, calibration)
        else:
            method = next(m for m in METHODS if m.__name__ == name)(bits=bits)
            quantized = PLACES[host, places](model, calibration, method)
        cell["quantize_seconds"] = round(time.process_time() - started, 1)
        cell["perplexity"] = perplexity(quantized, test)
        cell["sites"] = len(list(iter_quantizers(quantized)))
    except Exception as error:  # a host that fails is a result
        cell["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    cell["seconds"] = round(time.process_time() - started, 1)
    return cell


def kept(path: Path, setting: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells of an earlier run with the same windows."""
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["cells"] if found.get("setting") == setting else []


def cell_text(cell: dict[str, Any] | None) -> str:
    """A perplexity as the table has it."""
    if cell is None:
        return "-"
    return f"{cell['perplexity']:,.1f}" if "perplexity" in cell else cell["error"].partition(":")[0]


def table(cells: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str] | None]]:
    """(columns, rows): a row per host, place and method, a column per bit width."""
    by = {key_of(cell): cell for cell in cells}
    rows: list[list[str] | None] = []
    for row in dict.fromkeys(job[:3] for job in jobs()):
        found = [by.get((*row, bits)) for bits in (32, *BITS)]
        if any(found):
            rows.append([*row, *(cell_text(c) if c else "" for c in found)])
    return ["host", "quantized", "method", "float", *(f"{bits} bits" for bits in BITS)], rows


def plot(cells: Sequence[dict[str, Any]], title: str, options: common.Options) -> None:
    """A panel per place: perplexity of each method over bits, log scale, with float and the hosts' own int8."""
    import matplotlib.ticker

    value = {key_of(c): c.get("perplexity") for c in cells}
    panels = [place for place in PLACES if any(value.get((*place, m.__name__, b)) for m in METHODS for b in BITS)]
    figure, axes = common.axes(len(panels), width=4.0, height=4.2)
    for axis, (host, places) in zip(axes, panels, strict=True):
        for number, method in enumerate(METHODS):
            heights = [value.get((host, places, method.__name__, bits)) for bits in BITS]
            middles = [k + 0.2 * (number - 1.5) for k in range(len(BITS))]
            known = [(x, y) for x, y in zip(middles, heights, strict=True) if y is not None]
            axis.bar([x for x, _ in known], [y for _, y in known], 0.19, label=method.__name__)
        for key, label, style in (
            (("", "", "float", 32), "float", "-"),
            ((host, LAYERS, STOCK_NAME, 8), STOCK_NAME, "--"),
            (("torchao, dynamic", LAYERS, STOCK_NAME, 8), "int8 of torchao, dynamic", ":"),
        ):
            if value.get(key) is not None:
                axis.axhline(value[key], color="black", linestyle=style, linewidth=1, label=label)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
        axis.set_xticks(range(len(BITS)), [f"{bits} bits" for bits in BITS])
        axis.set_xlim(-0.5, len(BITS) - 0.5)
        axis.set_title(f"{host}: {places}")
    known = [y for y in value.values() if y is not None]
    for axis in axes:
        axis.set_ylim(0.7 * min(known), 1.5 * max(known))
    axes[0].set_ylabel("perplexity (log scale)")
    handles = {text: handle for axis in axes for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, fontsize=10)
    figure.suptitle(title)
    common.save(figure, options, NAME)


def main(arguments: Sequence[str] | None = None) -> None:
    options, started = common.parse(__doc__, arguments, runs=(1, 1)), time.perf_counter()
    common.settle()
    counts = (4, 2) if options.quick else (8, 4)
    setting = {"test": counts[0], "calibration": counts[1], "tokens": 512, "text": "pydoc_data.topics"}
    cells = kept(options.out / f"{NAME}.json", setting)
    done = {key_of(cell) for cell in cells}
    missing = [job for job in jobs() if job not in done]
    title = f"SmolLM2-135M, weights of 8 bits: perplexity on {counts[0]} windows of 512 tokens of Python's help"
    if missing:
        model, tokenizer = smollm()
        test, calibration = windows(tokenizer, *counts)
        for job in missing:
            cells.append(measure(job, model, test, calibration))
            print(*job, cell_text(cells[-1]), f"{cells[-1]['seconds']} s", flush=True)
            common.write(options, NAME, {"title": title, "setting": setting, "cells": cells}, started)
    common.show(title, *table(cells), text=2)
    plot(cells, title, options)


if __name__ == "__main__":
    main()
