"""What the reproductions share: the command line, seeds, processes, tables, plots and the JSON beside them.

Every script writes `<out>/<name>.json` and `<out>/<name>.png` and prints a table. The title of each table and plot
names the data really used; stand-ins are called stand-ins.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

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
    """

    out: Path
    quick: bool
    runs: int
    workers: int
    progress: bool
    data: Path | None
    weights: Path | None
    network: str | None


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
        found.out, found.quick, count, found.workers, not found.no_progress, found.data, found.weights, found.network
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
    """A figure that needs no display, and its panels in reading order."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    across = min(panels, columns or panels)
    down = -(-panels // across)
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
        "runs": options.runs,
        "machine": f"{platform.machine()}, torch {torch.__version__}",
    }
    path.write_text(json.dumps({**report, **context}, indent=1, default=vars) + "\n", encoding="utf-8")
    print(f"{path} ({context['seconds']} s)")
    return path
