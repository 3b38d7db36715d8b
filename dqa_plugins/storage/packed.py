"""pack and PackedActivation: a tensor as bytes, and back.

A packed activation holds one uint8 tensor, and a reference to the codebook that it shares with all tensors of its
layer. Its data section is, in this order (docs/storage_format.md):

    dynamic parameters, float32 or float64
    lengths of the streams of each coded chunk, uint16
    the chunks
    Dense+Sparse only: positions, then values, of the outliers
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import functional as F
from ..errors import NonFiniteInput
from ..quantizer import ActivationQuantizer
from . import codec
from .books import check_codebook, codebook_for
from .codebook import Codebook, check_coding, check_quantizer
from .errors import CorruptFrame, NotPackable
from .frame import HEADER, read_frame, write_frame
from .layer import write_codebook
from .layout import Layout
from .outliers import decode_positions, encode_positions
from .strips import whole_codes

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class PackedActivation:
    """A packed tensor.

    Args:
        shape, dtype: of the tensor.
        codebook: of its layer, shared.
        data: (bytes,) uint8, the data section, on the device of the tensor.
        fixed: stored with fixed-width codes, because the entropy coder would have made it larger.
        outliers: Dense+Sparse: their number.
        position_bytes, bitmap: Dense+Sparse: how their positions are stored.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    codebook: Codebook
    data: Tensor
    fixed: bool = False
    outliers: int = 0
    position_bytes: int = 0
    bitmap: bool = False

    @property
    def numel(self) -> int:
        """Values of the tensor."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Bytes held for this tensor, all side information included: its frame without the codebook."""
        return HEADER.size + 4 * len(self.shape) + (16 if self.codebook.kind == "dense_sparse" else 0) + len(self.data)

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
        x = _unpack(self, out)
        return x if out is None else (x if x is out else out.copy_(x))

    def to_bytes(self) -> bytes:
        """Self-contained bytes: header, codebook, data, checksum."""
        return write_frame(self)

    @staticmethod
    def from_bytes(data: bytes | bytearray | memoryview) -> PackedActivation:
        """Inverse of `to_bytes`; everything is validated before anything is decoded.

        Raises:
            CorruptFrame: truncated, damaged, or followed by other bytes.
            UnsupportedFrame: of another format version.
        """
        fields, codebook, payload = read_frame(data)
        packed = PackedActivation(codebook=codebook, data=torch.from_numpy(payload.copy()), **fields)
        _sections(packed)
        return packed

    def __repr__(self) -> str:
        return (
            f"PackedActivation(shape={self.shape}, dtype={self.dtype}, coding={self.codebook.coding!r}, "
            f"nbytes={self.nbytes}, bits_per_activation={self.bits_per_activation:.3f})"
        )


