"""Run mutations: each in processes forked from one that has imported torch and the hosts, but nothing of ours.

A fork saves the seconds of imports that a fresh process costs. A test that fails without the mutation as well is left
out and the next one is asked.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from . import ROOT, Mutation, mutate

LIMIT = 600  # seconds for the tests of one mutation; a mutation that hangs is one that was noticed
HOSTS = (
    "numpy torch torch.ao.quantization.quantize_fx torch.export torch._dynamo hypothesis "
    "torchao.quantization.pt2e.quantize_pt2e brevitas.nn nncf.torch onnx onnxruntime onnxscript"
).split()


class Result(NamedTuple):
    """What became of a mutation.

    Args:
        killer: the test that noticed it, "collection" or "time limit"; None: it survived.
        ignored: tests that fail without any mutation.
    """

    name: str
    killer: str | None
    seconds: float
    ignored: list[str]


class Failures:
    """A pytest plugin: the tests that failed."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.found.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.found.append("collection")


def copy_sources(target: Path) -> None:
    """The package with its adapters inside (as setuptools installs them), the tests, and a link to the examples."""
    ignore = shutil.ignore_patterns("__pycache__", ".hypothesis", "adapters")
    shutil.copytree(ROOT / "dqa_plugins", target / "dqa_plugins", ignore=ignore)
    shutil.copytree(ROOT / "adapters", target / "adapters", ignore=shutil.ignore_patterns("__pycache__"))
    (target / "dqa_plugins" / "adapters").symlink_to("../adapters")
    shutil.copytree(ROOT / "tests", target / "tests", ignore=shutil.ignore_patterns("__pycache__", ".hypothesis"))
    for name in ("pyproject.toml", "CHANGELOG.md"):
        shutil.copy(ROOT / name, target)
    for name in ("examples", "docs"):
        (target / name).symlink_to(ROOT / name)


def import_hosts() -> None:
    """Before the first fork; what is not installed is left out."""
    for name in HOSTS:
        if importlib.util.find_spec(name.split(".")[0]):
            importlib.import_module(name)


def in_fork(work: Callable[[], object], log: Path) -> tuple[int, str]:
    """Run a function in a forked process, its output in a file.

    Returns:
        the exit status (negative: the signal), and the function's result as JSON.
    """
    answer = log.with_suffix(".json")
    answer.unlink(missing_ok=True)
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            with log.open("w") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                answer.write_text(json.dumps(work()))
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, answer.read_text() if answer.exists() else "null"


def run_tests(folder: Path, tests: Sequence[str], ignored: Sequence[str]) -> list[str]:
    """The first failures of tests of a copy, in this process. Call it in a fork: it imports the copy."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "examples", "dqa_plugins")]:
        del sys.modules[name]
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    # for tests that start processes: the installed package must not answer there either
    os.environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    os.environ |= {"HYPOTHESIS_PROFILE": "mutations"}
    os.environ.pop("PYTEST_XDIST_WORKER", None)
    signal.alarm(LIMIT)
    plugin = Failures()
    options = ["-q", "-x", "-m", "not slow", "--tb=short", "-p", "no:cacheprovider"]
    options += [f"--rootdir={folder}", *(f"--deselect={test}" for test in ignored)]
    status = pytest.main([*options, *(f"tests/{t}" if "::" not in t else t for t in tests)], plugins=[plugin])
    import dqa_plugins

    if not Path(dqa_plugins.__file__).is_relative_to(folder):
        raise RuntimeError(f"the copy is not what gets imported: {dqa_plugins.__file__}")
    if status not in (0, 1, 2) and not plugin.found:
        raise RuntimeError(f"pytest ended with status {status}")
    return plugin.found


def first_failure(mutation: Mutation, folder: Path, tests: Sequence[str], ignored: Sequence[str]) -> str | None:
    """The first test that fails in a copy, "collection", "time limit", or None."""
    with tempfile.TemporaryDirectory() as name:
        log = Path(name) / "log.txt"
        status, answer = in_fork(lambda: run_tests(folder, tests, ignored), log)
        if status == -signal.SIGALRM:
            return "time limit"
        if status:
            raise RuntimeError(f"'{mutation.name}':\n{log.read_text()[-2000:]}")
        return next(iter(json.loads(answer)), None)


def judge(mutation: Mutation, base: Path, folder: Path) -> Result:
    """Whether a test notices a mutation that passes without it."""
    started = time.perf_counter()
    tests = [test for test in mutation.tests if (ROOT / "tests" / test).exists()]
    shutil.copytree(base, folder, symlinks=True)
    mutate(mutation, folder)
    ignored: list[str] = []
    killer = None
    for some in (tests[:1], tests[1:]):  # the likeliest by itself: collecting all of them takes longer than it does
        while some and (killer := first_failure(mutation, folder, some, ignored)) and killer != "time limit":
            if killer == "collection" and first_failure(mutation, base, some, ignored) == killer:
                raise RuntimeError(f"'{mutation.name}': {', '.join(some)} cannot be collected without it either")
            if killer == "collection" or not first_failure(mutation, base, [killer], []):
                break
            ignored.append(killer)
        if killer:
            break
    shutil.rmtree(folder)
    return Result(mutation.name, killer, time.perf_counter() - started, ignored)


def run(mutations: Sequence[Mutation], jobs: int = 1) -> Iterator[Result]:
    """Judge mutations, `jobs` at a time; results as they come.

    Raises:
        ValueError: a mutation does not apply; the message names it.
    """
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        base.mkdir()
        copy_sources(base)
        for mutation in mutations:  # all of them first: an hour's run must not end with a typo
            text = (base / mutation.file).read_text()
            mutate(mutation, base)
            (base / mutation.file).write_text(text)
        import_hosts()
        waiting, running = list(enumerate(mutations)), {}
        while waiting or running:
            while waiting and len(running) < jobs:
                index, mutation = waiting.pop(0)
                answer = Path(name) / f"{index}.result"
                sys.stdout.flush()
                pid = os.fork()
                if pid == 0:
                    status = 70
                    try:
                        answer.write_text(json.dumps(judge(mutation, base, Path(name) / f"trial{index}")))
                        status = 0
                    except BaseException as error:
                        answer.write_text(json.dumps(f"{type(error).__name__}: {error}"))
                    finally:
                        os._exit(status)
                running[pid] = answer
            pid, _ = os.wait()
            found = json.loads(running.pop(pid).read_text())
            if isinstance(found, str):
                raise SystemExit(found)
            yield Result(*found)
