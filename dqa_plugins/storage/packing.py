"""pack: quantize a tensor, and pack its codes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ChannelAxisError, ChannelMismatch, NonFiniteInput
from ..options import Coding, check_option
from ..quantizer import LARGEST, ActivationQuantizer
from .coder import codec
from .format.codebook import Codebook
from .format.data import two_dimensional
from .format.errors import NotPackable
from .format.layout import CODINGS
from .format.limits import DTYPES
from .format.outliers import encode_positions
from .grids import axis_of, row_grid, row_qparams
from .packed import PackedActivation
from .samples import take_samples
from .tables import build_codebook, check_codebook, check_quantizer, same_grid, stored_parameters


@torch.no_grad()
def pack(
    x: Tensor,
    quantizer: ActivationQuantizer,
    coding: Coding = "auto",
    codebook: Codebook | None = None,
    *,
    source: Tensor | None = None,
    prediction: Tensor | None = None,
) -> PackedActivation:
    """Quantize x and pack its codes. The bytes depend on x, the quantizer and the codebook, and on nothing else.

    Args:
        x: (B, ...) floating point.
        quantizer: frozen.
        coding: "none": fixed width; "shift_error": the DQA paper's, shift errors entropy coded; "joint": whole codes
            entropy coded; "auto": the smallest. A codebook that is given has its own.
        codebook: entropy tables from `calibrate_tables`; None: they are made from x, which takes longer than packing.
        source: dynamic parameters are taken from this tensor, of which x is a subsample; None: from x.
        prediction: what the quantizer's predictor said of x, (B, S, G) (QPP); each sample's parameters are packed with
            it. None: the predictor is asked, which can tell where it reads x itself, or within a forward.

    Returns:
        a packed activation; `.unpack()` gives what the quantizer would have returned.

    Raises:
        InvalidArgument: there is no such coding.
        NotPackable: not a floating-point tensor, more than 2^31 - 1 values, a quantizer that is not frozen, or another
            quantizer's codebook.
        NonFiniteInput: NaN or Inf in x; the message names the layer.
        ChannelMismatch: x has other channels than the quantizer.
    """
    check_option("pack", "coding", coding, CODINGS)
    check_quantizer(quantizer)
    if not isinstance(x, Tensor) or x.dtype not in DTYPES or x.ndim == 0:
        what = f"{x.dtype}, {x.ndim}-d" if isinstance(x, Tensor) else type(x).__name__
        raise NotPackable(
            f"{quantizer.label} packs (B, ...) tensors of float16, bfloat16, float32, float64; got {what}."
        )
    if x.is_nested or x.layout != torch.strided or x.is_meta:
        kind = "nested" if x.is_nested else "meta" if x.is_meta else str(x.layout).removeprefix("torch.")
        raise NotPackable(f"{quantizer.label} packs dense tensors; got a {kind} one. Make it dense before.")
    shape, dtype = tuple(x.shape), x.dtype
    if x.numel() > LARGEST:
        raise NotPackable(f"{quantizer.label} packs up to 2^31 - 1 values, got {x.numel()}; use smaller batches.")
    x = x.detach().resolve_neg().reshape(two_dimensional(shape))  # numpy knows no negative bit
    axis = axis_of(quantizer)
    check_channels(quantizer, tuple(x.shape))
    if codebook is not None:
        book = check_codebook(codebook, quantizer)
    else:
        samples = None if x.numel() == 0 or coding == "none" else take_samples(x, quantizer, source)
        book = build_codebook(quantizer, "none" if samples is None else coding, samples)
    if x.numel() == 0:
        return PackedActivation(shape, dtype, book, torch.empty(0, dtype=torch.uint8, device=x.device))
    rows = codec.rows(x, axis)
    qparams = row_qparams(quantizer, x if source is None else source, prediction)
    grid = None if book.kind == "grid" else row_grid(quantizer, qparams)  # that kind is a scale and its codebook
    stored = stored_parameters(book, qparams, grid)
    found = tuple(p.unsqueeze(-1) for p in stored)
    if book.kind in ("affine", "dense_sparse") and grid is not None and not same_grid(grid, book.grid(found)):
        raise NotPackable(f"{quantizer.label}: its grid is not what its thresholds alone give.")
    layout = book.layout(rows.shape[0], rows.shape[2])
    stored = stored if book.dynamic else ()
    try:
        streams = codec.encode(book, layout, rows, grid, found)
    except FloatingPointError:
        nans, infs = int(rows.isnan().sum()), int(rows.isinf().sum())
        raise NonFiniteInput(
            f"{quantizer.label} was asked to pack {nans} NaN and {infs} Inf values of {rows.numel()}; they have no "
            "code. Find the sample, or the layer before, that makes them."
        ) from None
    data, fixed = codec.join(layout, stored, streams, rows.device), False
    if book.coding == "auto":
        plain = book.layout(layout.batch, layout.inner, fixed=True)
        if len(data) > plain.fixed_sizes().sum() + sum(p.nbytes for p in stored):
            # rare, an incompressible tensor: decode the codes and store them with fixed width
            codes = codec.decode_stored(book, layout, streams, rows.device)
            data, fixed = codec.join(plain, stored, codec.encode_stored(book, plain, codes), rows.device), True
    outside = None if grid is None else grid.outside(rows)
    if outside is None:
        return PackedActivation(shape, dtype, book, data, fixed)
    positions, bitmap = encode_positions(outside.cpu().numpy().reshape(-1))
    values = rows[outside].contiguous().view(torch.uint8).reshape(-1)
    data = torch.cat([data, torch.from_numpy(positions).to(rows.device), values])
    return PackedActivation(shape, dtype, book, data, fixed, int(outside.sum()), len(positions), bitmap)


def check_channels(quantizer: ActivationQuantizer, shape: tuple[int, ...]) -> None:
    """Refuse the shape of a tensor, at least two-dimensional, that has other channels than the quantizer.

    Raises:
        ChannelAxisError: the shape has no such axis. ChannelMismatch: it has other channels. Both name the layer.
    """
    axis, channels = axis_of(quantizer), quantizer.num_channels
    if axis and not 1 - len(shape) <= axis < len(shape):
        raise ChannelAxisError(f"{quantizer.label}: a shape of {shape} has no channel axis {axis}.")
    if axis and 0 not in shape and shape[axis] != channels:
        raise ChannelMismatch(
            f"{quantizer.label} was calibrated on {channels} channels along axis {axis}; got a shape of {shape}."
        )
