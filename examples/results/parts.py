"""The parts of `make results`: which command measures which JSON of docs/results."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.reproductions.common import code_version, rounded
from examples.results.pages import ROOT


@dataclass(frozen=True)
class Part:
    """A script of `examples` and where its JSON goes.

    Attributes:
        module: below `examples`.
        folder: of the JSON and the picture, below docs/results.
        options: of a full run.
        quick: of a run that only shows that it works.
        printed: the script prints the JSON (a benchmark), instead of writing it and a picture into `--out`.
    """

    module: str
    folder: str = "."
    options: tuple[str, ...] = ()
    quick: tuple[str, ...] = ("--quick",)
    printed: bool = False


def _reproduction(name: str, folder: str = "papers", *options: str, quick: Sequence[str] = ()) -> Part:
    return Part(f"reproductions.{name}", folder, options, ("--quick", "--runs", "1", *quick))


def _benchmark(name: str, *quick: str) -> Part:
    return Part(f"benchmarks.{name}", ".", ("--json",), ("--json", *quick), printed=True)


PARTS: dict[str, Part] = {
    "dqa_table1": _reproduction("dqa_table1", quick=("--network", "resnet32", "--bits", "3")),
    "dqa_sweep": _reproduction("dqa_sweep", quick=("--network", "resnet32", "--bits", "3")),
    "dqa_figure2": _reproduction("dqa_figure2"),
    "noisyquant_transformer": _reproduction("noisyquant_transformer", quick=("--bits", "6")),
    "qpp_tables": _reproduction("qpp_tables", "papers", "--quick", quick=("--network", "espcn", "--bits", "4")),
    "qpp_figures": _reproduction("qpp_figures", "papers", "--quick", quick=("--bits", "3")),
    "qpp_toy": _reproduction("qpp_toy"),
    "qpp_guard": _reproduction("qpp_guard", "papers", "--quick"),
    "efficientnet_agreement": _reproduction("efficientnet_agreement", quick=("--bits", "3", "--methods", "Direct")),
    "stored_bits": _reproduction("stored_bits", ".", quick=("--network", "resnet32")),
    "default_settings": _reproduction("default_settings", "."),
    "demo": Part("demo", ".", (), ("--bits", "3")),
    "language_model": Part("reproductions.language_model", ".", ("--quick",)),
    "dense_sparse": _benchmark("dense_sparse", "--rounds", "8"),
    "prediction": _benchmark("prediction", "--repeats", "2"),
    "fake_quantize": _benchmark("fake_quantize", "--repeats", "3"),
    "storage": _benchmark("storage", "--repeats", "3"),
    "memory": _benchmark("memory", "--size", "128", "--batch", "1", "--repeats", "1"),
    "deploy": _benchmark("deploy", "--networks", "resnet32", "--backends"),
    "kv_cache": _benchmark("kv_cache", "--quick", "--parts", "rounded"),
}


def measure(name: str, out: Path, *, quick: bool) -> None:
    """Run a part.

    Args:
        name: of PARTS.
        out: docs/results, or a folder to try in.
        quick: with the options that only show that it works.

    Raises:
        subprocess.CalledProcessError: a benchmark failed.
    """
    part = PARTS[name]
    options, folder = list(part.quick if quick else part.options), out / part.folder
    folder.mkdir(parents=True, exist_ok=True)
    if not part.printed:
        importlib.import_module(f"examples.{part.module}").main(["--out", str(folder), *options])
        return
    # a process of its own: timings
    command = [sys.executable, "-m", f"examples.{part.module}", *options]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    report = {**json.loads(printed), "code": code_version()}
    (folder / f"{name}.json").write_text(json.dumps(rounded(report), indent=1) + "\n", encoding="utf-8")
