"""The codec in plain torch operations: the definition that the kernels are tested against, and what runs where they
cannot (other devices). Same bytes, no loops over values; one to two orders of magnitude slower.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..format.errors import CorruptFrame
from ..format.layout import Group, Layout
from ..format.limits import CHUNK, LENGTHS_PER_CHUNK, LONGEST_CODE, RAW
from ..format.tables import NO_ESCAPE, Table, canonical_codes


def pack_bits(values: Tensor, width: int) -> Tensor:
    """Byte planes of `width`-bit values. (K, count) int64 -> (K, width * ceil(count / 8)) uint8."""
    columns = (values.shape[1] + 7) // 8
    grid = torch.nn.functional.pad(values, (0, 8 * columns - values.shape[1])).view(-1, 8, columns)
    column = sum((grid[:, row] << (row * width) for row in range(8)), torch.zeros_like(grid[:, 0]))
    planes = torch.stack([(column >> (8 * byte)) & 255 for byte in range(width)], dim=1)
    return planes.to(torch.uint8).flatten(1)


def unpack_bits(planes: Tensor, width: int, count: int) -> Tensor:
    """Inverse of `pack_bits`: (K, count) int64."""
    columns = (count + 7) // 8
    grid = planes.to(torch.int64).view(-1, width, columns)
    column = sum((grid[:, byte] << (8 * byte) for byte in range(width)), torch.zeros_like(grid[:, 0]))
    mask = (1 << width) - 1
    return torch.stack([(column >> (row * width)) & mask for row in range(8)], dim=1).flatten(1)[:, :count]


def _fixed(codes: Tensor, width: int) -> Tensor:
    parts = [pack_bits(codes & ((1 << min(width, 8)) - 1), min(width, 8))]
    if width > 8:
        parts.append(pack_bits(codes >> 8, width - 8))
    return torch.cat(parts, 1)


def _put_bits(values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Concatenate codes of up to 16 bits, first one lowest.

    Args:
        values, lengths: (S, N) int64.

    Returns:
        (S, most bytes) uint8 and (S,) bytes used.
    """
    ends = lengths.cumsum(1)
    offsets = ends - lengths
    used = (ends[:, -1] + 7) // 8 if lengths.shape[1] else torch.zeros(len(lengths), dtype=torch.int64)
    out = torch.zeros(len(values), int(used.max()) + 3, dtype=torch.int64, device=values.device)
    shifted = values << (offsets & 7)
    for k in range(3):
        out.scatter_add_(1, (offsets >> 3) + k, (shifted >> (8 * k)) & 255)
    return out.to(torch.uint8), used


def _deal(symbols: Tensor) -> Tensor:
    """(K, 4 * quarter) -> (K, 4, quarter): blocks of 16 symbols go to the four streams in turn."""
    return symbols.view(len(symbols), -1, 4, 16).transpose(1, 2).flatten(2)


def _collect(streams: Tensor) -> Tensor:
    return streams.view(len(streams), 4, -1, 16).transpose(1, 2).flatten(1)


def _unit_tables(table: Table, device: torch.device) -> tuple[Tensor, Tensor]:
    codes = torch.from_numpy(canonical_codes(table.lengths).astype(np.int64)).to(device)
    return codes, torch.from_numpy(table.lengths.astype(np.int64)).to(device)


def _encode_chunks(codes: Tensor, group: Group) -> tuple[list[NDArray[np.uint8]], NDArray[np.uint16]]:
    """Chunks of equal size. codes: (K, count) int64, whole codes modulo 2^width."""
    count = codes.shape[1]
    fixed = _fixed(codes, group.width)
    lengths = np.zeros((len(codes), LENGTHS_PER_CHUNK), np.uint16)
    table = group.table
    if table is None:
        return list(fixed.cpu().numpy()), lengths
    packed = [pack_bits((codes >> shift) & ((1 << bits) - 1), bits) for shift, bits in group.packed]
    padded = (count + 63) // 64 * 64
    shift, bits = group.coded
    part = torch.nn.functional.pad((codes >> shift) & ((1 << bits) - 1), (0, padded - count))
    part = _deal(part)
    symbols = part
    if table.escape != NO_ESCAPE:
        symbols = ((part - table.lowest) % (1 << bits)).clamp(max=table.escape)
    words = symbols.view(len(codes), 4, -1, table.word)
    place = torch.arange(table.word, device=codes.device) * table.symbol_bits
    unit = (words << place).sum(-1)
    values, sizes = _unit_tables(table, codes.device)
    missing = sizes[unit] == 0
    unit = torch.where(missing, len(table.lengths) - 1, unit)
    streams, used = _put_bits(values[unit].flatten(0, 1), sizes[unit].flatten(0, 1))
    escaped = (words == table.escape) | missing.unsqueeze(-1)
    result = []
    for k in range(len(codes)):
        pieces = [p[k] for p in packed] + [streams[4 * k + s, : int(used[4 * k + s])] for s in range(4)]
        raw = part[k].flatten()[escaped[k].flatten()]
        if len(raw):
            bytes_, size = _put_bits(raw[None], torch.full_like(raw[None], bits))
            pieces.append(bytes_[0, : int(size[0])])
            lengths[k, 4] = int(size[0])
        chunk = torch.cat(pieces)
        if len(chunk) > fixed.shape[1]:
            chunk = fixed[k]
            lengths[k] = (RAW, 0, 0, 0, 0)
        else:
            lengths[k, :4] = used[4 * k : 4 * k + 4].cpu().numpy()
        result.append(chunk.cpu().numpy())
    return result, lengths


