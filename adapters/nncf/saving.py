"""A quantized model as a folder: NNCF's config as JSON, the tensors as safetensors. No pickle."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

from nncf.torch import get_config, load_from_config
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from dqa_plugins.errors import DQAError, StateMismatch
from dqa_plugins.host.sites import Summary, keep_summary, summaries
from dqa_plugins.qpp import link
from dqa_plugins.sites import iter_quantizers

from .forward import keep_eager

# for nncf.torch.load_from_config(..., allowed_modules=ALLOWED_MODULES): NNCF refuses to import other modules
ALLOWED_MODULES: Any = ("nncf.*", "dqa_plugins.adapters.nncf.*")

CONFIG, TENSORS = "config.json", "model.safetensors"
METADATA = "state_dict_metadata"  # key in the header of the tensors' file
PLACED = "placement"  # likewise: what placement_report says beside the quantizers
SCHEMA, VERSION = "dqa_plugins.nncf_model", "1"  # likewise; folders of earlier releases have none


def save(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write `config.json` and `model.safetensors`; the folder is made if need be.

    Args:
        model: what `quantize` or nncf.quantize returned.

    Returns:
        the folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # a quantizer that several tensors share is in the state_dict under each hook: safetensors refuses shared memory
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    config = json.dumps(get_config(model), indent=1)
    # torch's layers find the version of their state_dict there: MNASNet refuses one without
    versions = json.dumps(getattr(model.state_dict(), "_metadata", {}))
    placed = json.dumps([summary.to_dict() for summary in summaries(model)])
    metadata = {METADATA: versions, PLACED: placed, "schema": SCHEMA, "version": VERSION}
    for name, write in ((TENSORS, lambda p: save_file(state, p, metadata)), (CONFIG, lambda p: p.write_text(config))):
        partial = folder / f"{name}.part"
        write(partial)
        os.replace(partial, folder / name)
    return folder


def load(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Turn a float model into the saved quantized one, in place.

    Args:
        model: freshly built, as it was given to `quantize`.
        folder: what `save` wrote.

    Returns:
        the model, wrapped by NNCF, in eval mode.

    Raises:
        StateMismatch: the folder belongs to another model or release, or a file is damaged.
        FileNotFoundError: a file is missing.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text())
        state = OrderedDict(load_file(folder / TENSORS))
        with safe_open(folder / TENSORS, "pt") as file:
            header = file.metadata() or {}
        if METADATA in header:
            state._metadata = json.loads(header[METADATA])  # type: ignore[attr-defined]
    except (ValueError, RecursionError, SafetensorError) as error:
        raise StateMismatch(f"{folder} is damaged ({type(error).__name__}: {error}). Save the model again.") from error
    kind = (header.get("schema", SCHEMA), header.get("version", VERSION))
    if kind != (SCHEMA, VERSION):
        raise StateMismatch(f"{folder} holds {kind[0]} of version {kind[1]}; this release reads version {VERSION}.")
    try:
        loaded: nn.Module = load_from_config(model, config, allowed_modules=ALLOWED_MODULES)
        loaded.load_state_dict(state)
        for found in json.loads(header.get(PLACED, "[]")):
            keep_summary(Summary.from_dict(found), loaded, [quantizer for _, quantizer in iter_quantizers(loaded)])
    except DQAError:
        raise
    except Exception as error:  # NNCF finds out by whatever fails first: a missing key, a module, a hook's place
        raise StateMismatch(
            f"{folder} holds another model than {type(model).__name__}, or is damaged "
            f"({type(error).__name__}: {error})."
        ) from error
    return keep_eager(link(loaded)).eval()
