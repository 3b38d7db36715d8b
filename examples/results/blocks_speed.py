"""What is fast: the figures of docs/performance.md and docs/runtime.md, and the README's table of what it saves."""

from __future__ import annotations

from examples.results.pages import block, find, load, table

GOALS = {  # field of fake_quantize.json: (what it is, goal)
    "vs_clone": ("fake quantization over `x.clone()`, by method", "<= 1.5"),
    "speedup_vs_torch_ao_fake_quantize": ("torch.ao's FakeQuantize over ours", ">= 8"),
    "time_vs_minmax_observer": ("minimum / maximum statistic over torch.ao's MinMaxObserver", "<= 2"),
    "quantile_time_vs_minmax_observer": ("the same with quantiles", "<= 4"),
    "speedup_vs_torch_quantile": ("`torch.quantile` over ours", ">= 50"),
    "two_threads_speedup": ("speed of two threads over one, wall-clock", ""),
    "two_threads_speedup_busy": ("the same while another process keeps a core busy", ""),
}
NETWORK_GOALS = {
    "calibration_time_vs_torch_ao": ("calibration over torch.ao's default observers", "<= 1"),
    "static_time_vs_float": ("static parameters over float", "<= 1.3"),
    "dynamic_time_vs_float": ("dynamic parameters over float", "<= 1.5"),
}
LAYERS = {
    "fp32": "float, NHWC",
    "prepacked_fp32": "float, prepacked weight",
    "bf16": "bfloat16",
    "static_int8": "static int8",
    "dynamic_int8": "dynamic int8",
    **{f"ds_predicted_{d}": f"Dense+Sparse {d}%, thresholds given" for d in ("0", "0.5", "1", "2", "6")},
    **{f"ds_dynamic_{d}": f"Dense+Sparse {d}%, dynamic" for d in ("0", "0.5", "1", "2", "6")},
}
NETWORKS = {
    "fp32": "float, prepacked weights, fused ReLUs",
    "static_int8": "Direct, 8 bits, static",
    "dynamic_int8": "Direct, 8 bits, dynamic",
    "dqa_static": "DQA(bits=4), static",
    "ds_static_1": "Dense+Sparse 1%, static",
    "ds_predicted_1": "Dense+Sparse 1%, QPP, features included",
    "ds_dynamic_1": "Dense+Sparse 1%, dynamic",
}


def span(found: object) -> str:
    """A figure, or the smallest and the largest of several."""
    values = [float(v) for v in (found.values() if isinstance(found, dict) else [found])]  # type: ignore[arg-type]
    ends = sorted({f"{min(values):.2f}", f"{max(values):.2f}"}, key=float)
    return " to ".join(ends)


@block
def speed_fake_quantize() -> str:
    """Fake quantization and calibration against their goals."""
    lines = [[text, span(find("fake_quantize", field)), goal] for field, (text, goal) in GOALS.items()]
    for network, name in (("resnet18", "ResNet-18"), ("mobilenetv2", "MobileNetV2")):
        for field, (text, goal) in NETWORK_GOALS.items():
            lines.append([f"{name}: {text}", span(find("fake_quantize", f"{network}/{field}_by_method")), goal])
    return table(["", "measured", "goal"], lines)


@block
def speed_prediction() -> str:
    """Networks with predicted parameters against their goals."""
    goals = {"paper": "<= 1.05", "extended": "<= 1.15"}
    rows = [(f"{mode} mode over static", f"{mode}_time_vs_static", goal) for mode, goal in goals.items()]
    rows += [(f"{mode} mode over dynamic", f"{mode}_time_vs_dynamic", "< 1") for mode in goals]
    rows += [(f"features, {m} mode, share of a forward", f"features_share_by_mode/{m}", "<= 0.01") for m in goals]
    cells = [[t, *(f"{find('prediction', f'batch_{b}/{f}'):.3g}" for b in (1, 32)), g] for t, f, g in rows]
    return table(["", "batch 1", "batch 32", "goal"], cells)


@block
def speed_layers() -> str:
    """One convolution by row, as the paper's Table 1."""
    times, ratios = find("dense_sparse", "convolution_us"), find("dense_sparse", "convolution_vs_dynamic")
    cells = [[t, f"{ratios[k]:.2f}", f"{times['prepacked_fp32'] / times[k]:.1f}"] for k, t in LAYERS.items()]
    heads = [
        "one convolution, 64 channels at 56x56, 3x3",
        "time over dynamic int8",
        "times faster than prepacked float",
    ]
    return table(heads, cells)


@block
def speed_networks() -> str:
    """A lowered ResNet-18 by row."""
    times = find("dense_sparse", "resnet18_ms")
    cells = [[text, f"{times[key]:.1f}", f"{times['fp32'] / times[key]:.2f}"] for key, text in NETWORKS.items()]
    return table(["ResNet-18, 224 px, batch 1", "ms", "times faster than float"], cells)


@block
def speed_parts(*kinds: str) -> str:
    """Share of modules of these kinds in a lowered forward with predictions."""
    parts = find("dense_sparse", "resnet18_parts_ms")
    return f"{sum(parts[kind] for kind in kinds) / sum(parts.values()):.0%}"


@block
def speed_saves() -> str:
    """What it saves, for the README."""
    sparse, simulated = load("dense_sparse"), load("fake_quantize")
    times = sparse["resnet18_ms"]

    def faster(kind: str) -> str:
        return f"{times['fp32'] / times[kind]:.1f} times faster than float"

    fake = [f"{simulated[network]['static_time_vs_float']:.2f}" for network in ("resnet18", "mobilenetv2")]
    lines = [
        ["lowered ResNet-18 (`runtime.lower`), 8-bit Direct or 4-bit DQA, static", faster("dqa_static")],
        ["the same, Dense+Sparse at 1%, thresholds predicted by QPP", faster("ds_predicted_1")],
        ["the same, exact quantiles in place of QPP", faster("ds_dynamic_1")],
        [
            "simulated quantization (the default), ResNet-18 / MobileNetV2",
            " / ".join(fake) + " of float",
        ],
        [
            "fake quantization of one tensor",
            f"{span(simulated['speedup_vs_torch_ao_fake_quantize'])} times faster than torch.ao's",
        ],
    ]
    return table(["on a CPU, one thread", "time"], lines)
