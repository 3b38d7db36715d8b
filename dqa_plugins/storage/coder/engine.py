"""Running the kernels: ranges of chunks in threads, and what goes in and out of them.

One thread serves small tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import local
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...errors import InvalidArgument
from ...kernels import fields as f
from ...kernels.threads import PARTS, share, torch_threads
from ..format.layout import Layout
from ..format.limits import LENGTHS_PER_CHUNK
from ..format.tables import NO_ESCAPE

PARALLEL_CHUNKS = 64  # chunks (256 k values) below which one thread is used
PARALLEL_BYTES = 2**20  # bytes below which one thread copies
_EMPTY_FLOAT, _EMPTY_CODES = np.empty(0, np.float32), np.empty(0, np.int16)
_local = local()
_threads: int | None = None


def set_threads(count: int | None) -> None:
    """How many threads encode and decode (None: as many as torch uses at the time of the call)."""
    global _threads
    if count is not None and count < 1:
        raise InvalidArgument(f"set_threads({count}): at least one thread is needed.")
    _threads = count


def get_threads() -> int:
    """Threads that a large tensor is coded with."""
    return _threads if _threads is not None else torch_threads()


def _run(task: Callable[[int, int, int], Any], chunks: int) -> list[Any]:
    """task(number, first, last) over ranges that cover all chunks; the results in order."""
    threads = get_threads()
    if chunks < PARALLEL_CHUNKS or threads == 1:
        return [task(0, 0, chunks)]
    parts = min(PARTS * threads, chunks // (PARALLEL_CHUNKS // 2))
    edges = [chunks * i // parts for i in range(parts + 1)]
    return share(lambda i: task(i, edges[i], edges[i + 1]), parts, threads)


def run_all(work: Sequence[Callable[[], None]]) -> None:
    """Do pieces of work, several at a time."""
    share(lambda i: work[i](), len(work), get_threads())


def join(parts: list[NDArray[np.uint8]], out: NDArray[np.uint8]) -> None:
    """Copy parts behind each other into `out`, large ones in several threads."""
    ends = np.cumsum([part.size for part in parts]).tolist()

    def copy(i: int) -> None:
        out[ends[i] - parts[i].size : ends[i]] = parts[i]

    share(copy, len(parts), get_threads() if out.size >= PARALLEL_BYTES else 1)


def _scratch() -> dict[int, NDArray[np.uint8]]:
    """Output buffers of the calling thread, by task number, valid until its next call: fresh memory would cost as
    much as the encoding."""
    buffers: dict[int, NDArray[np.uint8]] = _local.__dict__.setdefault("buffers", {})
    return buffers


def kernel_arrays(layout: Layout) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(channels, groups) as `kernels.encode.encode_range` takes them."""
    rows = np.zeros((len(layout.groups), f.FIELDS), np.int64)
    offset = chunk = 0
    for row, g in zip(rows, layout.groups, strict=True):
        row[f.CHANNELS], row[f.CHANNEL_OFFSET] = len(g.channels), offset
        row[f.WIDTH], row[f.SIGN] = g.width, (1 << (g.width - 1)) if g.signed else 0
        if g.table is not None and g.packed:  # without a table the kernels go by the width
            row[f.PACKED_SHIFT], row[f.PACKED_BITS] = g.packed[0]
        row[f.CODED_SHIFT], row[f.CODED_BITS] = g.coded
        row[f.ESCAPE] = NO_ESCAPE
        if g.table is not None:
            row[f.LOWEST], row[f.ESCAPE] = g.table.lowest, g.table.escape
            row[f.SYMBOL_BITS], row[f.WORD], row[f.FLUSH] = g.table.symbol_bits, g.table.lookup, g.table.flush
        row[f.FIRST_CHUNK], row[f.SYMBOLS] = chunk, layout.symbols(g)
        offset += len(g.channels)
        chunk += layout.chunks(g)
    numbers = [c for g in layout.groups for c in g.channels]
    return np.array(numbers, np.int64), rows


