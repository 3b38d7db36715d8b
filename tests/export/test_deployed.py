"""Programs that leave this package: compiled ahead of time, loaded in a process that never imports us."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dqa_plugins import DQA
from dqa_plugins.export import to_exported_program
from tests.export.test_qdq import converted, data

LOADED = """
import sys, torch
found = torch.load("data.pt", weights_only=True)
for name in ("saved", "compiled"):
    if name == "saved":
        run = torch.export.load("saved.pt2").module()
    else:
        run = torch._inductor.aoti_load_package("compiled.pt2")
    for x, y in found:
        with torch.no_grad():
            difference = (run(x) - y).abs()
        assert difference.max() == 0 if name == "saved" else (difference > 1e-5).double().mean() < 0.001, name
assert not any(module.split(".")[0] == "dqa_plugins" for module in sys.modules)
"""


@pytest.mark.slow
def test_programs_are_exact_without_this_package(tmp_path: Path) -> None:
    model = converted(DQA(bits=4))
    program = to_exported_program(model, data())
    torch.export.save(program, tmp_path / "saved.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "compiled.pt2"))
    with torch.no_grad():
        torch.save([(x, model(x)) for x in (data(), data(batch=7))], tmp_path / "data.pt")
    isolated = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", LOADED], cwd=tmp_path, env=isolated, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
