"""`dqa-plugins inspect`: what a file of ours holds, told by its content and not by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dqa_plugins.errors import InvalidArgument, missing
from dqa_plugins.methods import method_from_dict
from dqa_plugins.ranking import RankTable
from dqa_plugins.report.tables import Table, described
from dqa_plugins.storage import PackedActivation
from dqa_plugins.storage.format.frame import MAGIC

from .answer import Answer

_STATE = "_extra_state"  # of a quantizer, in a state_dict


def inspect(path: Path) -> Answer:
    """Describe a file.

    Raises:
        InvalidArgument: it holds nothing of ours. CorruptFrame, RankTableError, InvalidMethod: it is damaged.
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    if data[:4] == MAGIC:
        return _packed(PackedActivation.from_bytes(data))
    if data[:2] == b"PK" or data[8:9] == b"{":
        return _state_dict(path, _tensors(path, zipped=data[:2] == b"PK"))
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _unknown(path) from error
    if isinstance(value, dict) and "schema" in value:
        table = RankTable.from_dict(value, f"{str(path)!r}")
        return Answer(str(table), table.to_dict())
    if isinstance(value, dict) and "method" in value:
        method = method_from_dict(value)
        return Answer(described(method), {"method": value})
    if isinstance(value, dict) and "compression" in value:
        return _config(value["compression"], path)
    raise _unknown(path)


def _packed(packed: PackedActivation) -> Answer:
    data = {
        "kind": "packed activation",
        "shape": list(packed.shape),
        "dtype": str(packed.dtype).removeprefix("torch."),
        "coding": packed.codebook.coding,
        "bytes": packed.nbytes,
        "codebook_bytes": packed.codebook_nbytes,
        "bits_per_activation": packed.bits_per_activation,
    }
    packed.unpack()  # everything decodes
    return Answer("\n".join(f"{key.replace('_', ' ')}: {value}" for key, value in data.items()), data)


def _config(entry: Any, path: Path) -> Answer:
    """The method of a config entry; the room checks the other keys when it uses them."""
    activations = entry.get("activations") if isinstance(entry, dict) else None
    if not isinstance(activations, dict) or "mode" not in activations:
        raise InvalidArgument(f"{str(path)!r}: the config has no 'activations' with a 'mode'.")
    method = method_from_dict({"method": activations["mode"], **{k: v for k, v in activations.items() if k != "mode"}})
    rest = {key: value for key, value in entry.items() if key != "activations"}
    lines = [f"activations: {described(method)}", *(f"{key}: {json.dumps(value)}" for key, value in rest.items())]
    return Answer("\n".join(lines), {"kind": "config entry", "activations": described(method), **rest})


def _tensors(path: Path, *, zipped: bool) -> dict[str, Any]:
    try:
        if zipped:
            found = torch.load(path, map_location="cpu", weights_only=True)
        else:
            try:
                from safetensors.torch import load_file
            except ImportError:
                raise missing("safetensors", "examples", "reading a .safetensors file") from None
            found = load_file(path)
    except Exception as error:
        if isinstance(error, ImportError):
            raise
        raise InvalidArgument(f"{str(path)!r} cannot be read as a state_dict: {error}") from error
    if not isinstance(found, dict):
        raise InvalidArgument(f"{str(path)!r} holds a {type(found).__name__}; a saved state_dict is expected.")
    return found


def _state_dict(path: Path, tensors: dict[str, Any]) -> Answer:
    rows = []
    for key, value in tensors.items():
        if key.rpartition(".")[2] != _STATE or not isinstance(value, Tensor):
            continue
        try:
            state = json.loads(bytes(value.numpy()))
            method = method_from_dict(state["method"])
            row = (
                key.removesuffix(_STATE).rstrip("."),
                described(method),
                state["state"],
                state["axis"],
                state["channels"],
            )
        except (ValueError, KeyError, TypeError):
            continue  # of another module, or damaged: loading it says more
        rows.append(row)
    if not rows:
        raise InvalidArgument(f"{str(path)!r} is a state_dict of {len(tensors)} entries without a quantizer of ours.")
    columns = ("quantizer", "method", "state", "axis", "channels")
    table = Table(f"{len(rows)} quantizers", columns, [tuple(map(str, row)) for row in rows])
    return Answer(str(table), {"quantizers": [dict(zip(columns, row, strict=True)) for row in rows]})


def _unknown(path: Path) -> InvalidArgument:
    return InvalidArgument(
        f"{str(path)!r} is no packed activation, rank table, method, config entry or state_dict of dqa-plugins."
    )