def _tables(layout: Layout, decoder: bool) -> NDArray[np.uint64]:
    tables = [g.table for g in layout.groups]
    made = [None if t is None else t.decoder if decoder else t.encoder for t in tables]
    width = max([t.size for t in made if t is not None], default=1)
    stacked = np.zeros((len(made), width), np.uint64)
    for row, table in zip(stacked, made, strict=True):
        if table is not None:
            row[: table.size] = table
    return stacked


class KernelPlan:
    """A layout made ready for the kernels; kept with the codebook, one for each shape.

    Args:
        like: a plan whose groups have the same tables in the same order, which are then held once.
    """

    def __init__(self, layout: Layout, like: KernelPlan | None = None) -> None:
        self.layout = layout
        self.channels, self.groups = kernel_arrays(layout)
        self.encoders: NDArray[np.uint64] = like.encoders if like else _tables(layout, False)
        self.decoders: NDArray[np.uint64] = like.decoders if like else _tables(layout, True)
        self.fixed_sizes = layout.fixed_sizes()
        self.fixed_edges = np.concatenate([[0], np.cumsum(self.fixed_sizes)]).astype(np.int64)


def encode(
    plan: KernelPlan, values: Tensor | None, codes: Tensor | None, steps: Tensor
) -> tuple[NDArray[np.uint16], NDArray[np.int64], list[NDArray[np.uint8]]]:
    """Encode a tensor.

    Args:
        plan: of its layout.
        values: float32, contiguous, any shape of B * C * I values; or None with codes given.
        codes: int16, likewise.
        steps: (B or 1, C) float32.

    Returns:
        lengths (chunks, 5), sizes (chunks,) and the bytes, in pieces that follow each other; the pieces are valid
        until the next call in this thread.

    Raises:
        FloatingPointError: NaN or Inf among the values.
    """
    from ...kernels.encode import encode_range

    layout = plan.layout
    lengths = np.zeros((layout.total_chunks, LENGTHS_PER_CHUNK), np.uint16)
    sizes = np.zeros(layout.total_chunks, np.int64)
    x = _EMPTY_FLOAT if values is None else values.detach().numpy().reshape(-1)
    q = _EMPTY_CODES if codes is None else codes.numpy().reshape(-1)
    step = np.ascontiguousarray(steps.numpy())

    buffers = _scratch()

    def task(number: int, first: int, last: int) -> NDArray[np.uint8]:
        size = int(plan.fixed_edges[last] - plan.fixed_edges[first]) + f.SLACK
        out = buffers.get(number)
        if out is None or not size <= out.size <= 4 * size + 2**20:
            out = buffers[number] = np.empty(size, np.uint8)
        end = encode_range(
            x, q, step, layout.inner, plan.channels, plan.groups, plan.encoders, first, last, out, lengths, sizes
        )
        if end < 0:
            raise FloatingPointError
        return out[:end]

    return lengths, sizes, _run(task, layout.total_chunks) if layout.total_chunks else []


def decode(
    plan: KernelPlan,
    source: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    lengths: NDArray[np.uint16],
    steps: Tensor,
    values: Tensor | None,
    codes: Tensor | None,
) -> int:
    """Decode into values (float32, dequantized with steps) or into codes (int16), whichever is given.

    Args:
        source: the payload.
        offsets: (chunks + 1,), validated, see `format.data.split`.
        lengths: (chunks, 5).

    Returns:
        -1, or the number of a chunk whose escapes do not fit.
    """
    from ...kernels.decode import decode_range

    layout = plan.layout
    out = _EMPTY_FLOAT if values is None else values.numpy().reshape(-1)
    q = _EMPTY_CODES if codes is None else codes.numpy().reshape(-1)
    step = np.ascontiguousarray(steps.numpy())

    def task(number: int, first: int, last: int) -> int:
        return int(
            decode_range(
                source,
                offsets,
                lengths,
                step,
                layout.inner,
                plan.channels,
                plan.groups,
                plan.decoders,
                first,
                last,
                out,
                q,
            )
        )

    return max(_run(task, layout.total_chunks), default=-1) if layout.total_chunks else -1
