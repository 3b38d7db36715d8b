"""Break the package on purpose, one fault at a time, and see which test notices: `python -m tests.mutations`.

A suite that only looks at shapes lets most of these through. Each mutation is an exact replacement of source text in a
temporary copy of the repository (the text not being there is an error: the list cannot rot in silence); the fast tests
run in a subprocess until the first failure. Tests which already fail without a mutation are left out.

Options: names of mutations (parts are enough) to run only those; --list.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
CORE = ["test_functional", "test_quantizer", "test_extra_bits", "test_calibration", "test_statistics", "test_search"]
CORE += ["test_states", "test_bad_input", "test_persistence", "test_methods", "test_sites"]
QUICK = {"OMP_NUM_THREADS": "1", "HYPOTHESIS_PROFILE": "mutations"}
# the test file to ask first, by the module that is broken
NEAREST = {"functional": "functional", "grid": "functional", "decide": "extra_bits", "statistics": "statistics"}
NEAREST |= {"search": "search", "calibration": "calibration"}


class Edit(NamedTuple):
    """Replace `old`, which must occur, by `new` everywhere in a file."""

    file: str
    old: str
    new: str


class Mutation(NamedTuple):
    name: str
    edits: list[Edit]
    adapter: bool = False  # only tests of the adapter can notice


def one(name: str, file: str, old: str, new: str, *, adapter: bool = False) -> Mutation:
    return Mutation(name, [Edit(f"dqa_plugins/{file}.py", old, new)], adapter)


DIRECT_FOR_ALL = [
    Edit("dqa_plugins/quantizer.py", f"        if isinstance(method, {kind}):\n            {following}", new)
    for kind, following, new in (
        ("DQA", "step, low", "        if False:\n            step, low"),
        ("NoisyQuant", "return F.noisyquant", "        if False:\n            return F.noisyquant"),
        (
            "DenseSparse",
            "return F.dense_sparse",
            "        if isinstance(method, DenseSparse):\n            bound = torch.maximum(lower.abs(), upper.abs())\n"
            "            return F.direct_fake_quantize(x, bound / 2 ** (method.bits - 1), method.bits)\n"
            "            return F.dense_sparse",
        ),
    )
]

MUTATIONS = [
    # ---- whole methods
    one("quantizers dropped", "quantizer", "        return self.fake_quantize(x)", "        return x"),
    Mutation("all methods behave as Direct", DIRECT_FOR_ALL),
    one("no important channel", "decide", "extra[order[: round(", "extra[order[: 0 * round("),
    one("important channels: the lowest", "decide", "argsort(descending=True", "argsort(descending=False"),
    one(
        "Dense+Sparse as identity",
        "functional",
        "torch.where(outside, detached",
        "torch.where(outside | True, detached",
    ),
    one(
        "Dense+Sparse without outliers",
        "functional",
        "torch.where(outside, detached",
        "torch.where(outside & False, detached",
    ),
    one("noise not added", "grid", "        y = y + bias", "        y = y + 0 * bias"),
    one("noise not removed", "grid", "codes * scale - bias", "codes * scale"),
    one("noise is the same everywhere", "search", '{seed}:{name}"', '{seed}"'),
    one("noise search takes the worst", "search", "errors.argmin()", "errors.argmax()"),
    # ---- rounding and clamping
    one(
        "no clamp",
        "grid",
        "    rounded = torch.round(y / (",
        "    low, high = -(2.0**20), 2.0**20\n    rounded = torch.round(y / (",
    ),
    one("clamp off by one above", "grid", "2 ** (bits - 1) - 1)", "2 ** (bits - 1))"),
    one("clamp off by one below", "grid", "return (-(2 ** (bits - 1)),", "return (-(2 ** (bits - 1)) + 1,"),
    one(
        "no clamp between thresholds", "functional", "    codes = rounded.clamp(0, 2**bits - 1)", "    codes = rounded"
    ),
    one(
        "halves go up, not to even",
        "grid",
        "torch.round(y / (nonzero(scale) if divisor is None else divisor))",
        "torch.floor(y / (nonzero(scale) if divisor is None else divisor) + 0.5)",
    ),
    one(
        "times the inverse of the scale",
        "grid",
        "torch.round(y / (nonzero(scale) if divisor is None else divisor))",
        "torch.round(y * (1 / (nonzero(scale) if divisor is None else divisor)))",
    ),
    one(
        "shift rounds towards zero",
        "functional",
        "codes = q >> shift ",
        'codes = torch.div(q, 1 << shift, rounding_mode="trunc") ',
    ),
    one("shift errors forgotten", "functional", " + shift_errors.to(torch.int32)", ""),
    one(
        "thresholds are outliers",
        "functional",
        "outside = (y < lower) | (y > upper)",
        "outside = (y <= lower) | (y >= upper)",
    ),
    one("zero scale gives NaN", "grid", "torch.where(scale > 0, scale, math.inf)", "scale"),
    one("half precision arithmetic", "grid", "torch.float64 if dtype == torch.float64 else torch.float32", "dtype"),
    # ---- parameters
    one("the batch's scale, not the sample's", "quantizer", 'if self.method.scope == "batch":', "if True:"),
    one("scope='batch' ignored", "quantizer", 'if self.method.scope == "batch":', "if False:"),
    one(
        "static: mean instead of maximum",
        "calibration",
        '        if method.reduction == "max":\n            return',
        "        if False:\n            return",
    ),
    one(
        "static: maximum instead of mean",
        "calibration",
        '        if method.reduction == "max":\n            return',
        "        if True:\n            return",
    ),
    one(
        "signed and unsigned swapped",
        "quantizer",
        "return self.calibration.negative if",
        "return not self.calibration.negative if",
    ),
    one(
        "unsigned scale has half the steps",
        "qparams",
        "if signed else 2**method.bits",
        "if signed else 2 ** (method.bits - 1)",
    ),
    one("channel scales along axis 1 always", "qparams", "    axis = channel_axis % x.ndim", "    axis = 1"),
    one("quantile without interpolation", "statistics", " + (second - first) * (position - rank)", ""),
    one(
        "density on both sides twice",
        "statistics",
        "method.density / 2, method.density",
        "method.density, method.density",
    ),
    one("clip search ignored", "qparams", "if factor is not None:", "if False:"),
    one("merge forgets the sum", "calibration", "self.total = self.total + other.total", "pass"),
    one("kept values in a block, not strided", "calibration", " * positions // columns", ""),
    # ---- states and gradients
    one("gradient everywhere", "grid", "inside = None if codes is None else codes[0] == codes[1]", "inside = None"),
    one("uncalibrated freezes in silence", "quantizer", "        if self.calibration.count == 0:", "        if False:"),
    one("NaN is let in", "quantizer", "if not torch.isfinite(x).all():", "if False:"),
    one("half() casts qparams", "calibration", "if after is not None and after.dtype != before.dtype:", "if False:"),
    # ---- the FX adapter
    one(
        "fx: quantizers dropped by convert",
        "host/convert",
        "    node.target = target",
        "    node.replace_all_uses_with(node.all_input_nodes[0])\n    model.graph.erase_node(node)",
        adapter=True,
    ),
    one(
        "fx: convert does not freeze",
        "host/convert",
        "    quantizer.freeze(_reader_weight(quantizer, model, node))",
        "    pass",
        adapter=True,
    ),
    one(
        "fx: sites lose their names",
        "adapters/fx/place",
        "= site.name, site.channel_axis",
        '= "", site.channel_axis',
        adapter=True,
    ),
    one(
        "fx: channel axis 1 behind Linear",
        "adapters/fx/place",
        "= site.name, site.channel_axis",
        "= site.name, 1",
        adapter=True,
    ),
    one(
        "fx: the tensor in front of a clamp is quantized too",
        "host/placement",
        "            self.move_behind(root, root.inputs[0])",
        "            pass",
        adapter=True,
    ),
    one(
        "fx: moved values are quantized again",
        "host/placement",
        'mover.kind == "moves" and',
        "False and",
        adapter=True,
    ),
]


def copy_repository(target: Path) -> None:
    """The package with its adapters inside (as setuptools installs them), and the tests."""
    ignore = shutil.ignore_patterns("__pycache__", ".hypothesis")
    shutil.copytree(ROOT / "dqa_plugins", target / "dqa_plugins", ignore=ignore)
    shutil.copytree(ROOT / "adapters", target / "dqa_plugins" / "adapters", ignore=ignore)
    shutil.copytree(ROOT / "tests", target / "tests", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", target)


def paths_of(mutation: Mutation) -> list[str]:
    """Test files in the order in which they are likely to notice."""
    fx = ["tests/adapters/fx"] if any((ROOT / "tests/adapters/fx").glob("test_*.py")) else []
    core = [f"tests/core/{name}.py" for name in CORE]
    if mutation.adapter:
        return fx
    likely = f"tests/core/test_{NEAREST.get(Path(mutation.edits[0].file).stem, 'quantizer')}.py"
    return sorted(core, key=lambda path: path != likely)


def environment(folder: Path) -> dict[str, str]:
    # the copy first: the editable install of the real package must not answer, in subprocesses of tests neither
    return {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "500", **QUICK}


def run_tests(folder: Path, paths: list[str], *options: str) -> tuple[int, list[str]]:
    """Exit status of pytest and the tests that failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "--tb=no", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *options, *paths], cwd=folder, env=environment(folder), capture_output=True, text=True, check=False
    )
    failed = [
        line.split(" ", 1)[1].split(" - ")[0]
        for line in done.stdout.splitlines()
        if line.startswith(("FAILED", "ERROR "))
    ]
    return done.returncode, failed


