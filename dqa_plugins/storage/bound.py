"""What storage can cost at most: known before the first tensor is packed.

The DQA paper gives an exact figure, which a variable-length code cannot keep. A bound it can: a chunk that the coder
would make larger than its fixed-width form is stored in that form.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..errors import ChannelMismatch
from ..options import Coding, check_option
from ..quantizer import ActivationQuantizer
from ..rounding import compute_dtype
from ..sites import iter_quantizers
from .coder.histograms import MAX_CLUSTERS
from .format.codebook import Codebook
from .format.data import row_shape, two_dimensional
from .format.frame import overhead
from .format.layout import CODINGS
from .format.limits import CHUNK, DTYPES, LENGTHS_PER_CHUNK
from .packing import check_channels
from .report import edge_shapes
from .tables import build_codebook


def quantizer_bound(
    quantizer: ActivationQuantizer, shape: tuple[int, ...], coding: Coding = "auto", dtype: torch.dtype = torch.float64
) -> int:
    """Most bytes that a packed tensor of this shape can take, without the codebook (`PackedActivation.nbytes`).

    Args:
        quantizer: frozen.
        shape: of the tensor, the batch included.
        coding: as `pack` takes it.
        dtype: of the tensor: dynamic parameters, and values that are kept in float, take more for float64.

    Raises:
        NotPackable: it still observes.
        ChannelMismatch: the shape has other channels, or is none.
    """
    check_option("quantizer_bound", "coding", coding, CODINGS)
    book = build_codebook(quantizer, "none", None)
    if not shape or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ChannelMismatch(f"{quantizer.label}: {shape!r} is not the shape of a tensor with a batch axis.")
    if dtype not in DTYPES:
        raise ChannelMismatch(f"{quantizer.label}: tensors of {dtype} are not packed.")
    check_channels(quantizer, two_dimensional(shape))
    batch, inner = row_shape(two_dimensional(shape), book.channel_axis, book.channels)
    total = overhead(len(shape), book.keeps_outliers) + _parameter_bytes(book, batch, dtype)
    if book.keeps_outliers:
        numel = batch * book.channels * inner
        total += (numel + 7) // 8 + numel * dtype.itemsize
    for group in book.groups:
        symbols = batch * inner * len(group.channels)
        chunks = -(-symbols // CHUNK) + (1 if coding in ("none", "shift_error") else MAX_CLUSTERS)
        total += (symbols // 8 + chunks) * group.width
        total += 0 if coding == "none" else 2 * LENGTHS_PER_CHUNK * chunks
    return total


def _parameter_bytes(book: Codebook, batch: int, dtype: torch.dtype) -> int:
    if not book.dynamic:
        return 0
    count = (1 if book.per_batch else batch) * (book.channels if book.per_channel else 1)
    return count * len(book.parameters) * compute_dtype(dtype).itemsize


def storage_bound(
    model: nn.Module | ActivationQuantizer,
    shape: tuple[int, ...] | Mapping[str, tuple[int, ...]],
    coding: Coding = "auto",
    dtype: torch.dtype | None = None,
) -> int | dict[str, int]:
    """Worst-case bytes of stored activations, known offline.

    Args:
        model: a converted stored model, or one frozen quantizer.
        shape: the shape of the input of a stored model; for a model with quantizers of other adapters, the shape of
            each activation by site name; for a quantizer, the shape of its tensor.
        coding: as `pack` takes it; a stored model has its own.
        dtype: of the activations; None: as in the stored model, else float64, for which the bound is largest.

    Returns:
        bytes for one quantizer; for a model, bytes by site name (tables not included: they are held once per layer).

    Raises:
        NotPackable, ChannelMismatch.
    """
    widest = torch.float64 if dtype is None else dtype
    if isinstance(model, ActivationQuantizer):
        if isinstance(shape, Mapping):
            raise ChannelMismatch("one quantizer has one shape, not a mapping of site names to shapes.")
        return quantizer_bound(model, tuple(shape), coding, widest)
    if isinstance(shape, Mapping):
        quantizers = dict(iter_quantizers(model))
        missing = sorted(set(shape) - set(quantizers))
        if missing:
            raise ChannelMismatch(f"the model has no quantizer named {', '.join(missing)}.")
        return {name: quantizer_bound(quantizers[name], tuple(s), coding, widest) for name, s in shape.items()}
    found = edge_shapes(model, tuple(shape))
    return {
        pack.edge.name: quantizer_bound(pack.quantizer, size, pack.codebook.coding, dtype or pack.edge.dtype)
        for pack, size in found.items()
    }
