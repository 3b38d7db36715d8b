"""The memory that the layers of a cache unpack into, one layer at a time, and what they all need for that."""

from __future__ import annotations

import torch
from torch import Tensor

from .rotary import Turn, turn

_SPARE = 256  # tokens that a workspace is larger than asked for, so that it does not grow with each token


class Workspace:
    """Two buffers, for keys and for values; one cache's, so that generations side by side do not mix."""

    def __init__(self) -> None:
        self.clear()

    def get(self, part: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A contiguous tensor of this shape, with the dtype and device of `like`; its last content is lost.

        Args:
            part: 0 for keys, 1 for values.
        """
        size = torch.Size(shape).numel()
        buffer = self._buffers[part]
        if buffer.numel() < size or buffer.dtype != like.dtype or buffer.device != like.device:
            self._buffers[part] = torch.empty(0)  # the old one goes before the new one comes
            buffer = like.new_empty(size // shape[2] * (shape[2] + _SPARE))
            self._buffers[part] = buffer
        return buffer[:size].view(shape)

    def turn(self, frequencies: tuple[float, ...], first: int, count: int) -> Turn:
        """Angles of `count` positions from `first` on."""
        begin, made = self._turns.get(frequencies, (0, None))
        if made is None or first < begin or first + count > begin + len(made.cos):
            begin, made = first, turn(frequencies, torch.arange(first, first + count + _SPARE))
            self._turns[frequencies] = begin, made
        return made.behind(first - begin)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(b.nbytes for b in (*self._buffers, *(x for _, made in self._turns.values() for x in made)))

    def clear(self) -> None:
        """Give the memory back."""
        self._buffers: list[Tensor] = [torch.empty(0), torch.empty(0)]
        self._turns: dict[tuple[float, ...], tuple[int, Turn]] = {}
