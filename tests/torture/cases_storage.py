"""Packed activations: kernels against the reference, frames and codebooks that were damaged or belong to others."""

from __future__ import annotations

import struct
import zlib
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st

from dqa_plugins import Method
from dqa_plugins.storage import PackedActivation, calibrate_tables, pack, storage_bound
from dqa_plugins.storage.coder import codec, reference
from dqa_plugins.storage.format.data import cut
from dqa_plugins.storage.format.frame import HEADER

from .few import FEW
from .material import Spec, axis_of, methods, quantizer_of, same, seeds, specs
from .registry import Defect, case_class

CODINGS = ("none", "shift_error", "joint", "auto")
NAMES = ("block.relu", "frame", "packed", "codebook", "bytes")


class PackCase(NamedTuple):
    """A tensor that a quantizer of another one packs."""

    method: Method
    calibration: Spec
    x: Spec
    axis: int
    coding: str


@st.composite
def pack_cases(draw: st.DrawFn) -> PackCase:
    calibration, x = draw(specs()), draw(specs(bad=draw(st.sampled_from([False] * 9 + [True]))))
    axis = axis_of(draw(st.integers(0, 9)), len(calibration.shape))
    shape = (x.shape[0], *calibration.shape[1:])
    if draw(st.sampled_from([False] * 9 + [True])):  # more than one chunk, and an odd number of values
        shape = (*shape[:-1], shape[-1] * 1013)
    axis = axis if shape == (x.shape[0], *calibration.shape[1:]) else 1
    method = draw(methods)
    if len(shape) == 2 and shape[1:] != calibration.shape[1:]:
        method = method.replace(channel_axis=None)
    return PackCase(method, calibration, x._replace(shape=shape), axis, draw(st.sampled_from(CODINGS)))


@case_class("pack and unpack", pack_cases(), names=NAMES, share=2)
def pack_and_unpack(case: PackCase) -> None:
    """unpack gives the quantizer's values bit for bit, through bytes too, within the bound; the reference's bytes."""
    quantizer = quantizer_of(case.method, case.calibration.make(), axis=case.axis)
    x = case.x.make().detach()
    packed = pack(x, quantizer, case.coding)
    expected = quantizer(x)
    same(packed.unpack(), expected, "unpacked")
    same(PackedActivation.from_bytes(packed.to_bytes()).unpack(), expected, "through bytes")
    limit = storage_bound(quantizer, tuple(x.shape), case.coding, dtype=x.dtype)
    assert packed.nbytes <= limit, f"{packed.nbytes} bytes, the bound says {limit}"
    parts = cut(packed)
    codes = codec.decode_stored(packed.codebook, parts.layout, parts.streams)
    lengths, sizes, pieces = reference.encode(parts.layout, codes)
    assert bool((lengths == parts.streams.lengths).all()), "other lengths than the reference's"
    assert bool((sizes == parts.streams.sizes).all()), "other sizes than the reference's"
    assert b"".join(p.tobytes() for p in pieces) == parts.streams.source.tobytes(), "other bytes than the reference's"


class BookCase(NamedTuple):
    """A codebook of one quantizer given to pack with another."""

    mine: Method
    theirs: Method
    my_axis: int
    their_axis: int
    shape: tuple[int, ...]
    seed: int
    coding: str


books = st.builds(
    BookCase, st.sampled_from(FEW), st.sampled_from(FEW), st.integers(1, 3), st.integers(1, 3),
    st.tuples(st.integers(1, 2), st.integers(2, 4), st.integers(2, 4), st.integers(2, 4)), seeds,
    st.sampled_from(CODINGS),
)  # fmt: skip


@case_class("another's codebook", books, names=NAMES)
def anothers_codebook(case: BookCase) -> None:
    """Either it is refused, or unpack gives the quantizer's values."""
    x = Spec(case.shape, seed=case.seed).dense()
    mine = quantizer_of(case.mine, x, axis=case.my_axis)
    theirs = quantizer_of(case.theirs, x * 2, axis=case.their_axis)
    book = calibrate_tables(theirs, x, case.coding)
    packed = pack(x, mine, codebook=book)
    same(packed.unpack(), mine(x), "packed with another's codebook")


