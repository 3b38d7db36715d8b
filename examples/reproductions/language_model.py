"""A real language model: perplexity of SmolLM2-135M with weights of 8 bits and activations of 8, 6 and 4.

    python -m examples.reproductions.language_model --quick

Every method in PT2E and NNCF, where all activations are quantized (sums, products and norms' outputs too), and in
Brevitas, where the inputs of linear layers are (its own way with language models: it cannot trace them); beside them
each host's own int8 and torchao's dynamic int8. Static parameters, one scale per tensor; the last layer stays float.
What is measured is written at once, and not measured again. --quick: 4 windows of 512 tokens instead of 8, 2 instead
of 4 to calibrate with.
"""

from __future__ import annotations

import copy
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


def judged(room: str) -> Callable[[LanguageModel, list[Tensor], Method], nn.Module]:
    """The room's quantize_model, for every activation but the logits."""

    def quantize(model: LanguageModel, calibration: list[Tensor], method: Method) -> nn.Module:
        import importlib

        found = importlib.import_module(f"dqa_plugins.adapters.{room}").quantize_model
        quantized: nn.Module = found(model, {"": method, LAST: None}, calibration)
        return quantized

    return quantize


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


HOSTS: dict[str, Callable[[LanguageModel, list[Tensor], Method], nn.Module]] = {
    "brevitas": brevitas,
    "pt2e": judged("pt2e"),
    "nncf": judged("nncf"),
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


def jobs() -> list[tuple[str, str, int]]:
    """(host, method, bits) of every cell, the cheaper host and more bits first."""
    found = [("", "float", 32), ("torchao, dynamic", STOCK_NAME, 8)]
    for bits in BITS:
        for host in HOSTS:
            found += [(host, method.__name__, bits) for method in METHODS]
            found += [(host, STOCK_NAME, 8)] * (bits == 8)
    return found


@torch.no_grad()
def measure(
    job: tuple[str, str, int], model: LanguageModel, test: list[Tensor], calibration: list[Tensor]
) -> dict[str, Any]:
    """One cell: perplexity, sites and seconds of processor time, or the error."""
    host, name, bits = job
    cell: dict[str, Any] = {"host": host, "method": name, "bits": bits}
    started = time.process_time()
    try:
        if not host:
            quantized: nn.Module = model
        elif name == STOCK_NAME:
            quantized = STOCK[host](model, calibration)
        else:
            method = next(m for m in METHODS if m.__name__ == name)(bits=bits)
            quantized = HOSTS[host](model, calibration, method)
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
    """(columns, rows): a row per host and method, a column per bit width."""
    by = {(c["host"], c["method"], c["bits"]): c for c in cells}
    rows: list[list[str] | None] = []
    for host, name in sorted(dict.fromkeys((host, name) for host, name, _ in jobs()), key=lambda row: row[0]):
        found = [by.get((host, name, bits)) for bits in (32, *BITS)]
        if any(found):
            rows.append([host, name, *(cell_text(c) if c else "" for c in found)])
    return ["host", "method", "float", *(f"{bits} bits" for bits in BITS)], rows


def plot(cells: Sequence[dict[str, Any]], title: str, options: common.Options) -> None:
    """A panel per host: perplexity of each method over bits, log scale, with float and the host's own int8."""
    import matplotlib.ticker

    figure, panels = common.axes(len(HOSTS), width=4.4, height=4.2)
    value = {(c["host"], c["method"], c["bits"]): c.get("perplexity") for c in cells}
    for axis, host in zip(panels, HOSTS, strict=True):
        for number, method in enumerate(METHODS):
            heights = [value.get((host, method.__name__, bits)) for bits in BITS]
            places = [k + 0.2 * (number - 1.5) for k in range(len(BITS))]
            known = [(x, y) for x, y in zip(places, heights, strict=True) if y is not None]
            axis.bar([x for x, _ in known], [y for _, y in known], 0.19, label=method.__name__)
        for key, label, style in (
            (("", "float", 32), "float", "-"),
            ((host, STOCK_NAME, 8), STOCK_NAME, "--"),
            (("torchao, dynamic", STOCK_NAME, 8), "int8 of torchao, dynamic", ":"),
        ):
            if value.get(key) is not None:
                axis.axhline(value[key], color="black", linestyle=style, linewidth=1, label=label)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
        axis.set_xticks(range(len(BITS)), [f"{bits} bits" for bits in BITS])
        axis.set_xlim(-0.5, len(BITS) - 0.5)
        axis.set_title({"brevitas": "brevitas: inputs of linear layers"}.get(host, f"{host}: every activation"))
    low = 0.7 * min(y for y in value.values() if y is not None)
    for axis in panels:
        axis.set_ylim(low, 2e5)
    panels[0].set_ylabel("perplexity (log scale)")
    handles = {text: handle for axis in panels for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=7, fontsize=9)
    figure.suptitle(title)
    common.save(figure, options, NAME)


def main(arguments: Sequence[str] | None = None) -> None:
    options, started = common.parse(__doc__, arguments, runs=(1, 1)), time.perf_counter()
    common.settle()
    counts = (4, 2) if options.quick else (8, 4)
    setting = {"test": counts[0], "calibration": counts[1], "tokens": 512, "text": "pydoc_data.topics"}
    cells = kept(options.out / f"{NAME}.json", setting)
    done = {(c["host"], c["method"], c["bits"]) for c in cells}
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