def baseline(base: Path, chosen: list[Mutation]) -> list[str]:
    """Tests that fail without any mutation, after checking that the copy is what is tested."""
    code = "import dqa_plugins, dqa_plugins.adapters as a; print(dqa_plugins.__file__, a.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=base, env=environment(base), capture_output=True, text=True, check=True
    )
    if not all(path.startswith(str(base)) for path in done.stdout.split()):
        raise SystemExit(f"the copy is not what gets imported: {done.stdout}")
    return run_tests(base, sorted({path for mutation in chosen for path in paths_of(mutation)}))[1]


def apply(mutation: Mutation, folder: Path) -> None:
    """Edit the copy; an edit whose text is not there is an error."""
    for file, old, new in mutation.edits:
        path = folder / file
        text = path.read_text()
        if old not in text:
            raise SystemExit(f"mutation '{mutation.name}': {file} does not contain {old!r}; adapt tests/mutations.py.")
        path.write_text(text.replace(old, new))


def killer(mutation: Mutation, base: Path, broken: list[str]) -> str | None:
    """The first test that notices a mutation."""
    paths = paths_of(mutation)
    if not paths:
        return None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "copy"
        shutil.copytree(base, folder)
        apply(mutation, folder)
        status, failed = run_tests(folder, paths, "-x", *(f"--deselect={test}" for test in broken))
    if status not in (0, 1, 2):
        raise SystemExit(f"mutation '{mutation.name}': pytest ended with status {status}.")
    if status == 0:
        return None
    return failed[0].removeprefix("tests/") if failed else "collection"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of the names of the mutations to run; default: all")
    parser.add_argument("--list", action="store_true", help="name the mutations, check that they apply, and stop")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if not options.names or any(part in m.name for part in options.names)]
    console = Console(width=None if sys.stdout.isatty() else 140)
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        base.mkdir()
        copy_repository(base)
        for number, mutation in enumerate(chosen):
            trial = Path(name) / f"trial{number}"
            shutil.copytree(base / "dqa_plugins", trial / "dqa_plugins")
            apply(mutation, trial)
            if options.list:
                console.print(mutation.name)
        if options.list:
            return 0
        broken = baseline(base, chosen)
        if broken:
            console.print(f"[yellow]{len(broken)} tests fail without a mutation and are left out[/yellow]")
        table = Table(title=f"{len(chosen)} mutations")
        for column in ("mutation", "killed by", "s"):
            table.add_column(column, overflow="fold")
        survived = 0
        for mutation in chosen:
            start = time.perf_counter()
            found = killer(mutation, base, broken)
            survived += found is None
            table.add_row(mutation.name, found or "[bold red]SURVIVED[/]", f"{time.perf_counter() - start:.0f}")
            console.print(f"{mutation.name}: {found or 'SURVIVED'}", style="dim", highlight=False)
        console.print(table)
        console.print(f"{len(chosen) - survived} killed, {survived} survived")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
