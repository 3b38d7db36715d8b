"""Figures of stored bits, default settings, speed and memory of storage, and the demo."""

from __future__ import annotations

from typing import Any

from examples.results.pages import block, find, load, table

CURVES = {
    "direct": "Direct, signed, per tensor, fixed length",
    "rival": "Direct, unsigned where possible, per channel, fixed length",
    "rival_joint": "the same, entropy coded: the rival",
    "dqa_paper": "DQA in the paper's layout (`shift_error`)",
    "dqa_joint": "the same DQA values, `joint`",
    "allocated": "allocated (`allocate_bits`), `joint`",
}


def _network(name: str) -> dict[str, Any]:
    found: dict[str, Any] = find("stored_bits", f"networks/network={name}")
    return found


def _needed(network: dict[str, Any], curve: str, points: float) -> dict[str, Any] | None:
    """The point of a curve with the fewest stored bits within so many points of FP32."""
    lowest = network["percent_fp32"] - points
    fitting = [p for p in network["points"] if p["curve"] == curve and p["percent"] >= lowest]
    return min(fitting, key=lambda p: p["stored_bits"]) if fitting else None


@block
def stored_bits_needed(*networks: str) -> str:
    """Fewest stored bits within half a point of FP32, and the score there with its 95% interval."""
    found = [_network(name) for name in networks]
    lines = []
    for curve, text in CURVES.items():
        points = [_needed(network, curve, 0.5) for network in found]
        cells = [f"{p['stored_bits']:.2f} ({p['percent']:.2f} ± {p['interval_95']:.2f})" if p else "-" for p in points]
        lines.append([text, *cells])
    return table(["", *(f"{n['network']}, FP32 {n['percent_fp32']:.2f}%" for n in found)], lines)


@block
def stored_bits_levels(network: str, *levels: str) -> str:
    """Fewest stored bits that reach a score, by curve; the last column: within half a point of FP32."""
    found, lines = _network(network), []
    reference = found["percent_fp32"]
    for curve, text in CURVES.items():
        points = [_needed(found, curve, reference - float(level)) for level in levels]
        points.append(_needed(found, curve, 0.5))
        highest = max(p["stored_bits"] for p in found["points"] if p["curve"] == curve)
        cells = [f"{p['stored_bits']:.2f} ({p['percent']:.1f})" if p else f"none up to {highest:.1f}" for p in points]
        lines.append([text, *cells])
    heads = [f"at least {level}%" for level in levels]
    return table(["stored bits (agreement with FP32, %)", *heads, "within half a point"], lines)


@block
def stored_bits_point(network: str, curve: str, label: str, value: str, form: str = ".2f") -> str:
    """One point of a curve, such as `stored_bits_point resnet32 allocated "target 1.35" percent`."""
    return format(find("stored_bits", f"networks/network={network}/points/curve={curve}&label={label}/{value}"), form)


@block
def storage_speed() -> str:
    """Encoding and decoding over memcpy and over other coders."""
    r = load("storage")

    def pair(name: str, form: str = ".2f") -> list[str]:
        return [f"{r[name]:{form}}", f"{r[f'{name}_joint']:{form}}"]

    lines = [
        ["encode, time over memcpy", *pair("encode_vs_memcpy"), "2.5"],
        ["decode, time over memcpy", *pair("decode_vs_memcpy"), "2.5"],
        ["Huffman encoding alone, speed over bitarray", *pair("encode_vs_bitarray", ".1f"), "40"],
        ["Huffman decoding alone, speed over bitarray", *pair("decode_vs_bitarray", ".1f"), "15"],
        ["encode with quantization and packing, over bitarray's coder", *pair("encode_fused_vs_bitarray", ".1f"), "-"],
        ["decode with unpacking and dequantization, likewise", *pair("decode_fused_vs_bitarray", ".1f"), "-"],
        ["encode, speed over zstd 1", *pair("encode_vs_zstd1"), "-"],
        ["decode, speed over zstd 1", *pair("decode_vs_zstd1"), "-"],
        [
            "two threads, wall-clock speed over one, encode / decode",
            f"{r['encode_two_threads']:.2f} / {r['decode_two_threads']:.2f}",
            "",
            "1.6",
        ],
        ["bits per activation", f"{r['bits_shift_error']:.2f}", f"{r['bits_joint']:.2f}", ""],
        ["order-0 entropy", f"{r['bits_entropy_shift_error']:.2f}", f"{r['bits_entropy_joint']:.2f}", ""],
    ]
    return table(["", "shift_error", "joint", "target"], lines)


@block
def storage_memory() -> str:
    """Peak memory, size of the skips and seconds, float and stored."""
    report, lines = load("memory"), []
    for key, name in (("unet", "U-Net"), ("resnet32", "ResNet-32")):
        r = report[key]
        widths = ("fp32", "2bit", "3bit", "4bit")
        share = [f"{r[f'skip_mb_{w}']:.1f} ({r[f'skip_share_{w}']:.1%})" for w in widths[1:]]
        lines += [
            [f"{name}, peak of the allocator, MB", *(f"{r[f'peak_mb_{w}']:.0f}" for w in widths)],
            [f"{name}, skips, MB (share of FP32)", f"{r['skip_mb_fp32']:.0f}", *share],
            [f"{name}, seconds", *(f"{r[f'seconds_{w}']:.2f}" for w in widths)],
        ]
    return table(["", "FP32", "2 bits", "3 bits", "4 bits"], lines)


@block
def default_setting(mapping: str, granularity: str, layers: str) -> str:
    """Accuracy of a mapping on ResNet-32, MobileNetV2 and the ViT."""
    wanted = f"mapping={mapping}&granularity={granularity}&layers={layers}"
    networks = ("resnet32", "mobilenetv2", "vit")
    values = [find("default_settings", f"cells/network={n}&{wanted}/accuracy_percent") for n in networks]
    return " / ".join(f"{v:.1f}" for v in values)


@block
def demo_table() -> str:
    """Accuracy of every variant by bits, and bits per activation."""
    rows = load("demo")["rows"]
    widths = sorted({r["bits"] for r in rows})
    lines = []
    for name in dict.fromkeys(r["method"] for r in rows):
        found = {r["bits"]: r for r in rows if r["method"] == name}
        bits = " / ".join(f"{found[w]['bits_per_activation']:.2f}" for w in widths)
        lines.append([name, *(f"{found[w]['accuracy']:.2f}" for w in widths), bits])
    return table(["", *(f"{w} bits" for w in widths), "bits per activation"], lines)


@block
def demo_accuracy(method: str, bits: str, form: str = ".1f") -> str:
    """Of one row of the demo."""
    return format(find("demo", f"rows/method={method}&bits={bits}/accuracy"), form)
