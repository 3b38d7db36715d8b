"""What storage can cost at most: known before the first tensor is packed.

The DQA paper gives an exact figure, which a variable-length code cannot keep. A bound it can: a chunk that the coder
would make larger than its fixed-width form is stored in that form.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..errors import ChannelMismatch
from ..methods import DQA, DenseSparse
from ..quantizer import ActivationQuantizer
from ..sites import iter_quantizers
from .codebook import check_coding, check_quantizer, method_kind
from .codec import row_shape
from .frame import HEADER
from .histograms import MAX_CLUSTERS

_LENGTHS = 10  # bytes of lengths of a coded chunk


def quantizer_bound(
    quantizer: ActivationQuantizer, shape: tuple[int, ...], coding: str = "auto", itemsize: int = 4
) -> int:
    """Most bytes that a packed tensor of this shape can take, without the codebook (`PackedActivation.nbytes`).

    Args:
        quantizer: frozen.
        shape: of the tensor, the batch included.
        coding: as `pack` takes it.
        itemsize: bytes of a value of the tensor (Dense+Sparse keeps outliers as they are).

    Raises:
        NotPackable: it still observes.
        ChannelMismatch: the shape has other channels.
    """
    check_coding(coding)
    check_quantizer(quantizer)
    method, channels = quantizer.method, quantizer.num_channels
    axis = 0 if channels is None else quantizer.channel_axis
    full = (*shape, 1) if len(shape) == 1 else tuple(shape)
    if channels is not None and full[axis] != channels:
        raise ChannelMismatch(f"{quantizer.label} has {channels} channels; a shape of {tuple(shape)} has {full[axis]}.")
    batch, inner = row_shape(full, axis, channels or 1)
    extra = quantizer.extra_bits.tolist() if isinstance(method, DQA) else [0] * (channels or 1)
    total = HEADER.size + 4 * len(shape)
    numel = batch * len(extra) * inner
    if method.qparams == "dynamic":
        groups = len(extra) if method.granularity == "channel" else 1
        total += 8 * batch * groups * (2 if method_kind(method) in ("affine", "dense_sparse") else 1)
    if isinstance(method, DenseSparse):
        total += 16 + (numel + 7) // 8 + numel * itemsize
    for m in set(extra):
        symbols = batch * inner * extra.count(m)
        groups = 1 if coding in ("none", "shift_error") else MAX_CLUSTERS
        chunks = -(-symbols // 4096) + groups
        total += (symbols // 8 + chunks) * (method.bits + m) + (0 if coding == "none" else _LENGTHS * chunks)
    return int(total)


def storage_bound(
    model: nn.Module | ActivationQuantizer,
    shape: tuple[int, ...] | Mapping[str, tuple[int, ...]],
    coding: str = "auto",
) -> int | dict[str, int]:
    """Worst-case bytes of stored activations, known offline.

    Args:
        model: a converted stored model, or one frozen quantizer.
        shape: the shape of the input of a stored model; for a model with quantizers of other adapters, the shape of
            each activation by site name; for a quantizer, the shape of its tensor.
        coding: as `pack` takes it; a stored model has its own.

    Returns:
        bytes for one quantizer; for a model, bytes by site name (tables not included: they are held once per layer).

    Raises:
        NotPackable, ChannelMismatch.
    """
    if isinstance(model, ActivationQuantizer):
        if isinstance(shape, Mapping):
            raise ChannelMismatch("one quantizer has one shape, not a mapping of site names to shapes.")
        return quantizer_bound(model, tuple(shape), coding)
    if isinstance(shape, Mapping):
        quantizers = dict(iter_quantizers(model))
        missing = sorted(set(shape) - set(quantizers))
        if missing:
            raise ChannelMismatch(f"the model has no quantizer named {', '.join(missing)}.")
        return {name: quantizer_bound(quantizers[name], tuple(s), coding) for name, s in shape.items()}
    from .report import edge_shapes

    return {name: quantizer_bound(q, s, c) for name, (q, s, c) in edge_shapes(model, tuple(shape)).items()}
