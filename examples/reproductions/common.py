"""What the reproductions share: the command line, seeds, processes, tables, plots and the JSON beside them.

Every script writes `<out>/<name>.json` and `<out>/<name>.png` and prints a table. The title of each table and plot
names the data really used; stand-ins are called stand-ins. `collect` writes row by row, each with the version of the
code that measured it, and measures no row again that the file holds already.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from examples.benchmarks.machine import machine
from examples.quiet import quiet_hosts


@dataclass(frozen=True)
class Options:
    """The command line of every script.

    Attributes:
        out: folder of the JSON and the PNG.
        quick: smaller samples and fewer runs, for two cores and a few minutes.
        runs: how often an experiment is repeated, each time with its own calibration subset.
        workers: processes, one thread each.
        progress: show bars.
        data: folder of the paper's data set; None: stand-ins.
        weights: safetensors file of a network trained on that data set, where the shipped ones do not fit.
        network: the only network to run; None: all.
        again: measure rows that the JSON holds already.
        bits: only these bit widths; (): all.
        methods: only the rows of these names; (): all.
    """

    out: Path
    quick: bool
    runs: int
    workers: int
    progress: bool
    data: Path | None
    weights: Path | None
    network: str | None
    again: bool = False
    bits: tuple[int, ...] = ()
    methods: tuple[str, ...] = ()

    def asks_for(self, bits: int | None = None, method: str | None = None) -> bool:
        """A row of this bit width and name is among those asked for."""
        wide = bits is None or not self.bits or bits in self.bits
        return wide and (method is None or not self.methods or method in self.methods)


def parse(
    document: str | None,
    arguments: Sequence[str] | None,
    *,
    runs: tuple[int, int] = (5, 5),
    networks: tuple[str, ...] = (),
) -> Options:
    """Read the command line.

    Args:
        document: docstring of the script, shown by --help.
        arguments: instead of sys.argv.
        runs: default number of runs, in full and with --quick.
        networks: names that --network takes.
    """
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/reproductions"), help="folder for the PNG and the JSON")
    parser.add_argument("--quick", action="store_true", help="smaller samples, for two cores and a few minutes")
    parser.add_argument("--runs", type=int, help=f"repetitions (default {runs[0]}, with --quick {runs[1]})")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes, one thread each")
    parser.add_argument("--no-progress", action="store_true")
    parser.add_argument("--data", type=Path, help="folder of the paper's data set; without it stand-ins are used")
    parser.add_argument("--weights", type=Path, help="safetensors weights of the network trained on --data")
    parser.add_argument("--network", choices=networks or None, help="only this network")
    parser.add_argument("--again", action="store_true", help="measure rows again that the JSON in --out holds")
    parser.add_argument("--bits", type=int, nargs="+", default=(), help="only these bit widths")
    parser.add_argument("--methods", nargs="+", default=(), help="only rows of these names")
    found = parser.parse_args(arguments)
    count = found.runs if found.runs is not None else runs[1] if found.quick else runs[0]
    if count < 1 or found.workers < 1:
        parser.error(f"--runs and --workers must be positive: {count}, {found.workers}")
    if found.weights is not None and found.data is None:
        parser.error("--weights goes with --data: the stand-ins have weights of their own")
    if found.data is not None and networks and found.network is None:
        parser.error(f"--data is the data set of one network; name it: --network {{{','.join(networks)}}}")
    found.out.mkdir(parents=True, exist_ok=True)
    return Options(
        found.out,
        found.quick,
        count,
        found.workers,
        not found.no_progress,
        found.data,
        found.weights,
        found.network,
        found.again,
        tuple(found.bits),
        tuple(found.methods),
    )


def settle() -> None:
    """One thread, and no warnings of the hosts on every call. For this process."""
    torch.set_num_threads(1)
    quiet_hosts()


def run_jobs(
    function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], options: Options, unit: str = "job"
) -> list[Any]:
    """function(*job) for every job, in processes of one thread each.

    Args:
        function: at module level, so that another process can import it.
        jobs: arguments; start with the long ones.

    Returns:
        the results in the order of the jobs.
    """
    if options.workers == 1:
        settle()
        return [function(*job) for job in tqdm(jobs, unit=unit, disable=not options.progress)]
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn"), initializer=settle) as pool:
        futures: list[Future[Any]] = [pool.submit(function, *job) for job in jobs]
        for future in tqdm(as_completed(futures), total=len(jobs), unit=unit, disable=not options.progress):
            future.result()  # an error ends the run at once
        return [future.result() for future in futures]


def code_version() -> str:
    """The commit that this checkout is at, with "+" if files differ from it; "unknown" outside of a checkout."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/dqa_plugins", ":/adapters", ".")
        return git("rev-parse", "--short=10", "HEAD") + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def setting(options: Options) -> dict[str, Any]:
    """What has to be equal for rows to stand in one file."""
    return {"quick": options.quick, "data": None if options.data is None else options.data.name}


def _timed(function: Callable[..., dict[str, Any]], job: dict[str, Any], options: Options) -> dict[str, Any]:
    """One row: the job, what was found, and the seconds of processor time that it took."""
    started = time.process_time()
    found = function(**job, options=options)
    return {**job, **found, "cpu_seconds": round(time.process_time() - started, 1)}


