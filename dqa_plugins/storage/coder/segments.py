"""Segments: packed tensors of one codebook and one shape, kept as one array, so that one call decodes them all.

For what grows block by block and is read whole, again and again. Decoding a small tensor costs less than finding out
where its chunks are; a segment knows that.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..format.codebook import Codebook
from ..format.data import Streams, cut, row_parameters
from ..format.errors import CorruptFrame
from ..format.frame import Frame
from ..format.limits import LENGTHS_PER_CHUNK
from . import codec, engine

LARGEST = 16  # blocks of a segment: what is written again when one more block is packed


class Segment(NamedTuple):
    """Blocks of one sequence, oldest first. Never changed: a longer segment is another one.

    Attributes:
        source: (bytes,) uint8, the chunks of all blocks. A tensor, so that it counts where torch counts memory.
        sizes: (blocks, chunks) int32, bytes of each chunk.
        lengths: (blocks, chunks, 5) uint16, bytes of the streams of each chunk.
    """

    source: Tensor
    sizes: Tensor
    lengths: Tensor

    @property
    def blocks(self) -> int:
        """How many tensors it holds."""
        return len(self.sizes)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(part.nbytes for part in self)


class BlockCoder:
    """What all blocks of one codebook share.

    Args:
        book: of kind "grid", static.
        shape: (1, C, inner) of a block.
        plan: of that shape.
    """

    def __init__(self, book: Codebook, shape: tuple[int, int, int], plan: engine.KernelPlan) -> None:
        self.book, self.shape, self.plan = book, shape, plan
        self.parameters = row_parameters(book, (), torch.float32)
        self.steps = codec.grid_steps(book, self.parameters)

    def encode(self, blocks: Tensor) -> Segment:
        """A segment of (blocks, C, inner) float32 values, contiguous and finite."""
        return joined([self._segment(Streams(*engine.encode(self.plan, x, None, self.steps))) for x in blocks])

    def read(self, section: Tensor) -> Segment:
        """A segment of one block from its data section (docs/storage_format.md).

        Raises:
            CorruptFrame: the section contradicts itself or the codebook.
        """
        return self._segment(cut(Frame(self.shape, torch.float32, self.book, section)).streams)

    def sections(self, segment: Segment) -> list[Tensor]:
        """The data section of each block."""
        ends = segment.sizes.sum(1).cumsum(0).tolist()
        found = []
        for k, end in enumerate(ends):
            payload = segment.source[ends[k - 1] if k else 0 : end].numpy()
            streams = Streams(segment.lengths[k].numpy(), segment.sizes[k].numpy().astype(np.int64), [payload])
            found.append(codec.join(self.plan.layout, (), streams, torch.device("cpu")))
        return found

    def decode(
        self, segment: Segment, first: int, centers: Tensor, turn: tuple[Tensor, Tensor], out: Tensor, at: int
    ) -> None:
        """Write the blocks from `first` on, dequantized, with the centre of each channel added, and rotated.

        Args:
            centers: (C,) float32.
            turn: (tokens, n) float32 cosines and sines of the angles that components d and d + n of each head are
                turned by; n may be 0.
            out: (H, T, D) float32, H * D = C; the blocks are written along T from `at`.

        Raises:
            CorruptFrame: the data contradict themselves.
        """
        from ...kernels.blocks import decode_blocks

        plan = self.plan
        bad = decode_blocks(
            segment.source.numpy(),
            segment.sizes.numpy(),
            segment.lengths.numpy(),
            self.steps.numpy(),
            centers.numpy(),
            turn[0].numpy(),
            turn[1].numpy(),
            plan.layout.inner,
            plan.channels,
            plan.groups,
            plan.decoders,
            first,
            out.numpy(),
            at,
        )
        if bad >= 0:
            raise CorruptFrame(f"'{self.book.name}': the escapes of block {bad} do not fit its streams.")

    def _segment(self, streams: Streams) -> Segment:
        source = torch.empty(int(streams.sizes.sum()), dtype=torch.uint8)
        engine.join(streams.pieces, source.numpy())
        sizes = torch.from_numpy(streams.sizes.astype(np.int32))
        return Segment(source, sizes[None], torch.from_numpy(streams.lengths).view(1, -1, LENGTHS_PER_CHUNK))


def joined(segments: list[Segment]) -> Segment:
    """One segment of several."""
    return segments[0] if len(segments) == 1 else Segment(*(torch.cat(parts) for parts in zip(*segments, strict=True)))


def appended(segments: tuple[Segment, ...], more: Segment) -> tuple[Segment, ...]:
    """Segments with the blocks of one more, none above LARGEST blocks; full ones are shared, not copied."""
    while more.blocks:
        room = LARGEST - segments[-1].blocks if segments else 0
        if room > 0:
            segments = (*segments[:-1], joined([segments[-1], part(more, 0, room)]))
        else:
            room = LARGEST
            segments = (*segments, part(more, 0, room))
        more = part(more, room, more.blocks)
    return segments


def part(segment: Segment, first: int, last: int) -> Segment:
    """Blocks `first` to `last` - 1 of a segment; a copy, so that the rest can be forgotten."""
    if first <= 0 and last >= segment.blocks:
        return segment
    ends = [0, *segment.sizes.sum(1).cumsum(0).tolist()]
    last = min(last, segment.blocks)
    first = min(first, last)
    return Segment(
        segment.source[ends[first] : ends[last]].clone(),
        segment.sizes[first:last].clone(),
        segment.lengths[first:last].clone(),
    )
