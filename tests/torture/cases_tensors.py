"""One quantizer and one tensor: every shape, dtype, character and layout."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from hypothesis import reject
from hypothesis import strategies as st

from dqa_plugins import Method
from tests.compare import assert_matches_reference

from .few import FEW
from .material import (
    DENSE_LAYOUTS,
    FLOATS,
    OTHER_DTYPES,
    OTHER_LAYOUTS,
    Spec,
    all_methods,
    axis_of,
    methods,
    quantizer_of,
    same,
    samples,
    seeds,
    specs,
)
from .registry import Defect, case_class


class TensorCase(NamedTuple):
    """A method calibrated on one tensor, and another of the same site."""

    method: Method
    calibration: Spec
    x: Spec
    axis: int


@st.composite
def tensor_cases(
    draw: st.DrawFn, kinds: st.SearchStrategy[Method] = methods, *, bad: bool = False, plain: bool = False
) -> TensorCase:
    calibration = draw(specs())._replace(layout="plain")
    x = draw(specs(bad=bad))
    axis = axis_of(draw(st.integers(0, 9)), len(calibration.shape))
    size = draw(samples)
    if plain:
        calibration = calibration._replace(character=draw(st.sampled_from(["normal", "relu", "negative"])))
    return TensorCase(draw(kinds), calibration, x._replace(shape=(size, *calibration.shape[1:])), axis)


@case_class("values", tensor_cases(), share=2)
def values(case: TensorCase) -> None:
    """Every value is that of the papers' integer arithmetic in numpy, bit for bit, and the input stays as it was."""
    calibration, x = case.calibration.make(), case.x.make()
    before = x.detach().clone()
    quantizer = quantizer_of(case.method, calibration, axis=case.axis)
    y = quantizer(x)
    same(x, before, "the input afterwards")
    characters = (case.calibration.character, case.x.character)
    # the reference neither rounds denormals as torch does nor saturates halves
    if "denormal" in characters or ("huge" in characters and x.dtype in (torch.float16, torch.bfloat16)):
        assert bool(torch.isfinite(y).all()), "a value that is not finite"
        return
    assert_matches_reference(quantizer, [calibration], x.detach().resolve_neg())


@case_class("layouts", tensor_cases(all_methods), share=2)
def layouts(case: TensorCase) -> None:
    """The values of a tensor decide, not where they lie in memory: calibrating and quantizing."""
    x = case.calibration._replace(layout=case.x.layout)
    dense = quantizer_of(case.method, x.dense(), axis=case.axis)
    laid = quantizer_of(case.method, x.make(), axis=case.axis)
    laid.index = dense.index
    for name, buffer in dense.state_dict().items():
        same(laid.state_dict()[name], buffer, name)
    probe = case.x
    same(torch.Tensor(laid(probe.make()).detach()), torch.Tensor(dense(probe.dense()).detach()), "quantized")


class ForeignCase(NamedTuple):
    """A tensor that may be none of ours."""

    method: Method
    x: Spec
    state: str


@st.composite
def foreign_cases(draw: st.DrawFn) -> ForeignCase:
    shape = tuple(draw(st.lists(st.integers(0, 3), min_size=0, max_size=5)))
    kind = draw(st.sampled_from(["dtype", "layout", "shape", "shape"]))
    dtype = draw(st.sampled_from(OTHER_DTYPES if kind == "dtype" else FLOATS))
    layout = draw(st.sampled_from(OTHER_LAYOUTS if kind == "layout" else DENSE_LAYOUTS))
    return ForeignCase(
        draw(all_methods),
        Spec(shape, dtype, "normal", layout, "", draw(seeds)),
        draw(st.sampled_from(["observe", "qat", "frozen"])),
    )