@torch.no_grad()
def pack(
    x: Tensor,
    quantizer: ActivationQuantizer,
    coding: str = "auto",
    codebook: Codebook | None = None,
    *,
    source: Tensor | None = None,
) -> PackedActivation:
    """Quantize x and pack its codes.

    Args:
        x: (B, ...) floating point.
        quantizer: frozen.
        coding: "none": fixed width; "shift_error": the DQA paper's, shift errors entropy coded; "joint": whole codes
            entropy coded; "auto": the smallest.
        codebook: entropy tables; None: those of this quantizer and coding. `calibrate_tables` makes them from
            calibration tensors. Without it they are made from the first tensor packed, because freezing forgets the
            calibration data: what follows is packed right whatever the tables, but smaller if it is like the first.
        source: dynamic parameters are taken from this tensor, of which x is a subsample; None: from x.

    Returns:
        a packed activation; `.unpack()` gives what the quantizer would have returned.

    Raises:
        UnknownCoding, NotPackable: see there; also for a codebook of another quantizer.
        NonFiniteInput: NaN or Inf in x; the message names the layer.
        ChannelMismatch: x has other channels than the quantizer.
    """
    check_coding(coding)
    check_quantizer(quantizer)
    if not isinstance(x, Tensor) or x.dtype not in DTYPES or x.ndim == 0:
        what = f"{x.dtype}, shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise NotPackable(
            f"{quantizer.label} packs (B, ...) tensors of float16, bfloat16, float32, float64; got {what}."
        )
    x = x.detach()
    shape, dtype = tuple(x.shape), x.dtype
    if x.ndim == 1:
        x = x.unsqueeze(1)
    axis = 0 if quantizer.num_channels is None else quantizer.channel_axis
    if axis and x.numel() and not (1 - x.ndim <= axis < x.ndim and x.shape[axis] == quantizer.num_channels):
        quantizer.fake_quantize(x)  # raises, naming the layer and the channels
    book = codebook_for(quantizer, coding, x) if codebook is None else check_codebook(codebook, quantizer)
    if x.numel() == 0:
        return PackedActivation(shape, dtype, book, torch.empty(0, dtype=torch.uint8, device=x.device))
    rows = codec.rows(x, axis)
    parameters = _parameters(x if source is None else source, quantizer, book)
    if book.kind == "dense_sparse":
        return _pack_sparse(rows, shape, dtype, book, parameters, quantizer)
    section, fixed = _encode(rows, book, parameters, quantizer)
    return PackedActivation(shape, dtype, book, section, fixed)


def _parameters(x: Tensor, quantizer: ActivationQuantizer, book: Codebook) -> tuple[Tensor, ...]:
    """The dynamic parameters of x, (B or 1, G) each; () where they are static."""
    if not book.dynamic:
        return ()
    found = quantizer.runtime_qparams(x)
    dtype = F.compute_dtype(x.dtype)
    return tuple(p.detach().to(dtype).reshape(p.shape[0], -1) for p in found if p is not None)


def _encode(
    rows: Tensor, book: Codebook, parameters: tuple[Tensor, ...], quantizer: ActivationQuantizer
) -> tuple[Tensor, bool]:
    layout = book.layout(rows.shape[0], rows.shape[2])
    qparams = codec.row_parameters(book, parameters, rows.dtype)
    try:
        if book.kind == "grid" and codec.runs_kernels(rows) and rows.dtype != torch.float64:
            streams = codec.encode_values(book, layout, rows.float(), qparams)
        else:
            if not torch.isfinite(rows).all():
                raise FloatingPointError
            codes = whole_codes(rows, quantizer.method, codec.as_qparams(qparams), quantizer.signed, *_extras(book))
            streams = codec.encode_codes(book, layout, codes)
    except FloatingPointError:
        nans, infs = int(rows.isnan().sum()), int(rows.isinf().sum())
        raise NonFiniteInput(
            f"{quantizer.label} was asked to pack {nans} NaN and {infs} Inf values of {rows.numel()}; they have no "
            "code. Find the sample, or the layer before, that makes them."
        ) from None
    section = codec.join(layout, parameters, streams, rows.device)
    if book.coding == "auto" and len(section) > _fixed_bytes(book, rows, parameters):
        # rare, an incompressible tensor: unpack the codes and store them with fixed width
        fixed = book.layout(rows.shape[0], rows.shape[2], fixed=True)
        codes = codec.decode_codes(book, layout, streams, rows.device)
        return codec.join(fixed, parameters, codec.encode_codes(book, fixed, codes), rows.device), True
    return section, False


def _extras(book: Codebook) -> tuple[Tensor, Tensor]:
    return book.extra_bits, book.noise


def _fixed_bytes(book: Codebook, rows: Tensor, parameters: tuple[Tensor, ...]) -> int:
    fixed = book.layout(rows.shape[0], rows.shape[2], fixed=True)
    return int(fixed.fixed_sizes().sum()) + sum(p.numel() * p.element_size() for p in parameters)


