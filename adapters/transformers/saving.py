"""The state of a cache as bytes: a checksum, and safetensors with the blocks as data sections of the frame format.

Everything is validated before anything is decoded: shapes against the settings, sections as `storage.format` does.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dqa_plugins.errors import StateMismatch
from dqa_plugins.storage import CorruptFrame, UnsupportedFrame
from dqa_plugins.storage.format.limits import DTYPES

from .blocks import Blocks, BlockStore, blocks_in
from .layer import PackedLayer, State
from .settings import CacheSettings

_HEAD = struct.Struct("<4sB3xI")  # magic, version, CRC-32 of what follows
_MAGIC, _VERSION = b"DQAC", 1
_PARTS = ("keys", "values")


def write_states(settings: CacheSettings, layers: Sequence[PackedLayer]) -> bytes:
    """The states of all layers; blocks that sequences share are written for each of them."""
    tensors: dict[str, Tensor] = {}
    described: list[Any] = []
    for i, layer in enumerate(layers):
        state = layer.state
        described.append(None if state is None else {"length": state.length, "past": layer.record_past})
        if state is None:
            continue
        for p, part in enumerate(_PARTS):
            tensors |= {f"{i}.{part}.head": state.head[p], f"{i}.{part}.tail": state.tail[p]}
            for r, row in enumerate(state.rows):
                sections = layer.stores[p].sections(row[p])
                sizes = torch.tensor([len(s) for s in sections], dtype=torch.int64)
                data = torch.cat([torch.empty(0, dtype=torch.uint8), *sections])
                tensors |= {f"{i}.{part}.{r}.sizes": sizes, f"{i}.{part}.{r}.data": data}
    tensors = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    header = json.dumps({"settings": settings.fingerprint, "layers": described}).encode()
    tensors["header"] = torch.frombuffer(bytearray(header), dtype=torch.uint8)  # metadata has no fixed order
    body = save(tensors)
    return _HEAD.pack(_MAGIC, _VERSION, zlib.crc32(body)) + body


def read_states(
    data: bytes, settings: CacheSettings, layers: Sequence[PackedLayer], device: torch.device
) -> list[State | None]:
    """Inverse of `write_states`.

    Raises:
        CorruptFrame: damaged or contradictory bytes. UnsupportedFrame: of another version.
        StateMismatch: written with other settings.
    """
    if not isinstance(data, bytes | bytearray | memoryview) or len(data) < _HEAD.size:
        raise CorruptFrame(f"these are no bytes of a PackedCache, but a {type(data).__name__} shorter than its head.")
    magic, version, crc = _HEAD.unpack(bytes(data[: _HEAD.size]))
    body = bytes(data[_HEAD.size :])
    if magic != _MAGIC:
        raise CorruptFrame(f"this is no packed cache: it starts with {magic!r}, not {_MAGIC!r}.")
    if version != _VERSION:
        raise UnsupportedFrame(f"packed cache of version {version}; this release reads version {_VERSION}.")
    if zlib.crc32(body) != crc:
        raise CorruptFrame("the checksum does not match: the bytes are damaged.")
    try:
        tensors = load(body)
        header = json.loads(tensors["header"].numpy().tobytes())
        described = header["layers"]
        if header["settings"] != settings.fingerprint:
            raise StateMismatch("these bytes were written with other cache settings; load them with those.")
        if len(described) != len(layers):
            raise CorruptFrame(f"{len(described)} layers, the settings have {len(layers)}.")
        return [
            None if d is None else _state(i, d, tensors, layer, device)
            for i, (d, layer) in enumerate(zip(described, layers, strict=True))
        ]
    except (KeyError, TypeError, ValueError, IndexError, RecursionError, struct.error, SafetensorError) as error:
        if isinstance(error, CorruptFrame | StateMismatch):
            raise
        raise CorruptFrame(f"this is no packed cache ({type(error).__name__}: {error}).") from error


def _state(i: int, described: Any, tensors: dict[str, Tensor], layer: PackedLayer, device: torch.device) -> State:
    """The state of one layer, checked."""
    heads: list[Tensor] = []
    tails: list[Tensor] = []
    columns: list[list[Blocks]] = []
    batch = tensors[f"{i}.keys.tail"].shape[0]
    for store, part in zip(layer.stores, _PARTS, strict=True):
        for name, into in (("head", heads), ("tail", tails)):
            x = tensors[f"{i}.{part}.{name}"]
            like = heads[0] if heads else x
            fits = x.ndim == 4 and x.dtype == like.dtype and x.dtype in DTYPES
            if not fits or x.shape[:2] != (batch, store.heads) or x.shape[3] != store.width:
                raise CorruptFrame(f"'{store.name}': float tokens of shape {tuple(x.shape)}, {x.dtype}.")
            if not bool(torch.isfinite(x).all()):
                raise CorruptFrame(f"'{store.name}': NaN or Inf among the float tokens.")
            into.append(x.to(device))
        columns.append([_blocks(store, f"{i}.{part}.{r}", tensors, device) for r in range(batch)])
    counts = {sum(map(blocks_in, blocks)) for column in columns for blocks in column}
    if len(counts) > 1 or len({x.shape[2] for x in heads}) > 1 or len({x.shape[2] for x in tails}) > 1:
        raise CorruptFrame(f"layer {i}: keys and values, or sequences, of different lengths.")
    blocks = counts.pop() if counts else 0
    held = heads[0].shape[2] + tails[0].shape[2] + blocks * layer.stores[0].block
    length = described["length"]
    if not isinstance(length, int) or length < held or (length > held and not layer.is_sliding) or length > 2**40:
        raise CorruptFrame(f"layer {i} holds {held} tokens and says that it has seen {length}.")
    if heads[0].shape[2] > layer.first:
        raise CorruptFrame(f"layer {i}: {heads[0].shape[2]} first tokens, the settings keep {layer.first}.")
    layer.record_past = bool(described["past"])
    rows = tuple(zip(*columns, strict=True))
    return State((heads[0], heads[1]), rows, (tails[0], tails[1]), blocks, length)


def _blocks(store: BlockStore, name: str, tensors: dict[str, Tensor], device: torch.device) -> Blocks:
    sizes, data = tensors[name + ".sizes"], tensors[name + ".data"]
    wrong = sizes.dtype != torch.int64 or sizes.ndim != 1 or data.dtype != torch.uint8 or data.ndim != 1
    if wrong or bool((sizes < 0).any()) or bool((sizes > len(data)).any()) or int(sizes.sum()) != len(data):
        raise CorruptFrame(f"'{store.name}': the sizes of its blocks do not fit {len(data)} bytes.")
    return store.restored(data.split(sizes.tolist()), device)
