"""What a benchmark ran on, for the JSON."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path
from typing import Any

import torch


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
