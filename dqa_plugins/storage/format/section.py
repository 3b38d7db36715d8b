"""The codebook section of a frame: what is the same for all tensors of a layer (docs/storage_format.md).

Reading validates every field before anything is built from it.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .codebook import KINDS, PARAMETERS, Codebook
from .errors import CorruptFrame
from .layout import CODINGS, Group, joint_group, packed_group, shift_error_group
from .limits import MAX_BITS, MAX_CODE, MAX_GROUPS, MIN_BITS
from .tables import NO_ESCAPE, Table

_HEAD = struct.Struct("<BBBbBBHII")  # kind, bits, flags, channel axis, coding, 0, groups, channels, parameters
_GROUP = struct.Struct("<BB")  # width, mode
_TABLE = struct.Struct("<BBBBH")  # word, symbol bits, lowest, has an escape, bytes of the lengths
_SIGNED, _DYNAMIC, _PER_CHANNEL, _PER_BATCH, _DOUBLE = 1, 2, 4, 8, 16
_PACKED, _SHIFT_ERROR, _JOINT = 0, 1, 2
# of an explicit grid, by number: 1 zero point, 2 bias, 4 thresholds outside of which values are kept
_FIELDS = tuple(
    ("step", *(["zero_point"] * (k & 1)), *(["bias"] * (k >> 1 & 1)), *(["lower", "upper"] * (k >> 2)))
    for k in range(8)
)


def _deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


def _mode(group: Group) -> int:
    if group.table is None:
        return _PACKED
    return _JOINT if group.coded[0] + group.coded[1] == group.width else _SHIFT_ERROR


def write_codebook(book: Codebook) -> bytes:
    """The codebook section."""
    double = any(p.dtype == torch.float64 for p in book.static)
    flags = (
        _SIGNED * book.signed
        | _DYNAMIC * book.dynamic
        | _PER_CHANNEL * book.per_channel
        | _PER_BATCH * book.per_batch
        | _DOUBLE * double
    )
    size = book.static[0].numel() if book.static else 0
    group_of = np.zeros(book.channels, np.uint8)
    for i, group in enumerate(book.groups):
        group_of[list(group.channels)] = i
    kind, coding = KINDS.index(book.kind), CODINGS.index(book.coding)
    out = [_HEAD.pack(kind, book.bits, flags, book.channel_axis, coding, 0, len(book.groups), book.channels, size)]
    out += [book.extra_bits.to(torch.int8).numpy().tobytes(), group_of.tobytes()]
    out += [p.to(torch.float64 if double else torch.float32).numpy().tobytes() for p in book.static]
    if book.kind == "noise":
        out.append(book.noise.to(torch.float32).numpy().tobytes())
    if book.kind == "explicit":
        out.append(bytes([_FIELDS.index(book.parameters)]))
        out.append(book.low.to(torch.int32).numpy().tobytes())
    for group in book.groups:
        out.append(_GROUP.pack(group.width, _mode(group)))
        if group.table is not None:
            table, lengths = group.table, _deflate(group.table.lengths.tobytes())
            escape = table.escape != NO_ESCAPE
            out += [_TABLE.pack(table.word, table.symbol_bits, table.lowest, escape, len(lengths)), lengths]
    return b"".join(out)


class _Reader:
    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.at:
            raise CorruptFrame(f"the codebook ends at byte {len(self.data)}, {size} more are announced at {self.at}.")
        self.at += size
        return self.data[self.at - size : self.at]

    def unpack(self, form: struct.Struct) -> tuple[int, ...]:
        return form.unpack(self.take(form.size))

    def array(self, count: int, dtype: str) -> NDArray[np.generic]:
        return np.frombuffer(self.take(count * np.dtype(dtype).itemsize), dtype).copy()


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise CorruptFrame(message)


def read_codebook(data: memoryview) -> Codebook:
    """Inverse of `write_codebook`.

    Raises:
        CorruptFrame: a field has a value that it cannot have, or bytes are missing or left over.
    """
    reader = _Reader(data)
    kind_number, bits, flags, axis, coding, zero, count, channels, size = reader.unpack(_HEAD)
    _require(kind_number < len(KINDS) and coding < len(CODINGS) and zero == 0, "the codebook is of an unknown kind.")
    _require(MIN_BITS <= bits <= MAX_BITS, f"codes of {bits} bits: {MIN_BITS} to {MAX_BITS} exist.")
    _require(
        flags < 32 and 1 <= channels <= len(data) and 1 <= count <= MAX_GROUPS, "the codebook head is out of range."
    )
    kind, dynamic, signed = KINDS[kind_number], bool(flags & _DYNAMIC), bool(flags & _SIGNED)
    per_channel = bool(flags & _PER_CHANNEL)
    _require(axis != 0 or channels == 1, "a tensor without a channel axis has one channel.")
    _require(size == (0 if dynamic else channels if per_channel else 1), f"{size} parameters are announced.")
    _require(kind != "explicit" or (dynamic and not signed), "an explicit grid is stored with each tensor.")
    extra = torch.from_numpy(reader.array(channels, "<i1")).to(torch.int64)
    low, high = (1 - bits, bits) if kind in ("grid", "explicit") else (0, 0)
    _require(bool((extra >= low).all() and (extra <= high).all()), "extra bits are out of range.")
    group_of = reader.array(channels, "<u1")
    parameters, static = PARAMETERS[kind], []
    for _ in parameters if not dynamic else ():
        values = torch.from_numpy(reader.array(size, "<f8" if flags & _DOUBLE else "<f4"))
        _require(bool(torch.isfinite(values).all()), "a parameter is NaN or Inf.")
        static.append(values if per_channel else values.reshape(()))
    noise = torch.from_numpy(reader.array(channels, "<f4")) if kind == "noise" else torch.empty(0)
    smallest = torch.empty(0, dtype=torch.int64)
    if kind == "explicit":
        (fields,) = reader.take(1)
        _require(fields < len(_FIELDS), "an explicit grid has unknown fields.")
        parameters = _FIELDS[fields]
        smallest = torch.from_numpy(reader.array(channels, "<i4")).to(torch.int64)
        _require(bool((smallest.abs() <= MAX_CODE).all()), f"codes beyond {MAX_CODE} are announced.")
    groups = tuple(_read_group(reader, np.flatnonzero(group_of == i), extra, bits, signed) for i in range(count))
    _require(int(group_of.max()) < count, "a channel belongs to a group that does not exist.")
    _require(reader.at == len(data), f"the codebook is followed by {len(data) - reader.at} bytes.")
    return Codebook(
        kind=kind,
        coding=CODINGS[coding],
        bits=bits,
        signed=signed,
        channel_axis=axis,
        extra_bits=extra,
        groups=groups,
        parameters=parameters,
        static=tuple(static),
        dynamic=dynamic,
        per_channel=per_channel,
        per_batch=bool(flags & _PER_BATCH),
        noise=noise,
        low=smallest,
    )


def _read_group(reader: _Reader, members: NDArray[np.int64], extra: Tensor, bits: int, signed: bool) -> Group:
    width, mode = reader.unpack(_GROUP)
    _require(len(members) > 0, "a group has no channels.")
    _require(bool((extra[torch.from_numpy(members)] + bits == width).all()), f"a group of {width} bits has others.")
    channels = tuple(members.tolist())
    if mode == _PACKED:
        return packed_group(channels, width, signed)
    word, symbol_bits, lowest, escape, size = reader.unpack(_TABLE)
    _require(mode in (_SHIFT_ERROR, _JOINT), f"group mode {mode} does not exist.")
    coded = width - bits if mode == _SHIFT_ERROR else min(width, 8)
    _require(coded > 0 and escape <= 1, "a group codes no bits.")
    small = word == 1 and ((symbol_bits == coded and not escape) or (escape and symbol_bits <= min(6, coded)))
    words = ((word == 2 and symbol_bits <= 6) or (word == 4 and symbol_bits <= 3)) and symbol_bits >= 2 and escape
    _require(bool(symbol_bits >= 1 and (small or words)), f"no table has words of {word} x {symbol_bits} bits.")
    expected = 1 << (symbol_bits * word)
    unpacker = zlib.decompressobj(-15)
    try:
        lengths = unpacker.decompress(bytes(reader.take(size)), expected + 1)
    except zlib.error as error:
        raise CorruptFrame(f"code lengths do not inflate: {error}.") from None
    _require(len(lengths) == expected and unpacker.eof and not unpacker.unused_data, "code lengths are cut short.")
    table = Table(
        word, symbol_bits, lowest, expected_escape(symbol_bits, bool(escape)), np.frombuffer(lengths, np.uint8).copy()
    )
    table.check()
    _require(lowest < 1 << coded, f"symbol 0 stands for {lowest}, which {coded} bits cannot hold.")
    if mode == _SHIFT_ERROR:
        return shift_error_group(channels, width, signed, bits, table)
    return joint_group(channels, width, signed, table)


def expected_escape(symbol_bits: int, escape: bool) -> int:
    """The escape symbol of a table, see `Table`."""
    return (1 << symbol_bits) - 1 if escape else NO_ESCAPE
