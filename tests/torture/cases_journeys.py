"""What users do with a model of any room, besides running it: copies, states, modes of torch, training, other hosts."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from hypothesis import strategies as st
from torch import Tensor, nn

from dqa_plugins import DQAError, Method, iter_quantizers
from tests.adapters.networks import NETWORKS, batches, build

from .few import FEW
from .material import same
from .registry import Defect, Refused, case_class

ROOMS = ("fx", "pt2e", "brevitas", "nncf")
IMAGES = tuple(name for name, (_, shape, _) in NETWORKS.items() if len(shape) == 4)


@functools.lru_cache(maxsize=96)
def converted(room: str, network: str, method: int, weights: int | None, seed: int = 1) -> nn.Module:
    """A model of a room; nobody changes it."""
    module: Any = importlib.import_module(f"dqa_plugins.adapters.{room}")
    data = batches(network, seed=seed, scale=float(seed))
    model: nn.Module = module.quantize_model(build(network), FEW[method], data, weight_bits=weights)
    return model


class Journey(NamedTuple):
    """A model, and what is done with it."""

    room: str
    network: str
    method: int
    weights: int | None
    action: str
    seed: int


def run(model: nn.Module, x: Tensor) -> Tensor:
    """Without gradients; Brevitas' layers may answer with a QuantTensor."""
    with torch.no_grad():
        return plain(model(x))


def plain(y: Any) -> Tensor:
    """The tensor of an output."""
    found: Tensor = y if isinstance(y, Tensor) else y.value
    return found


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, Tensor)}


def unchanged(model: nn.Module, before: dict[str, Tensor], what: str) -> None:
    after = state_of(model)
    assert list(after) == list(before), f"{what}: other entries"
    for key, value in before.items():
        same(after[key], value, f"{what}: {key}")


def again(case: Journey, model: nn.Module, x: Tensor, method: Method) -> None:
    """Quantize what is quantized: refused, or nothing in it has changed."""
    room: Any = importlib.import_module(f"dqa_plugins.adapters.{case.room}")
    names = [name for name, _ in iter_quantizers(model)]
    twice = room.quantize_model(model, method, [x, x * 2], weight_bits=case.weights)
    found = [name for name, _ in iter_quantizers(twice)]
    raise Defect(f"a quantized model was quantized again: {names} became {found}")


def other_state(case: Journey, model: nn.Module, x: Tensor, method: Method) -> None:
    """The state of a model calibrated on other data is taken, and that of another method is not."""
    fresh, expected = copy.deepcopy(model), None
    other = converted(case.room, case.network, case.method, case.weights, 3)
    fresh.load_state_dict(other.state_dict())
    expected = run(other, x)
    same(run(fresh, x), expected, "another's state of the same method")
    before = state_of(fresh)
    wrong = converted(case.room, case.network, (case.method + 1) % len(FEW), case.weights)
    try:
        fresh.load_state_dict(wrong.state_dict())
    except (DQAError, RuntimeError) as error:
        # the hosts' own entries may be loaded: torch refuses after it has loaded what it could
        kept = {k: v for k, v in before.items() if "quantizer" in k or "act_quant" in k}
        for key, value in kept.items():
            same(state_of(fresh)[key], value, f"after a refused state: {key}")
        if isinstance(error, DQAError):
            raise
        raise Refused(str(error)) from error
    raise Defect("a state of another method was taken")


def saved(case: Journey, model: nn.Module, x: Tensor, method: Method) -> None:
    """deepcopy, and state_dict through a file with weights_only."""
    expected = run(model, x)
    same(run(copy.deepcopy(model), x), expected, "a deep copy")
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = copy.deepcopy(converted(case.room, case.network, case.method, case.weights, 3))
    fresh.load_state_dict(torch.load(file, weights_only=True))
    same(run(fresh, x), expected, "through a file")


def frozen(case: Journey, model: nn.Module, x: Tensor, method: Method) -> None:
    """Running changes nothing, in whatever mode; train() and eval() and back are the same model."""
    before, expected = state_of(model), run(model, x)
    plain(model(x * 100)).sum().backward()
    unchanged(model, before, "after a forward with gradients")
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:  # the statistics of a batch norm move in training mode, and rightly so
        with contextlib.suppress(NotImplementedError):  # torchao: exported models have no train()
            model.train()
            run(model, x)
            model.eval()
        same(run(model, x), expected, "after train() and eval()")
        unchanged(model, before, "after train() and eval()")