def kept(options: Options, name: str) -> dict[str, Any]:
    """What `<out>/<name>.json` holds, if it was measured with this setting; else nothing."""
    path = options.out / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if found.get("setting") == setting(options) else {}


def merged(options: Options, name: str, tasks: Iterable[Any]) -> dict[str, dict[str, str]]:
    """`data` and `metric` of the workloads, with those that the file names already."""
    old, listed = kept(options, name), list(tasks)
    return {
        "data": {**old.get("data", {}), **{task.key: task.title for task in listed}},
        "metric": {**old.get("metric", {}), **{task.key: task.metric for task in listed}},
    }


def collect(
    function: Callable[..., dict[str, Any]],
    jobs: Sequence[dict[str, Any]],
    options: Options,
    name: str,
    **head: Any,
) -> dict[str, Any]:
    """Rows function(**job, options=options) in `<out>/<name>.json`, which is written after each row.

    Args:
        function: at module level, so that another process can import it; returns the fields of a row.
        jobs: the fields that tell rows apart, of JSON's types. Rows of the file that are none of them stay.
        name: of the file.
        head: more for the file, such as the data.

    Returns:
        what the file holds: `rows`, each with its `code` version, and what they were measured on.
    """
    path = options.out / f"{name}.json"
    old = kept(options, name)
    rows: list[dict[str, Any]] = old.get("rows", [])
    report = {**old, **head, "setting": setting(options), **provenance(options), "rows": rows}

    def number(job: dict[str, Any]) -> int | None:
        return next((k for k, row in enumerate(rows) if job.items() <= row.items()), None)

    def add(row: dict[str, Any]) -> None:
        row["code"] = report["code"]
        place = number({key: row[key] for key in jobs[0]})
        if place is None:
            rows.append(row)
        else:
            rows[place] = row
        path.write_text(json.dumps(rounded(report), indent=1, default=vars) + "\n", encoding="utf-8")

    missing = [job for job in jobs if options.again or number(job) is None]
    shown = {"total": len(missing), "unit": "row", "disable": not options.progress}
    if options.workers == 1 or len(missing) < 2:
        settle()
        for job in tqdm(missing, **shown):
            add(_timed(function, job, options))
        return report
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn"), initializer=settle) as pool:
        futures = [pool.submit(_timed, function, job, options) for job in missing]
        for future in tqdm(as_completed(futures), **shown):
            add(future.result())
    return report


def rounded(value: Any) -> Any:
    """The same with six significant digits: what is left carries no noise of the last bits into a diff."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def provenance(options: Options) -> dict[str, Any]:
    """Version of the code, seeds and machine, for a JSON."""
    seeds = list(range(options.runs))
    return {"code": code_version(), "seeds": seeds, "runs": options.runs, "machine": {**machine(), "threads": 1}}


@dataclass(frozen=True)
class Mean:
    """Mean and standard deviation (n - 1) over runs; the deviation of one run is 0."""

    mean: float
    std: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.std:.2f}"


def mean_std(values: Iterable[float]) -> Mean:
    """Mean and standard deviation of at least one value."""
    listed = list(values)
    return Mean(statistics.fmean(listed), statistics.stdev(listed) if len(listed) > 1 else 0.0)


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any] | None], text: int = 1) -> None:
    """Print a table.

    Args:
        title: says what the data are.
        columns: headings; the first `text` of them are left-aligned.
        rows: cells; None draws a line.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < text else "right")
    for row in rows:
        if row is None:
            table.add_section()
        else:
            table.add_row(*(cell if isinstance(cell, str) else str(cell) for cell in row))
    Console(width=150).print(table)


def axes(panels: int, width: float = 5.6, height: float = 4.2, *, columns: int | None = None) -> tuple[Any, list[Any]]:
    """A figure that needs no display, and its panels in reading order; at most 11 inches wide, so that its text can be
    read where a page shows it 1,000 pixels wide."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    across = min(panels, columns or panels)
    down = -(-panels // across)
    width = min(width, 11 / across)
    plt.rcParams.update({"font.size": 10, "legend.fontsize": 9, "axes.titlesize": 10})
    figure, grid = plt.subplots(
        down, across, figsize=(width * across, height * down), squeeze=False, layout="constrained"
    )
    flat = list(grid.flat)
    for unused in flat[panels:]:
        unused.set_visible(False)
    for axis in flat:
        axis.grid(alpha=0.3)
    return figure, flat[:panels]


def save(figure: Any, options: Options, name: str) -> Path:
    """Write `<out>/<name>.png`."""
    import matplotlib.pyplot as plt

    path = options.out / f"{name}.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def write(options: Options, name: str, report: dict[str, Any], started: float) -> Path:
    """Write `<out>/<name>.json`: the report, the seconds it took, and where.

    Args:
        started: time.perf_counter() at the start.
    """
    path = options.out / f"{name}.json"
    context = {
        "seconds": round(time.perf_counter() - started, 1),
        "quick": options.quick,
        **provenance(options),
    }
    path.write_text(json.dumps(rounded({**report, **context}), indent=1, default=vars) + "\n", encoding="utf-8")
    print(f"{path} ({context['seconds']} s)")
    return path
