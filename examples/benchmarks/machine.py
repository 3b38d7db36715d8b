"""What a benchmark runs on, and the command line of those with one measurement."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from examples.quiet import quiet_hosts


def keep_freed_memory() -> None:
    """Let glibc give no memory back: whoever asks next would pay for page faults, 7 ms for 25 MB, in no fair turn."""
    if platform.system() == "Linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD, as large as it can be
            libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


def machine() -> dict[str, Any]:
    """Processor, cores, torch's threads, versions, and how busy the machine was over the last minute."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line[:10] == "model name"]
        name = models[0] if models else name
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load_1min": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def run(description: str, measure: Callable[[int], dict[str, Any]], repeats: int) -> None:
    """Measure in one thread, on memory that the process has already, and print: a field a line, or JSON.

    Args:
        measure: how many times -> fields.
        repeats: how many times, unless the command line says so.
    """
    parser = argparse.ArgumentParser(description=description.split("\n", maxsplit=1)[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--repeats", type=int, default=repeats)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    quiet_hosts()
    result = {**measure(arguments.repeats), "machine": machine()}
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    for name, value in result.items():
        print(f"{name:36s} {value}")
