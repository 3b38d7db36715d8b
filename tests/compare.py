"""Between torch and the numpy reference: conversion, and exact comparison that shows the worst element."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dqa_plugins import DQA, ActivationQuantizer, DenseSparse, NoisyQuant, method_to_dict
from dqa_plugins import functional as F
from tests import reference


def to_numpy(x: Tensor) -> np.ndarray:
    """The values of x; bfloat16, which numpy lacks, as float32."""
    x = x.detach().cpu()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


def assert_exact(actual: Tensor, expected: Any, what: str = "") -> None:
    """Equal in every value (0.0 equals -0.0) and dtype; the worst element is named.

    Args:
        expected: a tensor, or an array of the reference, which is rounded once to the dtype of `actual`.
    """
    if not isinstance(expected, Tensor):
        expected = torch.from_numpy(np.array(expected))
        if actual.is_floating_point() and actual.dtype == torch.bfloat16:
            expected = expected.to(actual.dtype)
    expected = expected.to(actual.device)
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    wrong = ~((actual == expected) | (actual.isnan() & expected.isnan()))
    if not wrong.any():
        return
    difference = torch.where(wrong, (actual.double() - expected.double()).abs(), -1.0)
    worst = np.unravel_index(int(difference.argmax()), actual.shape) if actual.ndim else ()
    raise AssertionError(
        f"{what}: {int(wrong.sum())} of {actual.numel()} values differ; worst at {tuple(int(i) for i in worst)}: "
        f"{float(actual[worst])!r}, expected {float(expected[worst])!r}"
    )


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal shape, dtype and bytes: tells -0.0 from 0.0."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    return torch.equal(left.contiguous().view(width), right.contiguous().view(width))


def calibrated(method: Any, batches: Iterable[Tensor], *, freeze: bool = True, **kwargs: Any) -> ActivationQuantizer:
    """A quantizer that saw the batches, frozen unless told otherwise."""
    quantizer = ActivationQuantizer(method, **{"name": "site", **kwargs})
    for batch in batches:
        quantizer(batch)
    return quantizer.freeze() if freeze else quantizer


def expected_output(quantizer: ActivationQuantizer, batches: list[Tensor], x: Tensor) -> np.ndarray:
    """What the reference makes of x, given the calibration data and the searched vectors of a quantizer."""
    found = {
        name: getattr(quantizer, name).numpy()
        for name in ("extra_bits", "noise", "factor")
        if getattr(quantizer, name).numel()
    }
    arrays = [to_numpy(batch) for batch in batches]
    one_dimensional = x.ndim == 1
    if one_dimensional:
        arrays, x = [a[:, None] for a in arrays], x.unsqueeze(1)
    # a bfloat16 array stands as float32 here, and is rounded in `assert_exact`
    out = reference.fake_quantize(to_numpy(x), arrays, method_to_dict(quantizer.method), quantizer.channel_axis, found)
    return out[:, 0] if one_dimensional else out


def by_the_papers(quantizer: ActivationQuantizer, x: Tensor) -> Tensor:
    """`functional` with the parameters of a frozen quantizer."""
    method, axis = quantizer.method, quantizer.channel_axis
    scale, lower, upper = quantizer.runtime_qparams(x)
    if isinstance(method, DenseSparse):
        return F.dense_sparse_fake_quantize(x, lower, upper, method.bits)
    if scale is None:
        return F.affine_fake_quantize(x, lower, upper, method.bits)
    if isinstance(method, DQA):
        extra = quantizer.extra_bits
        return F.dqa_fake_quantize(x, scale, extra, method.bits, signed=quantizer.signed, channel_axis=axis)
    if isinstance(method, NoisyQuant):
        noise = quantizer.noise
        return F.noisyquant_fake_quantize(x, scale, noise, method.bits, signed=quantizer.signed, channel_axis=axis)
    return F.direct_fake_quantize(x, scale, method.bits, signed=quantizer.signed)


def assert_matches_reference(quantizer: ActivationQuantizer, batches: list[Tensor], x: Tensor) -> None:
    assert_exact(quantizer(x), expected_output(quantizer, batches, x), repr(quantizer.method))