class FrameCase(NamedTuple):
    """A frame with bytes changed, cut or put between; sealed: its checksum made to match."""

    method: int
    coding: str
    seed: int
    edit: str
    where: int
    value: int
    sealed: bool


frames = st.builds(
    FrameCase, st.integers(0, len(FEW) - 1), st.sampled_from(CODINGS), st.integers(0, 7),
    st.sampled_from(["set", "set", "set", "cut", "insert", "repeat", "swap", "zero"]),
    st.integers(0, 9999), st.integers(0, 255), st.booleans(),
)  # fmt: skip
_FRAMES: dict[tuple[int, str, int], bytes] = {}


def frame_of(method: int, coding: str, seed: int) -> bytes:
    """A small frame."""
    key = (method, coding, seed)
    if key not in _FRAMES:
        x = Spec((2, 4, 5, 5), character="relu" if seed % 2 else "normal", seed=seed).dense()
        _FRAMES[key] = pack(x, quantizer_of(FEW[method], x), coding).to_bytes()
    return _FRAMES[key]


@case_class("frames", frames, names=(), share=4)
def frames_that_were_changed(case: FrameCase) -> None:
    """A changed frame is refused, or (its checksum forged) decodes to a tensor of the shape it claims."""
    data = frame_of(case.method, case.coding, case.seed)
    at, other = case.where % len(data), case.where * 31 % len(data)
    changed = bytearray(data)
    if case.edit == "set":
        changed[at] = case.value
    elif case.edit == "cut":
        changed = changed[:at]
    elif case.edit == "insert":
        changed[at:at] = bytes([case.value])
    elif case.edit == "repeat":
        changed[at:at] = changed[at : at + 8]
    elif case.edit == "swap":
        changed[at], changed[other] = changed[other], changed[at]
    else:
        changed[at : at + 8] = bytes(8)
    if case.sealed and len(changed) > HEADER.size:
        crc = slice(HEADER.size - 4, HEADER.size)
        value = zlib.crc32(bytes(changed[HEADER.size :]), zlib.crc32(bytes(changed[: crc.start])))
        changed[crc] = struct.pack("<I", value)
    packed = PackedActivation.from_bytes(bytes(changed))
    y = packed.unpack()
    assert tuple(y.shape) == tuple(packed.shape), "another shape than the frame says"
    if not case.sealed and bytes(changed) != data:
        raise Defect("a changed frame was taken")


@case_class("what is no frame", st.one_of(st.binary(max_size=200), st.none(), st.text(), st.integers()), names=())
def no_frame(case: Any) -> None:
    """Any bytes, and what is no bytes."""
    PackedActivation.from_bytes(case)
    raise Defect("it was taken for a frame")


class WrongCase(NamedTuple):
    """Arguments of pack that do not fit."""

    method: int
    state: str
    what: str


WRONG = ("state", "dtype", "0-d", "channels", "coding", "object", "sparse", "float8", "empty")


@case_class(
    "wrong arguments of pack",
    st.builds(WrongCase, st.integers(0, len(FEW) - 1), st.sampled_from(["observe", "frozen"]), st.sampled_from(WRONG)),
    names=(*NAMES, "coding"), share=0.2,
)  # fmt: skip
def wrong_arguments(case: WrongCase) -> None:
    """Refused by name; an empty tensor packs to nothing and back."""
    x = Spec((2, 4, 5)).dense()
    quantizer = quantizer_of(FEW[case.method], x, freeze=case.state == "frozen")
    given: dict[str, Any] = {
        "dtype": x.long(), "0-d": torch.tensor(1.0), "channels": torch.ones(2, 3, 5), "object": [1.0],
        "sparse": x.to_sparse(), "float8": x.to(torch.float8_e5m2), "empty": torch.empty(0, 4, 5),
    }  # fmt: skip
    packed = pack(given.get(case.what, x), quantizer, "huffman" if case.what == "coding" else "auto")
    fits = case.what == "state" or (case.what == "channels" and not FEW[case.method].uses_channels)
    if case.what == "empty":
        same(packed.unpack(), torch.empty(0, 4, 5), "empty")
    elif not fits:
        raise Defect(f"{case.what} was taken")