def encode(layout: Layout, codes: Tensor) -> tuple[NDArray[np.uint16], NDArray[np.int64], list[NDArray[np.uint8]]]:
    """Encode whole codes, (B, C, I) int; returns as `engine.encode`."""
    pieces: list[NDArray[np.uint8]] = []
    lengths = [np.zeros((0, LENGTHS_PER_CHUNK), np.uint16)]
    for group in layout.groups:
        stream = codes[:, list(group.channels)].reshape(-1).to(torch.int64) & ((1 << group.width) - 1)
        full = len(stream) // CHUNK * CHUNK
        for part in (stream[:full].view(-1, CHUNK), stream[full:].view(1, -1)):
            if part.numel():
                chunks, sizes = _encode_chunks(part, group)
                pieces += chunks
                lengths.append(sizes)
    return np.concatenate(lengths), np.array([p.size for p in pieces], np.int64), pieces


def _decode_streams(data: Tensor, starts: Tensor, table: Table, quarter: int) -> Tensor:
    """All streams of a group in step. starts: (S,) byte positions; returns (S, quarter) symbols."""
    unit_of, length_of = (torch.from_numpy(t).to(data.device) for t in table.units)
    position = starts * 8
    limit = len(data) - 3
    units = []
    for _ in range(quarter // table.word):
        at = (position >> 3).clamp(max=limit)
        window = data[at] | (data[at + 1] << 8) | (data[at + 2] << 16)
        window = (window >> (position & 7)) & ((1 << LONGEST_CODE) - 1)
        units.append(unit_of[window])
        position = position + length_of[window]
    unit = torch.stack(units, 1)
    place = torch.arange(table.word, device=data.device) * table.symbol_bits
    return ((unit.unsqueeze(-1) >> place) & ((1 << table.symbol_bits) - 1)).flatten(1)


def _read_escapes(data: Tensor, start: int, size: int, bits: int, count: int) -> Tensor:
    if (count * bits + 7) // 8 != size:
        raise CorruptFrame(f"{count} escapes of {bits} bits do not take {size} bytes.")
    offset = torch.arange(count, device=data.device) * bits
    at = start + (offset >> 3)
    return ((data[at] | (data[at + 1] << 8)) >> (offset & 7)) & ((1 << bits) - 1)


def _decode_chunks(data: Tensor, starts: list[int], lengths: NDArray[np.uint16], group: Group, count: int) -> Tensor:
    """Coded chunks of equal size: (K, count) int64 codes modulo 2^width."""
    table = group.table
    if table is None:
        raise CorruptFrame("a group without a table has coded chunks.")
    columns = (count + 7) // 8
    device = data.device
    start = torch.tensor(starts, device=device)
    codes = torch.zeros(len(starts), count, dtype=torch.int64, device=device)
    for shift, bits in group.packed:
        planes = data[start[:, None] + torch.arange(bits * columns, device=device)]
        codes |= unpack_bits(planes, bits, count) << shift
        start = start + bits * columns
    size = torch.from_numpy(lengths.astype(np.int64)).to(device)
    begins = start[:, None] + size[:, :4].cumsum(1) - size[:, :4]
    quarter = (count + 63) // 64 * 16
    symbols = _decode_streams(data, begins.flatten(), table, quarter).view(len(starts), 4 * quarter)
    shift, bits = group.coded
    values = symbols
    if table.escape != NO_ESCAPE:
        values = (symbols + table.lowest) % (1 << bits)
        for k in range(len(starts)):
            where = (symbols[k] == table.escape).nonzero().flatten()
            if len(where) or size[k, 4]:
                after = int(begins[k, 3] + size[k, 3])
                values[k, where] = _read_escapes(data, after, int(size[k, 4]), bits, len(where))
    return codes | (_collect(values.view(len(starts), 4, quarter))[:, :count] << shift)


def decode(layout: Layout, source: Tensor, offsets: NDArray[np.int64], lengths: NDArray[np.uint16]) -> Tensor:
    """Decode whole codes, (B, C, I) int64, signed where the groups are.

    Args:
        source: uint8, the chunks.
        offsets: (chunks + 1,), validated.
        lengths: (chunks, 5).
    """
    data = torch.nn.functional.pad(source.to(torch.int64), (0, 8))
    codes = torch.zeros(layout.batch, layout.channels, layout.inner, dtype=torch.int64, device=source.device)
    chunk = 0
    for group in layout.groups:
        sizes = layout.chunk_symbols(group)
        decoded = torch.zeros(len(sizes), CHUNK, dtype=torch.int64, device=source.device)
        for count in sorted(set(sizes.tolist())):
            which = np.flatnonzero(sizes == count)
            plain = np.array([group.table is None or lengths[chunk + k, 0] == RAW for k in which])
            for k in which[plain]:
                columns, low = (count + 7) // 8, min(group.width, 8)
                at = int(offsets[chunk + k])
                value = unpack_bits(data[at : at + low * columns][None], low, count)
                if group.width > 8:
                    rest = data[at + low * columns : at + group.width * columns][None]
                    value = value | (unpack_bits(rest, group.width - 8, count) << 8)
                decoded[k, :count] = value[0]
            coded = which[~plain]
            if len(coded):
                starts = [int(offsets[chunk + k]) for k in coded]
                found = _decode_chunks(data, starts, lengths[chunk + coded], group, count)
                decoded[torch.from_numpy(coded).to(source.device), :count] = found
        chunk += len(sizes)
        stream = decoded.flatten()[: layout.symbols(group)]
        sign = 1 << (group.width - 1) if group.signed else 0
        codes[:, list(group.channels)] = ((stream ^ sign) - sign).view(layout.batch, len(group.channels), layout.inner)
    return codes
