"""More than one thread, replica or process."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import threading
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from dqa_plugins import QPP, ActivationQuantizer, DenseSparse, Direct, Method, qpp

from .few import FEW
from .material import Spec, all_methods, quantizer_of, same, seeds
from .registry import Defect, case_class

PREDICTED = (
    DenseSparse(bits=4, qparams=QPP(augment=False)),
    Direct(bits=4, qparams=QPP(augment=False)),
    DenseSparse(bits=3, qparams=QPP(mode="paper", augment=False)),
)


class Chain(nn.Module):
    """Three predicted quantizers: the later two read the first's tensor."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1)
        self.q0, self.q1, self.q2 = (ActivationQuantizer(method, name=f"block.{k}") for k in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.q1(self.c1(self.q0(x)).relu())
        return self.q2(self.c2(x).relu())


def images(seed: int, size: int = 16) -> Tensor:
    """(size, 2, 6, 6), samples of different brightness."""
    generator = torch.Generator().manual_seed(seed)
    light = torch.rand(size, 1, 1, 1, generator=generator) * 3 + 0.05
    return torch.rand(size, 2, 6, 6, generator=generator) * light


def chain(method: Method, seed: int) -> Chain:
    """Connected, calibrated, fitted and frozen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Chain(method).eval()
    quantizers = [model.q0, model.q1, model.q2]
    qpp.connect(quantizers).attach(model)
    with torch.no_grad():
        model(images(seed))
        model(images(seed + 1))
    qpp.fit(model)
    for quantizer in quantizers:
        quantizer.freeze()
    qpp.link(model)
    return model


class ThreadCase(NamedTuple):
    """A network with predictions in several threads: the same model, deep copies, or replicas by state_dict."""

    method: int
    seed: int
    threads: int
    how: str


@case_class(
    "threads and replicas",
    st.builds(
        ThreadCase, st.integers(0, len(PREDICTED) - 1), seeds, st.integers(2, 4),
        st.sampled_from(["same", "copies", "replicas", "nested"]),
    ),
    names=("block.",), share=2,
)  # fmt: skip
def threads(case: ThreadCase) -> None:
    """Forwards that run at the same time do not answer each other's predictions."""
    model = chain(PREDICTED[case.method], case.seed)
    models: list[nn.Module] = [model] * case.threads
    if case.how == "copies":
        models = [copy.deepcopy(model) for _ in models]
    elif case.how == "replicas":
        models = [qpp.link(replica(model, PREDICTED[case.method])) for _ in models]
    elif case.how == "nested":
        models = [nn.Sequential(one) for one in models]
    batches = [images(case.seed + 10 + k, 2 + k) for k in range(case.threads)]
    expected = [model(x) for x in batches]
    found: list[list[Any]] = [[] for _ in models]
    start = threading.Barrier(case.threads)

    def work(number: int) -> None:
        start.wait()
        for _ in range(4):
            try:
                found[number].append(models[number](batches[number]))
            except Exception as error:
                found[number].append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(case.threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for number, outputs in enumerate(found):
        for output in outputs:
            if isinstance(output, Exception):
                raise output
            same(output, expected[number], f"thread {number}")


def replica(model: nn.Module, method: Method) -> nn.Module:
    """A fresh network with the state of another."""
    other = Chain(method).eval()
    other.load_state_dict(model.state_dict())
    return other


PARTS = ("q0", "q1", "q2", "error", "unlinked")


class PartCase(NamedTuple):
    """A network of which only a part is called."""

    method: int
    seed: int
    part: str


@case_class(
    "parts of a model",
    st.builds(PartCase, st.integers(0, len(PREDICTED) - 1), seeds, st.sampled_from(PARTS)),
    names=("block.",),
)  # fmt: skip
def parts(case: PartCase) -> None:
    """A part does not read what the last forward of the whole left behind; an error inside ends its session."""
    model = chain(PREDICTED[case.method], case.seed)
    expected = model(images(case.seed + 3))
    if case.part == "unlinked":
        replica(model, PREDICTED[case.method])(images(case.seed + 3))
        raise Defect("a replica without qpp.link read something")
    if case.part == "error":
        try:
            model(torch.ones(2, 3, 6, 6))
        except RuntimeError:
            same(model(images(case.seed + 3)), expected, "after an error")
            return
        raise Defect("a convolution took another number of channels")
    quantizer = getattr(model, case.part)
    x = torch.rand(16, 2 if case.part == "q0" else 4, 6, 6)
    y = quantizer(x)
    if not quantizer.predictor.reads_itself(quantizer.name) and quantizer.predictor.site not in ("", quantizer.name):
        raise Defect(f"{case.part} alone predicted from nothing")
    assert bool(torch.isfinite(y).all())


class CalibrationCase(NamedTuple):
    """One quantizer that several threads calibrate, one after another, or use at the same time."""

    method: Method
    seed: int


@case_class("threads that quantize", st.builds(CalibrationCase, all_methods, seeds))
def threads_that_quantize(case: CalibrationCase) -> None:
    """A frozen quantizer has no state that a forward changes."""
    quantizer = quantizer_of(case.method, Spec((3, 4, 5), seed=case.seed).dense())
    batches = [Spec((2, 4, 5), seed=case.seed + k).dense() for k in range(3)]
    expected = [quantizer(x) for x in batches]
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    wrong: list[str] = []

    def work(number: int) -> None:
        try:
            for _ in range(3):
                same(quantizer(batches[number]), expected[number], f"thread {number}")
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}")

    workers = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong, wrong[0]
    for name, value in quantizer.state_dict().items():
        same(value, before[name], name)


class ProcessCase(NamedTuple):
    """A quantizer used in a child."""

    method: int
    seed: int
    start: str


def in_child(connection: Any, data: bytes) -> None:
    """Unpickle a quantizer and a tensor, send back the result's bytes."""
    torch.set_num_threads(1)
    quantizer, x = pickle.loads(data)
    connection.send_bytes(quantizer(torch.tensor(x)).numpy().tobytes())
    connection.close()


@case_class(
    "fork and spawn",
    st.builds(ProcessCase, st.integers(0, len(FEW) - 1), seeds, st.sampled_from(["fork"] * 40 + ["spawn"])),
    share=0.5,
)  # fmt: skip
def processes(case: ProcessCase) -> None:
    """A child computes the parent's bits, and answers."""
    x = Spec((3, 4, 5), seed=case.seed).dense()
    quantizer = quantizer_of(FEW[case.method], x)
    expected = quantizer(x).numpy().tobytes()
    if case.start == "fork":
        found = forked(lambda: quantizer(x).numpy().tobytes())
    else:
        context = multiprocessing.get_context("spawn")
        mine, theirs = context.Pipe(duplex=False)
        child = context.Process(target=in_child, args=(theirs, pickle.dumps((quantizer, x.tolist()))))
        child.start()
        if not mine.poll(120):
            child.kill()
            raise Defect("a spawned child did not answer in two minutes")
        found = mine.recv_bytes()
        child.join()
    assert found == expected, "a child computed other bits"


def forked(work: Any, seconds: float = 60.0) -> bytes:
    """What `work` returns in a forked child."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, work())
        finally:
            os._exit(0)
    os.close(writing)
    timer = threading.Timer(seconds, os.kill, (child, 9))
    timer.start()
    with os.fdopen(reading, "rb") as pipe:
        found = pipe.read()
    timer.cancel()
    os.waitpid(child, 0)
    if not found:
        raise Defect("a forked child did not answer")
    return found
