"""BlockStore: blocks of tokens of one tensor (the keys or values of a layer) to bytes and back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dqa_plugins.storage.coder import engine
from dqa_plugins.storage.coder.segments import BlockCoder, Segment, appended, part
from dqa_plugins.storage.format.data import cut
from dqa_plugins.storage.packed import PackedActivation
from dqa_plugins.storage.packing import pack

from .rotary import Turn, rotated
from .settings import TensorSettings

# of one sequence, oldest first. Tensors on the CPU with a step per channel are segments, all others are frames
Blocks = tuple[Segment, ...] | tuple[PackedActivation, ...]


_MANY = 16  # pieces of work that threads share


class BlockStore:
    """Packs and unpacks blocks.

    Args:
        settings: of the tensor.
        block: tokens of a block.
        coder: of its segments; None: blocks are frames.
    """

    def __init__(self, settings: TensorSettings, block: int, coder: BlockCoder | None) -> None:
        self.settings, self.block, self.coder = settings, block, coder
        self.heads, self.width, self.name = settings.heads, settings.width, settings.quantizer.name

    def pack(self, x: Tensor, turn: Turn) -> list[Blocks]:
        """Blocks of each sequence of x, (B, H, n * block, D), whose tokens are rotated by these angles."""
        s = self.settings
        y = rotated(x.float().transpose(2, 3), turn, back=True).flatten(1, 2) - s.center.to(x.device)[:, None]
        y = y.unflatten(2, (-1, self.block)).transpose(1, 2).contiguous()  # (B, n, C, block)
        rows = [s.rounded(row) for row in y]
        if self.coder is not None and x.device.type == "cpu":
            return [(self.coder.encode(row),) for row in rows]
        return [tuple(pack(self._as_seen(b), s.quantizer, codebook=s.book) for b in row) for row in rows]

    def _as_seen(self, block: Tensor) -> Tensor:
        """(C, block) as the quantizer takes it."""
        if self.settings.by_channel:
            return block.unsqueeze(0)
        return block.unflatten(0, (self.heads, self.width)).permute(2, 0, 1).flatten(0, 1)

    def append(self, blocks: Blocks, more: Blocks) -> Blocks:
        """Blocks of a sequence, and the ones behind them."""
        if all(isinstance(b, Segment) for b in (*blocks, *more)):
            return functools.reduce(appended, more, blocks)  # type: ignore[arg-type]
        return (*blocks, *more)

    def part(self, blocks: Blocks, first: int, last: int) -> Blocks:
        """Blocks `first` to `last` - 1."""
        found, at = [], 0
        for b in blocks:
            count = blocks_in(b)
            if at < last and at + count > first:
                found.append(part(b, first - at, last - at) if isinstance(b, Segment) else b)
            at += count
        return tuple(found)  # type: ignore[return-value]

    def reads(self, rows: Sequence[Blocks], first: int, out: Tensor, at: int, turn: Turn) -> list[Callable[[], None]]:
        """Pieces of work that write the blocks from `first` on into out, (B, H, T, D), from token `at`.

        Args:
            turn: angles of the tokens of all blocks, the skipped ones included.

        They may run in any order, in several threads, and raise CorruptFrame where data contradict themselves.
        """
        found: list[Callable[[], None]] = []
        for target, row in zip(out, rows, strict=True):
            number = 0
            for b in row:
                count, skip = blocks_in(b), max(0, first - number)
                if skip < count:
                    start = at + (number + skip - first) * self.block
                    own = turn.behind((number + skip) * self.block)
                    found.append(functools.partial(self._read, b, skip, count - skip, target, start, own))
                number += count
        return found

    def _read(
        self, b: Segment | PackedActivation, skip: int, count: int, target: Tensor, start: int, turn: Turn
    ) -> None:
        if isinstance(b, PackedActivation):
            target[:, start : start + self.block] = rotated(self._unpacked(b), turn).transpose(1, 2)
            return
        direct = target.dtype == torch.float32
        values = target if direct else torch.empty(self.heads, count * self.block, self.width)
        self.coder.decode(b, skip, self.settings.center, turn, values, start if direct else 0)  # type: ignore[union-attr]
        if not direct:
            target[:, start : start + values.shape[1]] = values

    def _unpacked(self, frame: PackedActivation) -> Tensor:
        """(H, D, block), the rotation still to be done."""
        y = frame.unpack()
        if self.settings.by_channel:
            y = y.view(self.heads, self.width, self.block)
        else:
            y = y.view(self.block, self.heads, self.width).permute(1, 2, 0)
        return y + self.settings.center.to(y.device).view(self.heads, self.width, 1)

    # ------------------------------------------------------------ as bytes

    def sections(self, blocks: Blocks) -> list[Tensor]:
        """The data section of each block (docs/storage_format.md)."""
        found: list[Tensor] = []
        for b in blocks:
            found += self.coder.sections(b) if isinstance(b, Segment) and self.coder else [b.data.cpu()]  # type: ignore[union-attr]
        return found

    def restored(self, sections: Sequence[Tensor], device: torch.device) -> Blocks:
        """Inverse of `sections`.

        Raises:
            CorruptFrame: a section contradicts itself or the settings.
        """
        blocks: Blocks = ()
        for section in sections:
            if self.coder is not None and device.type == "cpu":
                blocks = self.append(blocks, (self.coder.read(section),))
                continue
            shape = self._as_seen(torch.empty(self.heads * self.width, self.block, device="meta")).shape
            frame = PackedActivation(tuple(shape), torch.float32, self.settings.book, section.to(device))
            cut(frame)
            blocks = self.append(blocks, (frame,))
        return blocks


def run(work: Sequence[Callable[[], None]]) -> None:
    """Do pieces of work, several at a time where they are many.

    torch's idle threads spin for milliseconds after each of its operations (GNU OpenMP, torch 2.13): a few pieces are
    done before another thread gets a core (at 2,048 tokens and two threads: 32 ms a token alone, 49 ms shared).
    """
    if len(work) >= _MANY:
        engine.run_all(work)
    else:
        for piece in work:
            piece()


def blocks_in(b: Segment | PackedActivation) -> int:
    """Blocks of tokens that a segment or a frame holds."""
    return b.blocks if isinstance(b, Segment) else 1
