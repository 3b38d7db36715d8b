"""Every snippet of the README's quick start runs as it stands there, in a process and a folder of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README.split("## Quick start")[1].split("## What the demo shows")[0], re.S)
DATA, *ROOMS, LOAD, COMPARE = BLOCKS


def run(folder: Path, code: str) -> str:
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(Path.home())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout


def accuracies(text: str) -> list[float]:
    return [float(value) for value in re.findall(r"(?:float|quantized) ([\d.]+) %", text)]


@pytest.mark.slow
@pytest.mark.parametrize("room", range(len(ROOMS)), ids=("fx", "pt2e", "brevitas", "nncf"))
def test_a_quick_start(room: int, tmp_path: Path) -> None:
    exact, quantized = accuracies(run(tmp_path, DATA + ROOMS[room]))
    assert exact > 94
    assert quantized > exact - 3
    without_us = LOAD.replace("import torch\n", "import sys\n\nimport torch\n", 1)
    assert "torch.Size([5, 10])" in run(tmp_path, without_us + "assert 'dqa_plugins' not in sys.modules\n")


@pytest.mark.slow
def test_comparing_and_suggesting(tmp_path: Path) -> None:
    shown = run(tmp_path, DATA + COMPARE)
    assert "dqa" in shown
    assert "quantized tensors" in shown


def test_there_is_one_for_each_room() -> None:
    for block, name in zip(ROOMS, ("adapters.fx", "adapters.pt2e", "adapters.brevitas", "adapters.nncf"), strict=True):
        assert f"dqa_plugins.{name}" in block
