"""Frames that earlier releases wrote are read as they were: frames/version_1.json, written by release 0.1's code.

Each entry: a frame in base64, and the SHA-256 of the bytes of the tensor that it unpacked to.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

import pytest
import torch

from dqa_plugins.storage import PackedActivation

ENTRIES = json.loads((Path(__file__).parent / "frames" / "version_1.json").read_text())


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e["name"])
def test_frames_of_earlier_releases(entry: dict[str, str]) -> None:
    data = base64.b64decode(entry["frame"])
    packed = PackedActivation.from_bytes(data)
    values = packed.unpack()
    assert list(values.shape) == entry["shape"]
    assert str(values.dtype) == f"torch.{entry['dtype']}"
    assert hashlib.sha256(values.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest() == entry["sha256"]
    assert packed.to_bytes() == data


def test_every_kind_is_among_them() -> None:
    kinds = {PackedActivation.from_bytes(base64.b64decode(e["frame"])).codebook.kind for e in ENTRIES}
    assert kinds == {"grid", "noise", "affine", "dense_sparse"}
