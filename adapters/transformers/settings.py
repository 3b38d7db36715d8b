"""CacheSettings: what calibration decides about the cache of one model, and its files (JSON and safetensors)."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dqa_plugins.errors import InvalidArgument, StateMismatch
from dqa_plugins.methods import method_from_dict, method_to_dict
from dqa_plugins.quantizer import ActivationQuantizer
from dqa_plugins.storage.coder.engine import KernelPlan
from dqa_plugins.storage.coder.segments import BlockCoder
from dqa_plugins.storage.format.codebook import Codebook
from dqa_plugins.storage.format.layout import Group, Layout
from dqa_plugins.storage.format.section import read_codebook, write_codebook
from dqa_plugins.storage.tables import check_codebook

from .host import PreTrainedConfig, identity

CONFIG, TENSORS = "cache.json", "cache.safetensors"
_SCHEMA = "dqa_plugins.cache_settings.2"
_PARTS = ("keys", "values")
OFFSET = 0.45  # with feedback a magnitude is rounded up from 0.55 of a step: entropy falls by more than the error grows


@dataclass(frozen=True, eq=False)
class TensorSettings:
    """How the keys, or the values, of one layer are quantized and coded.

    Args:
        quantizer: frozen. Static: of (B, C, T), a channel for each component of each head. Dynamic: of (N, D), a
            sample for each head of each token.
        center: (C,) float32, subtracted before quantization.
        book: entropy tables.
        heads, width: H and D.
        turns: radians per token by which the rotation of keys is undone before anything else; see `rotary`.
        feedback: (H, D, D) float32, see `kernels.feedback`; empty: each value is rounded by itself.
    """

    quantizer: ActivationQuantizer
    center: Tensor
    book: Codebook
    heads: int
    width: int
    turns: tuple[float, ...] = ()
    feedback: Tensor = field(default_factory=lambda: torch.empty(0))

    def rounded(self, y: Tensor) -> Tensor:
        """(n, C, T) float32 values, centred, at multiples of their steps if errors are fed back; else unchanged."""
        if not self.feedback.numel():
            return y
        from dqa_plugins.kernels.feedback import round_block

        shape, grid = (self.heads, self.width), self.quantizer.static_grid
        step, high = (
            torch.as_tensor(part).float().expand(grid.step.shape).reshape(shape).numpy()
            for part in (grid.step, grid.high)
        )
        out = y.cpu().unflatten(1, shape).clone(memory_format=torch.contiguous_format)
        errors = np.empty(out.shape[2:], np.float32)
        for block in out.numpy():
            round_block(block, step, high, self.feedback.numpy(), OFFSET, errors)
        return out.flatten(1, 2).to(y.device)

    @property
    def by_channel(self) -> bool:
        """Whether a channel has its own step, the same for all tokens; else a token has its own."""
        return self.quantizer.method.source == "static"

    @property
    def has_steps(self) -> bool:
        """Whether every channel has a static step and nothing else, so that blocks can be segments."""
        return self.by_channel and self.book.kind == "grid" and self.book.channels == self.heads * self.width


@dataclass(frozen=True, eq=False)
class CacheSettings:
    """Settings of a `PackedCache`; made by `calibrate_cache`, shared by any number of caches, never changed.

    Args:
        model: identity of the decoder, see `host.identity`.
        layers: (keys, values) of each layer.
        sliding: tokens that each layer attends to, None for all.
        window: newest tokens that stay float.
        block: tokens that are packed together.
        first: first tokens that stay float (attention sinks: Xiao et al., 2024).

    Raises:
        InvalidArgument: window, block or first is out of range.
    """

    model: Mapping[str, str]
    layers: tuple[tuple[TensorSettings, TensorSettings], ...]
    sliding: tuple[int | None, ...]
    window: int = 128
    block: int = 64
    first: int = 4

    def __post_init__(self) -> None:
        for name, low in (("window", 0), ("block", 1), ("first", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= 2**20:
                raise InvalidArgument(f"{name}={value!r}: a number of tokens from {low} to {2**20}.")

    def replace(self, **fields: Any) -> CacheSettings:
        """A copy with another window, block or first."""
        return replace(self, **fields)

    @cached_property
    def coders(self) -> dict[str, BlockCoder]:
        """Coders of the tensors with a step per channel, by name; tables that layers share are held once."""
        coded = [t for layer in self.layers for t in layer if t.has_steps]
        tables = {_content(g): g for t in coded for g in t.book.groups}
        found: dict[str, BlockCoder] = {}
        plan = None
        for t in coded:
            # every plan has all groups, most of them without channels, in one order: so it has the same arrays
            own: dict[Any, tuple[int, ...]] = {}
            for g in t.book.groups:  # two of them may have the same table
                own[_content(g)] = tuple(sorted(own.get(_content(g), ()) + g.channels))
            every = tuple(replace(tables[key], channels=own.get(key, ())) for key in sorted(tables))
            book = replace(t.book, groups=tuple(g for g in every if g.channels), plans={})
            shape = (1, t.heads * t.width, self.block)
            plan = KernelPlan(Layout(*shape, every), plan)
            found[t.quantizer.name] = BlockCoder(book, shape, plan)
        return found

    @property
    def nbytes(self) -> int:
        """Bytes held for all caches together: steps, centres, feedback, codebooks, and the tables made of them."""
        every = [t for layer in self.layers for t in layer]
        total = sum(len(write_codebook(t.book)) + t.center.nbytes + t.feedback.nbytes for t in every)
        plans = [coder.plan for coder in self.coders.values()]
        tables = {id(array): array.nbytes for p in plans for array in (p.encoders, p.decoders)}
        return total + sum(tables.values()) + sum(p.channels.nbytes + p.groups.nbytes for p in plans)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that the bytes of a cache depend on."""
        described, tensors = self._described()
        found = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
        for name in sorted(tensors):
            found.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
            found.update(tensors[name].numpy().tobytes())
        return found.hexdigest()

    def require(self, config: PreTrainedConfig) -> None:
        """Refuse a model of another architecture.

        Raises:
            StateMismatch: these are not its settings; the message names what differs.
        """
        given = identity(config)
        wrong = [f"{k} {self.model.get(k)}, not {v}" for k, v in given.items() if self.model.get(k) != v]
        if wrong:
            raise StateMismatch(
                f"these cache settings belong to another model ({self.model.get('model_type')}): {', '.join(wrong)}. "
                "Make some for this one with calibrate_cache."
            )

    # ------------------------------------------------------------ files

    def _described(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        described: dict[str, Any] = {"schema": _SCHEMA, "model": dict(self.model), "sliding": list(self.sliding)}
        described |= {"window": self.window, "block": self.block, "first": self.first, "layers": []}
        tensors: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            for part, t in zip(_PARTS, layer, strict=True):
                prefix = f"{i}.{part}."
                book = torch.frombuffer(bytearray(write_codebook(t.book)), dtype=torch.uint8)
                tensors |= {prefix + "center": t.center, prefix + "book": book, prefix + "feedback": t.feedback}
                state = {k: v for k, v in t.quantizer.state_dict().items() if v.numel()}
                tensors |= {f"{prefix}quantizer.{k}": v.contiguous() for k, v in state.items()}
            method = method_to_dict(layer[0].quantizer.method)
            sizes = {"heads": layer[0].heads, "width": layer[0].width}
            described["layers"].append({"method": method, **sizes, "turns": [list(t.turns) for t in layer]})
        return described, tensors

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `cache.json` and `cache.safetensors`; the folder is made if need be. No pickle."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        described, tensors = self._described()
        for name, write in (
            (TENSORS, lambda p: save_file(tensors, p)),
            (CONFIG, lambda p: p.write_text(json.dumps(described, indent=1))),
        ):
            partial = folder / f"{name}.part"
            write(partial)
            os.replace(partial, folder / name)
        return folder

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> CacheSettings:
        """What `save` wrote.

        Raises:
            StateMismatch: a file is damaged, or of another kind. FileNotFoundError: one is missing.
        """
        folder = Path(folder)
        try:
            described = json.loads((folder / CONFIG).read_text())
            tensors = load_file(folder / TENSORS)
            if described["schema"] != _SCHEMA:
                raise StateMismatch(f"{folder} holds {described['schema']!r}, this release reads {_SCHEMA}.")
            layers = tuple(_load_layer(i, d, tensors) for i, d in enumerate(described["layers"]))
            model = {str(k): str(v) for k, v in described["model"].items()}
            sliding = tuple(None if s is None else int(s) for s in described["sliding"])
            if len(sliding) != len(layers):
                raise StateMismatch(f"{folder}: {len(sliding)} sliding windows for {len(layers)} layers.")
            sizes = {name: described[name] for name in ("window", "block", "first")}
            return CacheSettings(model, layers, sliding, **sizes)
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError, SafetensorError) as error:
            if isinstance(error, StateMismatch):
                raise
            raise StateMismatch(f"{folder} holds no cache settings ({type(error).__name__}: {error}).") from error


