"""The hosts as users have them.

The conftests make tests fast: torch's ONNX registry and torchao's batch-norm patterns are made once, NNCF's pattern
graphs likewise, and NNCF's C++ kernels are replaced. Here one network goes through each room in a process of its own,
without any of that: prepare, calibrate, convert, export, run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = {"fx": "torch", "pt2e": "torchao", "brevitas": "brevitas", "nncf": "nncf"}

PROGRAM = """
import importlib, sys
import numpy, onnxruntime, torch
from dqa_plugins import DQA, iter_quantizers
from dqa_plugins.export import to_onnx
from tests.adapters.networks import NETWORKS, batches, build

room, path = sys.argv[1:]
model = importlib.import_module(f"dqa_plugins.adapters.{room}").quantize_model(
    build("residual"), DQA(bits=6), batches("residual")
)
assert [name for name, _ in iter_quantizers(model)] == list(NETWORKS["residual"][2])
x = batches("residual", 1, seed=9)[0]
with torch.no_grad():
    expected = model(x).numpy()
to_onnx(model, (x,), path)
session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
step = float(dict(iter_quantizers(model))["fc"].scale)
assert numpy.abs(found - expected).max() <= 2 * step, (found, expected)  # ties of earlier sites
assert (found == expected).mean() > 0.8
print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("room", ROOMS)
def test_the_whole_flow(room: str, tmp_path: Path) -> None:
    pytest.importorskip(ROOMS[room])
    pytest.importorskip("onnxruntime")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, room, str(tmp_path / "model.onnx")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip().endswith("done")