def samples(case: Journey, model: nn.Module, x: Tensor, method: Method) -> None:
    """A batch against its samples: each lies nearer to its own result than to any change of a step."""
    together, apart = run(model, x), torch.cat([run(model, torch.cat([row, row]))[:1] for row in x.split(1)])
    # sums in another order fall on the other side of a tie: few values, never all of a sample
    off = (together - apart).abs() > 1e-4 * (together.abs().max() + 1e-6)
    assert float(off.double().mean()) < 0.5, f"{float(off.double().mean()):.0%} of the values depend on the batch"


def modes(case: Journey, model: nn.Module, x: Tensor, method: Method) -> None:
    """inference_mode and functional_call give the bits, autocast what half precision gives."""
    expected = run(model, x)
    with torch.inference_mode():
        same(plain(model(x)).clone(), expected, "inference_mode")
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        same(plain(torch.func.functional_call(model, state, (x,))), expected, "functional_call")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = plain(model(x)).float()
    assert bool(torch.isfinite(cast).all()), "NaN under autocast"
    assert cast.shape == expected.shape
    float_model = build(case.network)
    reach = float((expected - run(float_model, x)).norm() + 0.1 * expected.norm())  # 4 bits' own error, and a margin
    assert float((cast - expected).norm()) <= 2 * reach, "autocast gives other values"


def gradients(case: Journey, model: nn.Module, x: Tensor, method: Method) -> None:
    """Backward, checkpointing both ways and torch.func.grad agree."""
    live = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(plain(model(live)).square().sum(), live)
    assert bool(torch.isfinite(expected).all())
    assert bool(expected.any()), "the gradient vanished"
    for reentrant in (True, False):
        again_ = x.clone().requires_grad_()
        y = torch.utils.checkpoint.checkpoint(model, again_, use_reentrant=reentrant)
        plain(y).square().sum().backward()
        same(again_.grad, expected, f"checkpoint, reentrant={reentrant}")
    if case.room == "brevitas" and case.weights is not None:
        return  # Brevitas' own autograd functions take no functorch transforms (0.13.4)
    same(torch.func.grad(lambda v: plain(model(v)).square().sum())(x), expected, "torch.func.grad")


def stored(case: Journey, model: nn.Module, x: Tensor, method: Method) -> None:
    """Long-lived values as packed codes: the outputs of the model that was given."""
    from dqa_plugins.storage import NothingToStore, convert_stored, prepare_stored

    expected = run(model, x)
    try:
        prepared = prepare_stored(model, method, x)
    except NothingToStore:
        return
    names = {name for name, _ in iter_quantizers(model)}
    with torch.no_grad():
        for batch in batches(case.network):
            prepared(batch)
        result = convert_stored(prepared)
        if {edge.name for edge in importlib.import_module("dqa_plugins.storage").stored_edges(result)} <= names:
            same(run(result, x), expected, "a stored model")
        assert bool(torch.isfinite(run(result, x)).all())


def exported(case: Journey, model: nn.Module, x: Tensor, method: Method) -> None:
    """ONNX Runtime, optimizations on and off: each quantizer the same, the network but for ties."""
    from dqa_plugins.export import compare_backends

    for found in compare_backends(model, x, ("onnxruntime",), raise_errors=True):
        assert found.share_off == 0, str(found)
        assert found.network.only_ties, str(found)


ACTIONS: dict[str, Callable[[Journey, nn.Module, Tensor, Method], None]] = {
    "again": again, "other state": other_state, "saved": saved, "frozen": frozen, "samples": samples,
    "modes": modes, "gradients": gradients, "stored": stored,
}  # fmt: skip


def journeys(actions: tuple[str, ...]) -> st.SearchStrategy[Journey]:
    return st.builds(
        Journey, st.sampled_from(ROOMS), st.sampled_from(IMAGES), st.integers(0, len(FEW) - 1),
        st.sampled_from([None, 8]), st.sampled_from(actions), st.integers(0, 99),
    )  # fmt: skip


def travel(case: Journey) -> None:
    """Do what a case says with a copy of its model."""
    original = converted(case.room, case.network, case.method, case.weights)
    x = batches(case.network, 1, seed=case.seed + 10)[0]
    action = exported if case.action == "exported" else ACTIONS[case.action]
    action(case, copy.deepcopy(original), x, FEW[case.method])


@case_class("journeys", journeys(tuple(ACTIONS)), names=(), needs=("torchao", "brevitas", "nncf"), slow=True, share=3)
def journey(case: Journey) -> None:
    """Copies, states, modes, gradients, training mode, quantizing again, storing: every room, right or typed."""
    travel(case)


@case_class(
    "networks in ONNX Runtime",
    journeys(("exported",)),
    names=(),
    needs=("torchao", "brevitas", "nncf", "onnxruntime"),
    slow=True,
    share=3,
)
def in_onnxruntime(case: Journey) -> None:
    """A quantized network of any room exported: each quantizer on identical input, the whole but for ties."""
    travel(case)
