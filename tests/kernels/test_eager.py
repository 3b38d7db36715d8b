"""Where kernels run, where they must not, and that they are safe there."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor, nn

from dqa_plugins import ActivationQuantizer, Direct
from dqa_plugins.grid import Grid
from dqa_plugins.kernels import compiling, eager, threads

GRID = Grid(torch.tensor(0.25), -8, 7)


class Own(Tensor):
    """A tensor subclass."""


def frozen(qparams: str = "dynamic") -> ActivationQuantizer:
    quantizer = ActivationQuantizer(Direct(qparams=qparams), name="site")
    quantizer(torch.randn(4, 3, 8))
    return quantizer.freeze()


def test_which_tensors_kernels_serve() -> None:
    x = torch.randn(2, 3)
    for good in (x, x.half(), x.bfloat16(), nn.Parameter(x), x.t(), x[:, ::2], x.requires_grad_()):
        assert eager.usable(good)
    for bad in (x.double(), x.to("meta"), x.int(), x[:0], x.detach().as_subclass(Own), x.to_sparse()):
        assert not eager.usable(bad)
    assert not eager.usable(torch.complex(x, x).detach().conj().imag)


def operations(program: torch.fx.GraphModule) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.slow
def test_export_and_compile_see_aten_operations() -> None:
    quantizer, x = frozen(), torch.randn(4, 3, 8)
    expected = quantizer(x)
    program = torch.export.export(quantizer, (x,))
    assert any("round" in name for name in operations(program.graph_module))
    assert not any("numpy" in name or "dqa" in name for name in operations(program.graph_module))
    assert torch.equal(program.module()(x), expected)
    assert torch.equal(torch.compile(quantizer, fullgraph=True, backend="eager")(x), expected)


def test_tracers_and_transforms_see_aten_operations() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    quantizer, x = frozen(), torch.randn(4, 3, 8)
    expected = quantizer(x)
    graph = make_fx(quantizer)(x)
    assert any("round" in name for name in operations(graph))
    assert torch.equal(graph(x), expected)
    quantizer, other = frozen("static"), torch.randn(4, 3, 8)
    traced = torch.jit.trace(quantizer, x)
    assert torch.equal(traced(other), quantizer(other))
    assert torch.equal(torch.vmap(GRID.fake_quantize)(x), GRID.fake_quantize(x))
    _, tangent = torch.func.jvp(GRID.fake_quantize, (x,), (torch.ones_like(x),))
    assert torch.equal(tangent, (x.abs() < 1.75 + 0.125).float() + ((x >= -2.125) & (x <= -1.875)).float().clamp(max=1))


def test_an_exact_cover_of_every_range() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for total, size in ((1, 2**20), (7, 2**18), (2**20 + 3, 1), (5000, 100)):
            ranges = eager._ranges(total, size)
            assert ranges[0][0] == 0
            assert ranges[-1][1] == total
            assert all(one[1] == two[0] for one, two in itertools.pairwise(ranges))
    finally:
        torch.set_num_threads(before)


def test_many_threads_at_once() -> None:
    """Quantizers that share what is compiled and what is kept, from several threads, with a pool of threads each."""
    quantizer = ActivationQuantizer(Direct(), name="site")
    inputs = [torch.randn(2, 3, 300, 300) for _ in range(4)]
    quantizer(inputs[0])
    quantizer.freeze()
    expected = [quantizer(x) for x in inputs]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(5):
            if not torch.equal(quantizer(inputs[number]), expected[number]):
                wrong.append(number)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.slow
def test_a_forked_child_quantizes() -> None:
    """After the parent used its threads, as DataLoader workers do."""
    script = """
import os, torch
from dqa_plugins.grid import Grid
torch.set_num_threads(2)
x = torch.randn(2, 3, 400, 400)
grid = Grid(torch.tensor(0.25), -8, 7)
expected = grid.fake_quantize(x)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(grid.fake_quantize(x), expected) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_nothing_is_compiled_or_imported_before_the_first_call() -> None:
    script = "import sys, dqa_plugins; raise SystemExit('numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_long_compilation_shows_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """numba tells of every compilation; what takes longer than it may is shown, other people's kernels are not."""
    import time

    from numba import njit

    monkeypatch.setattr(compiling, "PATIENCE", 0.02)
    listener = compiling._Announcement()

    def ours(x: float) -> float:
        return x + 1

    class Told:
        def __init__(self, module: str) -> None:
            ours.__module__ = module
            self.data = {"dispatcher": njit(ours)}

    shown = []
    for module in ("somebody.kernels", "dqa_plugins.kernels.encode", "dqa_plugins.kernels.decode"):
        listener.on_start(Told(module))
        time.sleep(0.1)
        listener.on_end(Told(module))
        shown.append("compiling for this processor" in capsys.readouterr().err)
    assert shown == [False, True, True]
    assert listener.bar is None


def test_threads_are_torchs() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert threads.torch_threads() == 1
    finally:
        torch.set_num_threads(before)
