"""What the room asks of its surroundings, and what it says where that is not there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import brevitas
import pytest
import torch
from brevitas.export.inference.manager import InferenceManager
from brevitas.export.onnx.qonnx.manager import QONNXDynamoManager, QONNXManager
from brevitas.export.onnx.standard.qcdq.manager import StdQCDQONNXDynamoManager, StdQCDQONNXManager
from brevitas.export.torch.qcdq.manager import TorchQCDQManager
from brevitas.graph import calibrate
from torch import nn

import dqa_plugins.adapters.brevitas as room
from dqa_plugins.adapters.brevitas import PluginActProxy, hooks
from dqa_plugins.adapters.brevitas.names import AxisTracker, channel_axis_of
from dqa_plugins.errors import FrameworkMismatch

ROOT = Path(__file__).parents[3]

MISSING = """
import sys
sys.modules["brevitas"] = None
try:
    import dqa_plugins.adapters.brevitas
except ImportError as error:
    print(type(error).__name__, error)
"""


def test_without_brevitas_the_extra_is_named() -> None:
    run = subprocess.run([sys.executable, "-c", MISSING], capture_output=True, text=True, cwd=ROOT)
    assert "MissingDependency" in run.stdout, run.stderr
    assert "pip install -e '.[brevitas]'" in run.stdout


def test_the_core_does_not_import_brevitas() -> None:
    code = "import sys, dqa_plugins; print('brevitas' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip() == "False", run.stderr


@pytest.mark.parametrize("version", ["0.12.1", "0.14.0", "1.0"])
def test_another_version_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brevitas, "__version__", version)
    with pytest.raises(FrameworkMismatch, match=rf"0\.13\.4; found {version}.*pip install"):
        hooks.install()


def test_a_hook_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "finalize_collect_stats", lambda module: None)
    with pytest.raises(FrameworkMismatch, match=r"init_scale"):
        hooks.install()
    monkeypatch.undo()
    monkeypatch.delattr(calibrate, "calibration_mode")
    with pytest.raises(FrameworkMismatch, match=r"calibration_mode is gone"):
        hooks.install()


def test_installing_twice_changes_nothing() -> None:
    before = calibrate.calibration_mode.__enter__
    hooks.install()
    assert calibrate.calibration_mode.__enter__ is before
    managers = [
        InferenceManager,
        StdQCDQONNXManager,
        StdQCDQONNXDynamoManager,
        QONNXManager,
        QONNXDynamoManager,
        TorchQCDQManager,
    ]
    for manager in managers:
        ours = [handler for handler in manager.handlers if handler.handled_layer is PluginActProxy]
        assert len(ours) == 1, manager


def test_every_public_name_is_there() -> None:
    assert all(hasattr(room, name) for name in room.__all__)
    assert {"DQAAct", "DirectAct", "NoisyQuantAct", "DenseSparseAct", "substitute_layers"} <= set(room.__all__)


@pytest.mark.parametrize(
    ("module", "shape", "axis"),
    [
        (nn.Linear(4, 8), (2, 3, 4), -1),
        (nn.LayerNorm(4), (2, 3, 4), -1),
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Hardtanh()), (2, 3, 4), -1),
        (nn.Sequential(nn.Linear(4, 8), nn.Flatten(1)), (2, 3, 4), -1),
        (nn.Sequential(nn.Linear(4, 8), nn.Unflatten(2, (2, 4))), (2, 3, 4), -1),
        (nn.Conv1d(3, 8, 1), (2, 3, 4), 1),
        (nn.Sequential(nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8), nn.SiLU()), (2, 3, 4), 1),
    ],
)
def test_the_tracker_follows_channels(module: nn.Module, shape: tuple[int, ...], axis: int) -> None:
    with torch.no_grad(), AxisTracker():
        out = module(torch.randn(shape))
        assert channel_axis_of(out) == axis
        assert channel_axis_of(out + 1) == axis
        assert channel_axis_of(out @ torch.randn(out.shape[-1], 5)) == -1
    assert channel_axis_of(module(torch.randn(shape))) is None


def test_channels_move_with_a_transpose() -> None:
    with torch.no_grad(), AxisTracker():
        tokens = nn.Conv2d(3, 8, 1)(torch.randn(2, 3, 4, 5)).flatten(2).transpose(1, 2)
        assert channel_axis_of(tokens) == -1
        assert channel_axis_of(tokens.mean(1)) == -1
        assert [channel_axis_of(part) for part in nn.Linear(8, 6)(tokens).chunk(2, -1)] == [-1, -1]


ENTERED_BEFORE = """
import torch, brevitas.nn as qnn
from brevitas.graph.calibrate import calibration_mode
model = torch.nn.Sequential(qnn.QuantReLU(bit_width=4))
with torch.no_grad(), calibration_mode(model):
    model(torch.randn(4, 3))
    import dqa_plugins.adapters.brevitas
print("left")
"""


def test_a_calibration_mode_entered_before_the_import() -> None:
    run = subprocess.run([sys.executable, "-c", ENTERED_BEFORE], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip() == "left", run.stderr
