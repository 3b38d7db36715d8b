"""PackedActivation: a tensor as bytes.

It holds one uint8 tensor, and a reference to the codebook that it shares with all tensors of its layer.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor

from .coder import codec
from .format.data import cut
from .format.errors import NotPackable
from .format.frame import Frame, read_frame, write_frame
from .format.section import write_codebook


@dataclass(frozen=True, eq=False, repr=False)
class PackedActivation(Frame):
    """A packed tensor: plain data (see `Frame`), and what can be done with it."""

    @property
    def codebook_nbytes(self) -> int:
        """Bytes of the codebook, which all tensors of a layer share."""
        return len(write_codebook(self.codebook))

    @property
    def bits_per_activation(self) -> float:
        """8 * nbytes / values; 0 for an empty tensor."""
        return 8 * self.nbytes / self.numel if self.numel else 0.0

    def unpack(self, out: Tensor | None = None) -> Tensor:
        """The fake-quantized tensor, exactly (a negative zero becomes zero).

        Args:
            out: contiguous tensor of this shape and dtype to write into; None: a new one.

        Raises:
            CorruptFrame: the data contradict themselves.
            NotPackable: `out` does not fit.
        """
        if out is not None and (out.shape != self.shape or out.dtype != self.dtype or not out.is_contiguous()):
            raise NotPackable(
                f"out is {tuple(out.shape)} {out.dtype}; it must be contiguous, {self.shape} {self.dtype}."
            )
        x = codec.decode(self, out)
        return x if out is None or x is out else out.copy_(x)

    def to_bytes(self) -> bytes:
        """Self-contained bytes: header, codebook, data, checksum."""
        return write_frame(self)

    @staticmethod
    def from_bytes(data: bytes | bytearray | memoryview) -> PackedActivation:
        """Inverse of `to_bytes`; everything is validated before anything is decoded.

        Raises:
            CorruptFrame: no bytes, truncated, damaged, or followed by other bytes.
            UnsupportedFrame: of another format version.
        """
        frame = read_frame(data)
        cut(frame)
        return PackedActivation(**{f.name: getattr(frame, f.name) for f in fields(frame)})

    def __repr__(self) -> str:
        return (
            f"PackedActivation(shape={self.shape}, dtype={self.dtype}, coding={self.codebook.coding!r}, "
            f"nbytes={self.nbytes}, bits_per_activation={self.bits_per_activation:.3f})"
        )
