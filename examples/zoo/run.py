"""Every cell in a process of its own, with a limit of time; cells that are there are not computed again."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import time
from collections.abc import Iterable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LIMIT = 60.0  # seconds of processor time: a busy machine changes no result
PATIENCE = 30  # times that, of the clock

Cell = dict[str, Any]


def code_version() -> str:
    """The last commit that changed the library, with a "+" where files differ from it; "unknown" outside git."""

    def git(*arguments: str) -> str:
        found = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return found.stdout.strip()

    try:
        commit = git("log", "-1", "--format=%h", "--", "dqa_plugins", "adapters")
        return commit + "+" * bool(git("status", "--porcelain", "--", "dqa_plugins", "adapters"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def path_of(folder: Path, network: str, room: str) -> Path:
    """The file of a cell."""
    return folder / f"{network}.{room}.json"


def read(folder: Path) -> list[Cell]:
    """The cells that are there, those cut short while being written left out."""
    cells = []
    for path in sorted(folder.glob("*.json")):
        try:
            cells.append(json.loads(path.read_text(encoding="utf-8")))
        except json.JSONDecodeError:
            continue
    return cells


def write(path: Path, cell: Cell) -> None:
    """Replace a cell's file, at once or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(cell, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def is_done(path: Path, version: str | None = None) -> bool:
    """Whether a cell is there that ended by itself or at its limit: one that tells of a version of the code.

    Args:
        version: None takes cells of any.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("code")
    except (OSError, json.JSONDecodeError):
        return False
    return found is not None and version in (None, found)


def restore(cells: Iterable[Cell], folder: Path) -> None:
    """Write the files of cells that a folder has not."""
    folder.mkdir(parents=True, exist_ok=True)
    for cell in cells:
        path = path_of(folder, cell["network"], cell["room"])
        if not path.exists():
            write(path, cell)


def _measure(network: str, room: str, folder: Path, limit: float) -> None:
    """What the process of a cell does."""
    os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "0")  # its kernels: compiled once, for a minute or two
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit), math.ceil(limit) + 1))
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    import torch

    from examples.quiet import quiet_hosts
    from examples.zoo.cell import measure

    torch.set_num_threads(1)
    quiet_hosts()
    path = path_of(folder, network, room)
    write(path, measure(network, room, save=lambda cell: write(path, cell)))


def run_cell(network: str, room: str, folder: Path, limit: float = LIMIT, version: str = "unknown") -> Cell:
    """Measure a cell in a process of its own and write its file.

    What was known when the process died or its time was up stays, with the step that it was at under "stopped".
    """
    path = path_of(folder, network, room)
    path.unlink(missing_ok=True)
    context = get_context("forkserver")
    context.set_forkserver_preload(["examples.zoo.preload"])  # packages, imported once; no room
    process = context.Process(target=_measure, args=(network, room, folder, limit))
    started = time.perf_counter()
    process.start()
    process.join(PATIENCE * limit)
    why = f"longer than {limit:.0f} s"
    if process.is_alive():
        process.kill()
        process.join()
    elif process.exitcode not in (0, -signal.SIGXCPU, -signal.SIGKILL):
        why = f"the process ended with {process.exitcode}"
    cell = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"network": network, "room": room}
    if "step" in cell or "failed" not in cell:
        cell.setdefault("failed", {})
        cell["stopped"] = {"step": cell.pop("step", "start"), "why": why}
        cell["seconds"] = round(min(limit, time.perf_counter() - started), 1)
    cell["code"] = version
    write(path, cell)
    return cell


def run_all(cells: Iterable[tuple[str, str]], folder: Path, limit: float = LIMIT, again: bool = False) -> None:
    """Measure what is not there yet, or with `again` not of this version of the code, and say a line about each."""
    version = code_version()
    for network, room in cells:
        if is_done(path_of(folder, network, room), version if again else None):
            continue
        print(line(run_cell(network, room, folder, limit, version)), flush=True)


def line(cell: Cell) -> str:
    """One cell in one line."""
    numbers = " ".join(f"{key} {cell[key]:.2%}" for key in ("stock", "error8", "error4") if key in cell)
    troubles = [*(f"{step}: {why}" for step, why in cell["failed"].items())]
    if "stopped" in cell:
        troubles.append(f"stopped at {cell['stopped']['step']}, {cell['stopped']['why']}")
    checks = [key for key in ("deepcopy", "state_dict") if cell.get(key) is False]
    checks += [key for key in ("batch", "silent") if cell.get(key)]
    checks += ["stored"] * (cell.get("stored") == "differs") + ["onnx"] * bool(cell.get("onnxruntime", {}).get("off"))
    found = (
        f"{cell['network']:20s} {cell['room']:8s} {cell['seconds']:5.1f} s, {cell.get('sites', '-')} sites, {numbers}"
    )
    return found + "".join(f" | WRONG {check}" for check in checks) + "".join(f"\n      {text}" for text in troubles)
