"""`dqa-plugins doctor`: whether what is installed is what was tested, and what computes here."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from typing import Any

import numba
import torch

from dqa_plugins._version import __version__
from dqa_plugins.report.tables import Table

from .answer import Answer

_REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+)((?:[<>=!~]=?[^,;\s]+,?)*)(?:\s*;.*extra == [\"']([\w-]+)[\"'])?")
_SHOWN = ("pt2e", "brevitas", "nncf", "onnx", "openvino", "executorch", "transformers")


def doctor() -> Answer:
    """Versions of what is required, by extra; interpreter, processor, kernels, threads."""
    rows, good = [], True
    for name, wanted, extra in _requirements():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            verdict = f"not installed (extra {extra})" if extra else "MISSING"
            good = good and bool(extra)
            rows.append((name, "", wanted, verdict))
            continue
        fits = _fits(installed, wanted)
        good = good and fits
        rows.append((name, installed, wanted, "as tested" if fits else "NOT TESTED"))
    machine = {
        "dqa-plugins": __version__,
        "python": platform.python_version(),
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "torch threads": torch.get_num_threads(),
        "kernels": f"numba {numba.__version__}, threads {numba.get_num_threads()}",
        "compiled kernels are kept in": os.environ.get("NUMBA_CACHE_DIR", "__pycache__ beside the package"),
        "CUDA": torch.cuda.is_available(),
    }
    table = Table("versions", ("package", "installed", "tested", ""), rows)
    text = "\n".join([str(table), "", *(f"{key}: {value}" for key, value in machine.items())])
    packages = [dict(zip(("package", "installed", "tested", "verdict"), row, strict=True)) for row in rows]
    data: dict[str, Any] = {"packages": packages, **machine}
    return Answer(text, data, good)


def _requirements() -> list[tuple[str, str, str]]:
    """(package, versions, extra or "") that this package declares; of an extra's, each package once."""
    found: dict[str, tuple[str, str, str]] = {}
    for text in importlib.metadata.requires("dqa-plugins") or ():
        match = _REQUIREMENT.match(text.replace(" ", "", 1) if " (" in text else text)
        if match is None or match[1] == "dqa-plugins":
            continue
        name, wanted, extra = match[1], match[2], match[3] or ""
        if not extra or extra in _SHOWN:
            found.setdefault(name, (name, wanted, extra))
    return list(found.values())


def _fits(installed: str, wanted: str) -> bool:
    """Whether a version meets ">=1.2,<1.3"; other comparisons are not used in our requirements."""
    have = _numbers(installed)
    for part in filter(None, wanted.split(",")):
        operator, limit = re.match(r"([<>=]+)(.*)", part).groups()  # type: ignore[union-attr]
        if operator == ">=" and have < _numbers(limit):
            return False
        if operator == "<" and have >= _numbers(limit):
            return False
        if operator == "==" and have != _numbers(limit):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0]))
