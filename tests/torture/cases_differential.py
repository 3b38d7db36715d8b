"""The same thing computed twice: papers, batches, threads, modes of torch, gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.utils.checkpoint
from hypothesis import strategies as st
from torch import Tensor

from dqa_plugins import Method
from tests.compare import by_the_papers

from .material import Spec, all_methods, axis_of, methods, quantizer_of, same, seeds, specs
from .registry import case_class


class PaperCase(NamedTuple):
    """A method with qparams of its own choosing."""

    method: Method
    calibration: Spec
    x: Spec
    axis: int


@st.composite
def paper_cases(draw: st.DrawFn) -> PaperCase:
    calibration, x = draw(specs()), draw(specs())
    axis = axis_of(draw(st.integers(0, 9)), len(calibration.shape))
    x = x._replace(shape=(x.shape[0], *calibration.shape[1:]))
    return PaperCase(draw(methods), calibration, x, axis)


@case_class("functional against Grid", paper_cases(), share=2)
def functional_against_grid(case: PaperCase) -> None:
    """`functional`, the page beside the papers, and the normal form give the same bits."""
    quantizer = quantizer_of(case.method, case.calibration.make(), axis=case.axis)
    x = case.x.make().detach()
    same(quantizer(x), by_the_papers(quantizer, x), "Grid against functional")


@case_class("codes and values", paper_cases())
def codes_and_values(case: PaperCase) -> None:
    """A Grid in two halves: codes are in range, and their values are the quantized tensor."""
    quantizer = quantizer_of(case.method, case.calibration.make(), axis=case.axis)
    x = case.x.make().detach()
    grid = quantizer.grid(x)
    codes, outside = grid.codes(x), grid.outside(x)
    low, high = torch.as_tensor(grid.low), torch.as_tensor(grid.high)
    kept = torch.zeros_like(x, dtype=torch.bool) if outside is None else outside
    assert bool(((codes >= low) & (codes <= high) | kept).all()), "a code outside of its range"
    largest = torch.finfo(x.dtype).max
    found = grid.values(codes).clamp(-largest, largest).to(x.dtype)
    same(torch.where(kept, x, found), quantizer(x), "values of the codes")


class BatchCase(NamedTuple):
    """A batch, to be split."""

    method: Method
    x: Spec
    axis: int


batches = st.builds(
    lambda method, x, size, axis: BatchCase(
        method, x._replace(shape=(size, *x.shape[1:])), axis_of(axis, len(x.shape))
    ),
    all_methods.filter(lambda method: method.scope == "sample"), specs(), st.integers(2, 6), st.integers(0, 9),
)  # fmt: skip


@case_class("a batch against its samples", batches, share=2)
def batch_of_one(case: BatchCase) -> None:
    """A sample's result does not depend on the batch that it came in, nor calibration on how it was batched."""
    x = case.x.make().detach()
    together = quantizer_of(case.method, x, axis=case.axis)
    apart = quantizer_of(case.method, *x.split(1), axis=case.axis)
    if case.method.source != "predicted":  # eigenvalues are of the last bit
        for name in ("scale", "lower", "upper", "factor", "extra_bits", "noise"):
            if getattr(case.method, "reduce", None) == "mean" or case.method.reduction == "mean":
                close(getattr(apart, name), getattr(together, name))
            else:
                same(getattr(apart, name), getattr(together, name), name)
    same(torch.cat([together(row) for row in x.split(1)]), together(x), "samples one by one")


def close(left: Tensor, right: Tensor) -> None:
    """Equal but for the order of a sum."""
    if left.numel():
        torch.testing.assert_close(left, right, rtol=1e-6, atol=0, equal_nan=True)


@case_class("threads of torch", batches, share=0.5)
def thread_counts(case: BatchCase) -> None:
    """One thread and two give the same bits."""
    x = case.x._replace(shape=(case.x.shape[0], *case.x.shape[1:-1], case.x.shape[-1] * 400)).make().detach()
    found = []
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            quantizer = quantizer_of(case.method.replace(channel_axis=None), x)
            found.append((quantizer(x), quantizer.scale, quantizer.upper, quantizer.noise, quantizer.factor))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        same(one, two, "two threads against one")


MODES = ("inference", "no_grad", "autocast bfloat16", "autocast float16", "grad", "vmap", "compile guard", "observe")


class ModeCase(NamedTuple):
    """A quantizer, calibrated or used under a mode of torch."""

    method: Method
    seed: int
    mode: str


mode_cases = st.builds(ModeCase, all_methods, seeds, st.sampled_from(MODES))


@case_class("modes of torch", mode_cases)
def modes(case: ModeCase) -> None:
    """inference_mode, autocast, no_grad, functorch: calibrated and used under them, the bits are the same."""
    calibration, x = (Spec((3, 4, 5), seed=case.seed + k).dense() for k in (0, 1))
    plain = quantizer_of(case.method, calibration)
    expected = plain(x)
    if case.mode == "inference":
        with torch.inference_mode():
            same(quantizer_of(case.method, calibration)(x), expected)
            quantizer = quantizer_of(case.method, calibration[:1], freeze=False)
        quantizer(calibration[1:])  # half of the calibration inside, half outside
        same(quantizer.freeze()(x), expected, "calibrated half inside of inference_mode")
        live = x.clone().requires_grad_()
        quantizer(live).sum().backward()
    elif case.mode == "no_grad":
        with torch.no_grad():
            same(quantizer_of(case.method, calibration.requires_grad_())(x), expected)
    elif case.mode.startswith("autocast"):
        with torch.autocast("cpu", dtype=getattr(torch, case.mode.split()[1])):
            same(quantizer_of(case.method, calibration)(x), expected)
    elif case.mode == "vmap":
        rows = torch.stack([x, x * 2])
        if case.method.scope == "sample":
            same(torch.func.vmap(plain)(rows), torch.stack([plain(row) for row in rows]), "vmap")
    elif case.mode == "observe":
        quantizer = quantizer_of(case.method, calibration, freeze=False)
        live = x.clone().requires_grad_()
        quantizer(live).sum().backward()
        same(live.grad, torch.ones_like(x), "the gradient of an observer")
    else:
        live = x.clone().requires_grad_()
        same(plain(live), expected, "with a gradient")


@case_class("gradients", st.builds(ModeCase, all_methods, seeds, st.sampled_from(["float32", "float64", "bfloat16"])))
def gradients(case: ModeCase) -> None:
    """Backward, checkpointing both ways, func.grad and forward mode agree on the straight-through gradient."""
    dtype = getattr(torch, case.mode)
    calibration, x = (Spec((3, 4, 5), case.mode, seed=case.seed + k).dense() for k in (0, 1))
    quantizer = quantizer_of(case.method, calibration)
    live = (x * 2).requires_grad_()
    weight = torch.linspace(-1, 1, live.numel()).reshape(live.shape).to(dtype)
    (expected,) = torch.autograd.grad((quantizer(live) * weight).sum(), live)
    assert bool(((expected == weight) | (expected == 0)).all()), "neither straight through nor zero"
    for reentrant in (True, False):
        again = live.detach().clone().requires_grad_()
        y = torch.utils.checkpoint.checkpoint(quantizer, again, use_reentrant=reentrant)
        (y * weight).sum().backward()
        same(again.grad, expected, f"checkpoint, reentrant={reentrant}")
    same(torch.func.grad(lambda v: (quantizer(v) * weight).sum())(live.detach()), expected, "func.grad")
    tangent = torch.ones_like(live)
    _, moved = torch.func.jvp(quantizer, (live.detach(),), (tangent,))
    same(moved * weight, expected, "forward mode")