@case_class("foreign tensors", foreign_cases())
def foreign_tensors(case: ForeignCase) -> None:
    """Sparse, nested, mkldnn, integer, complex, float8: refused. Empty and meta ones: passed on in their shape."""
    try:
        x = case.x.make()
        dense = case.x.dense()
    except (RuntimeError, NotImplementedError, TypeError, IndexError):
        reject()  # torch cannot make it
    static = {"qparams": "static", "scope": "sample"} if case.state == "qat" else {}
    method = case.method.replace(channel_axis=None, **static)
    if case.x.layout == "meta" and method.source == "predicted":
        reject()  # a regression lives on one device, as a Linear does
    if case.state == "qat":
        quantizer = quantizer_of(method, freeze=False).start_qat()
    else:
        calibration = torch.ones(2, *(max(size, 1) for size in dense.shape[1:]))
        quantizer = quantizer_of(method, calibration, freeze=case.state == "frozen")
    y = quantizer(x)
    mine = dense.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64) and dense.ndim > 0
    strided = case.x.layout in (*DENSE_LAYOUTS, "meta") or (x.layout == torch.strided and not x.is_nested)
    if not (mine and strided):
        raise Defect(f"{x.dtype}, {x.layout}, {dense.ndim}-d was taken")
    assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device), "another shape, dtype or device"


@case_class("objects", st.tuples(all_methods, st.sampled_from(["observe", "frozen"]), st.integers(0, 9)), share=0.2)
def objects(case: tuple[Method, str, int]) -> None:
    """What is no tensor is refused by name."""
    method, state, number = case
    things: list[Any] = [None, 1.0, [torch.ones(2, 3)], (torch.ones(2, 3),), {"x": torch.ones(2, 3)}, "x", b"x"]
    things += [object(), torch.Size([2]), torch.ones(2, 3).numpy()]
    quantizer = quantizer_of(method.replace(channel_axis=None), torch.ones(2, 3), freeze=state == "frozen")
    quantizer(things[number])
    raise Defect(f"{things[number]!r} was taken")


@case_class("bad values", tensor_cases(all_methods, bad=True, plain=True), share=2)
def bad_values(case: TensorCase) -> None:
    """NaN and Inf: a NaN never becomes a number, other samples do not notice, and calibration refuses them whole."""
    calibration, x = case.calibration.make(), case.x.make().detach()
    quantizer = quantizer_of(case.method, calibration, axis=case.axis)
    y = quantizer(x).detach()
    assert bool(y[x.isnan()].isnan().all()), "a NaN became a number"
    if case.method.scope == "sample":
        for row in range(len(x)):
            if bool(torch.isfinite(x[row]).all()):
                same(y[row], quantizer(x)[row], "the same call twice")
                assert bool(torch.isfinite(y[row]).all()), "a sample without NaN got one"
    if case.method.source == "static":
        assert bool(torch.isfinite(y[torch.isfinite(x)]).all()), "NaN or Inf spread to other values"
    observing = quantizer_of(case.method, calibration, axis=case.axis, freeze=False)
    before = {name: value.clone() for name, value in observing.state_dict().items()}
    try:
        observing(x)
    except ValueError:
        for name, value in observing.state_dict().items():
            same(value, before[name], f"{name} after a refused batch")
        raise
    raise Defect("calibration took NaN or Inf")


class BigCase(NamedTuple):
    """A tensor with more values than float32 can count."""

    method: Method
    seed: int


WHOLE = [method for method in FEW if not method.uses_channels]


@case_class("2^24 + 1 values", st.builds(BigCase, st.sampled_from(WHOLE), st.integers(0, 9)), slow=True)
def many_values(case: BigCase) -> None:
    """Statistics count every value: the result is that of the same values in order, and does not depend on place."""
    generator = torch.Generator().manual_seed(case.seed)
    x = torch.randn(1, 2**24 + 1, generator=generator)
    quantizer = quantizer_of(case.method, x[:, :1000])
    y = quantizer(x)
    ordered, order = x.sort(1)
    same(quantizer(ordered), y.gather(1, order), "sorted")
