"""Which codebook a quantizer packs with: one for each coding, kept as long as the quantizer lives.

    calibrate_tables(quantizer, calibration_tensors, "joint")   # explicit
    pack(x, quantizer, "joint")                                 # uses them; without them, x makes the tables

Models from `convert_stored` do neither: there the tables come from the calibration run and are part of the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import UncalibratedQuantizer
from ..methods import DQA
from ..quantizer import ActivationQuantizer
from .codebook import Codebook, build_codebook, check_coding, check_quantizer, method_kind
from .errors import NotPackable
from .strips import Strips, join, samples_wanted, take_strips

_books: weakref.WeakKeyDictionary[ActivationQuantizer, dict[str, Codebook]] = weakref.WeakKeyDictionary()


def calibrate_tables(
    quantizer: ActivationQuantizer, tensors: Tensor | Iterable[Tensor], coding: str = "auto"
) -> Codebook:
    """Make the entropy tables of a quantizer from calibration tensors; `pack` with this coding uses them from now on.

    Args:
        quantizer: frozen.
        tensors: (B, ...) floating point, as the quantizer sees them; one tensor or several. 64 samples are kept at
            most, fewer where they are large.
        coding: as `pack` takes it.

    Returns:
        the codebook, which `pack` takes too.

    Raises:
        UnknownCoding, NotPackable: see there.
        UncalibratedQuantizer: no values were given.
    """
    check_coding(coding)
    check_quantizer(quantizer)
    strips: Strips | None = None
    for x in (tensors,) if isinstance(tensors, Tensor) else tensors:
        if x.numel() and samples_wanted(strips):
            quantizer.fake_quantize(x if x.ndim > 1 else x.unsqueeze(1))  # raises, naming the layer and the channels
            strips = join(strips, take_strips(x, quantizer))
    if strips is None:
        raise UncalibratedQuantizer(f"{quantizer.label}: calibrate_tables was given no values.")
    book = build_codebook(quantizer, coding, strips)
    _books.setdefault(quantizer, {})[coding] = book
    return book


def codebook_for(quantizer: ActivationQuantizer, coding: str, x: Tensor | None = None) -> Codebook:
    """The codebook of a quantizer and coding; made from x where `calibrate_tables` has made none.

    Tables made for other parameters (extra bits set since, a loaded state_dict) are made anew.
    """
    check_coding(coding)
    check_quantizer(quantizer)
    books = _books.setdefault(quantizer, {})
    book = books.get(coding)
    if book is None or _stale(book, quantizer):
        strips = None if x is None or x.numel() == 0 or coding == "none" else take_strips(x, quantizer)
        book = build_codebook(quantizer, coding if strips is not None else "none", strips)
        if strips is not None or coding == "none":
            books[coding] = book
    return book


def check_codebook(book: Codebook, quantizer: ActivationQuantizer) -> Codebook:
    """Refuse a codebook that is not this quantizer's: the kernels go by its channels and widths, and check nothing.

    Raises:
        NotPackable: it is of another method, other channels or other parameters.
    """
    method, kind = quantizer.method, method_kind(quantizer.method)
    mine = (kind, method.bits, quantizer.num_channels or 1, quantizer.signed and kind in ("grid", "noise"))
    theirs = (book.kind, book.bits, book.channels, book.signed)
    if mine != theirs or _stale(book, quantizer):
        raise NotPackable(
            f"{quantizer.label} cannot pack with this codebook: (kind, bits, channels, signed) are {theirs} there and "
            f"{mine} here, or its parameters are others. Make one with calibrate_tables, or convert the model again."
        )
    return book


def _stale(book: Codebook, quantizer: ActivationQuantizer) -> bool:
    """Whether the quantizer's parameters have changed since (QAT, a loaded state_dict)."""
    for name in ("scale", "lower", "upper"):
        mine, theirs = getattr(book, name), getattr(quantizer, name)
        if mine is not None and (mine.shape != theirs.shape or not torch.equal(mine, theirs.cpu())):
            return True
    if isinstance(quantizer.method, DQA) and not torch.equal(book.extra_bits, quantizer.extra_bits.cpu()):
        return True
    return book.kind == "noise" and not torch.equal(book.noise, quantizer.noise.cpu())