def _pack_sparse(
    rows: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    book: Codebook,
    parameters: tuple[Tensor, ...],
    quantizer: ActivationQuantizer,
) -> PackedActivation:
    section, fixed = _encode(rows, book, parameters, quantizer)
    _, lower, upper = codec.as_qparams(codec.row_parameters(book, parameters, rows.dtype))
    _, mask = F.dense_sparse_quantize(rows, lower, upper, book.bits)  # type: ignore[arg-type]
    positions, bitmap = encode_positions(mask.cpu().numpy().reshape(-1))
    values = rows[mask].contiguous().view(torch.uint8).reshape(-1)
    data = torch.cat([section, torch.from_numpy(positions).to(rows.device), values])
    return PackedActivation(shape, dtype, book, data, fixed, int(mask.sum()), len(positions), bitmap)


@dataclass(frozen=True)
class _Sections:
    layout: Layout
    parameters: tuple[Tensor, ...]
    streams: codec.Streams
    positions: NDArray[np.int64] | None
    values: Tensor | None


def _sections(packed: PackedActivation) -> _Sections:
    """Cut the data section into its parts, and check that they fit each other.

    Raises:
        CorruptFrame: they do not.
    """
    book, shape = packed.codebook, packed.shape
    full = (*shape, 1) if len(shape) == 1 else shape
    batch, inner = codec.row_shape(full, book.channel_axis, book.channels)
    layout = book.layout(batch, inner, fixed=packed.fixed)
    if packed.numel == 0:
        if len(packed.data):
            raise CorruptFrame(f"an empty tensor has no data, got {len(packed.data)} bytes.")
        layout = book.layout(0, 0)
    parameters, at = codec.read_parameters(book, packed, batch)
    end = len(packed.data) - packed.position_bytes - packed.outliers * packed.dtype.itemsize
    if end < at:
        raise CorruptFrame(f"{len(packed.data)} bytes of data cannot hold {packed.outliers} outliers.")
    streams = codec.split(layout, packed.data[at:end])
    if book.kind != "dense_sparse":
        return _Sections(layout, parameters, streams, None, None)
    middle = end + packed.position_bytes
    positions = decode_positions(packed.data[end:middle].cpu().numpy(), packed.outliers, packed.numel, packed.bitmap)
    size = packed.outliers * packed.dtype.itemsize
    values = torch.empty(packed.outliers, dtype=packed.dtype, device=packed.data.device)
    if size:
        values.view(torch.uint8).copy_(packed.data[middle : middle + size])
    return _Sections(layout, parameters, streams, positions, values)


@torch.no_grad()
def _unpack(packed: PackedActivation, out: Tensor | None) -> Tensor:
    book, device = packed.codebook, packed.data.device
    shape = packed.shape
    if packed.numel == 0:
        return torch.empty(shape, dtype=packed.dtype, device=device)
    full = (*shape, 1) if len(shape) == 1 else shape
    parts = _sections(packed)
    batch, inner = codec.row_shape(full, book.channel_axis, book.channels)
    compute = F.compute_dtype(packed.dtype)
    qparams = codec.row_parameters(book, parts.parameters, compute)
    if book.kind == "grid" and compute == torch.float32 and codec.runs_kernels(packed.data):
        direct = out is not None and packed.dtype == torch.float32 and codec.keeps_order(full, book.channel_axis)
        target = out if direct and out is not None else torch.empty((batch, book.channels, inner))
        codec.decode_values(book, parts.layout, parts.streams, qparams, target)
        if direct and out is not None:
            return out
        rows = target
    else:
        codes = codec.decode_codes(book, parts.layout, parts.streams, device)
        rows = codec.dequantize(book, codes, codec.as_qparams(qparams), compute)
    rows = rows.to(packed.dtype)
    if parts.positions is not None and parts.values is not None:
        rows.view(-1)[torch.from_numpy(parts.positions).to(device)] = parts.values
    return codec.tensor_of(rows, full, book.channel_axis).reshape(shape)
