"""Prepared models on their way: copied while they calibrate, trained with batch norms in training mode, under DDP."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch import distributed as dist

from dqa_plugins import QPP, DenseSparse, iter_quantizers
from dqa_plugins.distributed import sample_offset, synchronize
from tests.adapters.networks import batches, build

from .cases_networks import FINE, near
from .few import FEW
from .material import same
from .registry import Refused, case_class

METHODS = (*FEW, DenseSparse(bits=4, qparams=QPP()))
NETWORKS = ("residual", "branches", "squeeze", "functional")


def fx(model: nn.Module, method: Any, x: Tensor, *, qat: bool) -> nn.Module:
    from torch.ao.quantization.quantize_fx import prepare_fx, prepare_qat_fx

    from dqa_plugins.adapters.fx import get_qconfig_mapping

    return (prepare_qat_fx if qat else prepare_fx)(model, get_qconfig_mapping(method, weight_bits=None), (x,))


def pt2e(model: nn.Module, method: Any, x: Tensor, *, qat: bool) -> nn.Module:
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e, prepare_qat_pt2e

    from dqa_plugins.adapters.pt2e import PluginQuantizer

    exported = torch.export.export(model, (x,)).module()
    prepared: nn.Module = (prepare_qat_pt2e if qat else prepare_pt2e)(
        exported, PluginQuantizer(weight_bits=None).set_global(method)
    )
    return prepared


def convert(room: str, prepared: Any) -> nn.Module:
    from torch.ao.quantization.quantize_fx import convert_fx
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    model: nn.Module = convert_fx(prepared) if room == "fx" else convert_pt2e(prepared)
    return model


PREPARE = {"fx": fx, "pt2e": pt2e}


class Calls(NamedTuple):
    """What happens to a prepared model: an integer is a batch of that seed."""

    room: str
    network: str
    method: int
    calls: tuple[int | str, ...]


calls_cases = st.builds(
    Calls, st.sampled_from(["fx", "fx", "pt2e"]), st.sampled_from(NETWORKS), st.integers(0, len(METHODS) - 1),
    st.lists(st.one_of(st.integers(1, 99), st.sampled_from(["copy", "save", "half copied", "eval"])), max_size=6).map(
        lambda calls: (7, *calls)
    ),
)  # fmt: skip


@case_class("copies of prepared models", calls_cases, names=(), needs=("torchao",), slow=True, share=2)
def copies(case: Calls) -> None:
    """Copied or saved on the way, a prepared model converts to what the undisturbed one converts to, bit for bit."""
    x = batches(case.network, 1)[0]
    method = METHODS[case.method]

    def prepared() -> nn.Module:
        return PREPARE[case.room](build(case.network), method, x, qat=False)

    straight, other = prepared(), prepared()
    with torch.no_grad():
        for call in case.calls:
            if isinstance(call, int):
                batch = batches(case.network, 1, seed=call, scale=1 + call / 50)[0]
                straight(batch)
                other(batch)
            elif call == "copy":
                other = copy.deepcopy(other)
            elif call == "half copied":  # a copy that goes on by itself does not touch the original
                copy.deepcopy(other)(x * 50)
            elif call == "eval" and case.room == "fx":
                other.eval()
            elif call == "save":
                file = io.BytesIO()
                torch.save(other.state_dict(), file)
                file.seek(0)
                other = prepared()
                other.load_state_dict(torch.load(file, weights_only=True))
        one, two = convert(case.room, straight), convert(case.room, other)
        same(two(x), one(x), "a copy")
    parameters = {name: quantizer.state_dict() for name, quantizer in iter_quantizers(two)}
    for name, quantizer in iter_quantizers(one):
        for key, value in quantizer.state_dict().items():
            if key != "_extra_state":
                same(parameters[name][key], value, f"{name}: {key}")


class Training(NamedTuple):
    """A network with batch norms, trained for some steps."""

    room: str
    momentum: float
    steps: int
    mode: str
    seed: int


training_cases = st.builds(
    Training, st.sampled_from(["fx", "fx", "pt2e"]), st.sampled_from([0.1, 0.5, 1.0]), st.integers(1, 4),
    st.sampled_from(["qat", "qat", "ptq"]), st.integers(0, 9999),
)  # fmt: skip


@case_class("batch norms in training mode", training_cases, names=(), needs=("torchao",), slow=True)
def batch_norms(case: Training) -> None:
    """With 16-bit codes: outputs, gradients and running statistics of the float network, trained and then converted."""
    if case.room == "pt2e":  # torchao gives every batch norm its own default, 0.1 (0.18), stock quantizers' too
        case = case._replace(momentum=0.1)
    float_model = build("residual").train()
    for norm in (m for m in float_model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = case.momentum
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(case.seed))
    try:
        prepared = PREPARE[case.room](copy.deepcopy(float_model), FINE, x, qat=case.mode == "qat")
    except AssertionError as error:  # torch.ao's own, "Fusion only for eval!"
        raise Refused(str(error)) from error
    for _ in range(case.steps):
        expected, found = float_model(x), prepared(x)
        near(found, expected, "in training mode")
        sides = ((found, prepared), (expected, float_model))
        ours, theirs = (torch.autograd.grad(y.square().sum(), list(model.parameters()))[-1] for y, model in sides)
        # the straight-through gradient is zero where a value is clipped, as the largest one is: alike, not equal
        assert float(torch.cosine_similarity(ours, theirs, dim=0)) > 0.9, "another gradient of the last bias"
    for name, buffer in prepared.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            path = name.replace("conv1.bn", "bn1").replace("conv2.bn", "bn2").replace("bn.", "")
            near(buffer, float_model.get_buffer(path), name)
    if case.mode == "qat":
        converted = convert(case.room, evaluated(case.room, prepared))
        with torch.no_grad():
            near(converted(x), float_model.eval()(x), "converted", within=0.2)  # its ranges are those of training mode


def evaluated(room: str, prepared: Any) -> nn.Module:
    if room == "fx":
        return prepared.eval()
    from torchao.quantization.pt2e import move_exported_model_to_eval

    model: nn.Module = move_exported_model_to_eval(prepared)
    return model


class Wrapped(NamedTuple):
    """A model in DistributedDataParallel."""

    network: str
    method: int
    buffers: bool
    action: str
    seed: int


@contextlib.contextmanager
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


wrapped_cases = st.builds(
    Wrapped, st.sampled_from(NETWORKS), st.integers(0, len(METHODS) - 1), st.booleans(),
    st.sampled_from(["calibrate", "train", "run"]), st.integers(0, 9999),
)  # fmt: skip


@case_class("DDP", wrapped_cases, names=(), slow=True)
def ddp(case: Wrapped) -> None:
    """A process group of one: calibrated, trained and run in DistributedDataParallel like a plain model."""
    data = batches(case.network, 2, seed=case.seed)
    method = METHODS[case.method if case.action != "train" else case.method % len(FEW)]
    plain, inner = (fx(build(case.network), method, data[0], qat=case.action == "train") for _ in range(2))
    if case.action == "run":
        for x in data:
            plain(x)
            inner(x)
        plain, inner = convert("fx", plain), convert("fx", inner)
    with group_of_one():
        wrapped = nn.parallel.DistributedDataParallel(inner, broadcast_buffers=case.buffers)
        if case.action == "calibrate":
            with torch.no_grad():
                for model in (plain, wrapped):
                    if method.source == "predicted":
                        sample_offset(model, sum(map(len, data)))
                    for x in data:
                        model(x)
            synchronize(wrapped)
            plain, wrapped = convert("fx", plain), convert("fx", inner)
        for x in data:
            left, right = plain(x), wrapped(x)
            same(right, left, "in DDP")
            if case.action != "calibrate":
                left.square().sum().backward()
                right.square().sum().backward()
        for (name, one), two in zip(plain.named_parameters(), inner.parameters(), strict=True):
            if one.grad is not None:
                same(two.grad, one.grad, f"the gradient of {name}")