def _load_layer(i: int, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    found = []
    heads, width = int(described["heads"]), int(described["width"])
    for part, turns in zip(_PARTS, described["turns"], strict=True):
        prefix = f"{i}.{part}."
        quantizer = ActivationQuantizer(method_from_dict(described["method"]), name=f"{i}.{part}")
        state = {k.removeprefix(prefix + "quantizer."): v for k, v in tensors.items() if k.startswith(prefix + "quant")}
        quantizer.load_state_dict({**quantizer.state_dict(), **state})
        book = replace(read_codebook(memoryview(tensors[prefix + "book"].numpy().tobytes())), name=quantizer.name)
        check_codebook(book, quantizer)
        center = tensors[prefix + "center"]
        if quantizer.state != "frozen" or center.shape != (heads * width,) or center.dtype != torch.float32:
            raise StateMismatch(f"{prefix[:-1]}: {quantizer.state} quantizer, centre of {tuple(center.shape)}.")
        if not bool(torch.isfinite(center).all()) or quantizer.num_channels not in (None, heads * width, width):
            raise StateMismatch(f"{prefix[:-1]}: its centre is not finite, or its channels are not {heads} x {width}.")
        feedback, turns = tensors[prefix + "feedback"], tuple(float(f) for f in turns)
        fits = feedback.numel() == 0 or (feedback.shape == (heads, width, width) and feedback.dtype == torch.float32)
        if not fits or not bool(torch.isfinite(feedback).all()) or not all(map(math.isfinite, turns)):
            raise StateMismatch(f"{prefix[:-1]}: feedback of shape {tuple(feedback.shape)}, or not finite.")
        if 2 * len(turns) > width:
            raise StateMismatch(f"{prefix[:-1]}: {len(turns)} rotations of {width} components.")
        found.append(TensorSettings(quantizer, center, book, heads, width, turns, feedback))
    return tuple(found)


def _content(group: Group) -> tuple[Any, ...]:
    """What two groups of one table have in common."""
    t = group.table
    table: Sequence[Any] = () if t is None else (t.word, t.symbol_bits, t.lowest, t.escape, t.lengths.tobytes())
    return (group.width, group.signed, group.packed, group.coded, *table)
