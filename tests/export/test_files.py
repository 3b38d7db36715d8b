"""What lies on disk: written or not at all, nothing beside it touched, no local paths, the same bytes every time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from dqa_plugins import DQA, DenseSparse, Direct
from dqa_plugins.errors import ExportFailed, UnsupportedCombination
from dqa_plugins.export import onnxruntime_session, to_exported_program, to_onnx
from tests.export.test_parity import frozen
from tests.export.test_weights import data, fx

HERE = str(Path(__file__).parents[2]).encode()


def test_files_beside_it_stay(tmp_path: Path) -> None:
    quantizer, x = frozen(Direct())
    others = [tmp_path / name for name in ("q.onnx.part", "q.onnx.data", "q.onnx.tmp")]
    for other in others:
        other.write_text("mine")
    to_onnx(quantizer, x, tmp_path / "q.onnx")
    assert [other.read_text() for other in others] == ["mine"] * 3
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "q.onnx"])


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    quantizer, x = frozen(Direct())
    (tmp_path / "real").mkdir()
    file, link = tmp_path / "real" / "model.onnx", tmp_path / "link.onnx"
    file.write_text("old")
    link.symlink_to(file)
    assert to_onnx(quantizer, x, link) == link
    assert link.is_symlink()
    assert len(onnx.load(file).graph.node) > 0
    assert list(file.parent.iterdir()) == [file]


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    quantizer, x = frozen(Direct())
    pipe, folder = tmp_path / "pipe.onnx", tmp_path / "folder.onnx"
    os.mkfifo(pipe)
    folder.mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (pipe, folder, Path("/dev/null")):
        with pytest.raises(ExportFailed, match="regular file"):
            to_onnx(quantizer, x, path)
    with pytest.raises(ExportFailed, match="loop"):
        to_onnx(quantizer, x, tmp_path / "loop")
    assert pipe.is_fifo()
    assert folder.is_dir()
    assert Path("/dev/null").is_char_device()


def test_a_failed_export_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer, x = frozen(Direct())
    (tmp_path / "q.onnx").write_text("old")

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ExportFailed, match="RuntimeError: no"):
        to_onnx(quantizer, x, tmp_path / "q.onnx")
    assert (tmp_path / "q.onnx").read_text() == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "q.onnx"]


def test_files_hold_no_paths_and_have_the_same_bytes(tmp_path: Path) -> None:
    model = fx("channel", 8)
    for form in ("float", "qdq"):
        first, second = (to_onnx(model, data(), tmp_path / f"{form}{k}.onnx", form=form) for k in (1, 2))
        content = first.read_bytes()
        assert content == second.read_bytes()
        assert not [word for word in (b"stack_trace", b'File "', b".py", HERE) if word in content]
    torch.export.save(to_exported_program(model, data()), tmp_path / "model.pt2")
    content = (tmp_path / "model.pt2").read_bytes()
    assert not [word for word in (b'File "', b'.py"', HERE) if word in content]


@pytest.mark.parametrize("method", [DQA(bits=3), DenseSparse(bits=3, qparams="dynamic")], ids=["DQA", "DenseSparse"])
def test_a_program_runs_without_this_package(method: DQA | DenseSparse, tmp_path: Path) -> None:
    quantizer, x = frozen(method)
    model = nn.Sequential(nn.Conv2d(6, 6, 1), quantizer)
    torch.export.save(to_exported_program(model, x), tmp_path / "model.pt2")
    with torch.no_grad():
        torch.save({"x": x, "y": model(x)}, tmp_path / "data.pt")
    code = """
import sys, torch
program = torch.export.load("model.pt2").module()
found = torch.load("data.pt", weights_only=True)
assert torch.equal(program(found["x"]), found["y"])
assert not any(name.split(".")[0] == "dqa_plugins" for name in sys.modules)
"""
    isolated = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=isolated, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


class Wide(nn.Module):
    """A Linear on tokens, (B, L, C): a MatMul, not a Gemm, in ONNX."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


@pytest.mark.parametrize("fold", [True, False], ids=["folded", "not folded"])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_linear_layers_of_pt2e_keep_float_weights(backend: str, fold: bool, tmp_path: Path) -> None:
    """Behind DequantizeLinear both compute with int8 activations: 11% of the outputs were a step off.

    ONNX Runtime fuses it with the MatMul to MatMulNBits, OpenVINO quantizes the input dynamically.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    from dqa_plugins.adapters.pt2e import PluginQuantizer
    from dqa_plugins.export.openvino import F32, require_openvino, to_openvino

    torch.manual_seed(0)
    x = torch.randn(16, 24, 64)
    prepared = prepare_pt2e(
        torch.export.export(Wide().eval(), (x,)).module(), PluginQuantizer().set_global(Direct(bits=8))
    )
    prepared(x)
    model = convert_pt2e(prepared, fold_quantize=fold)
    if backend == "onnxruntime":
        path = to_onnx(model, x, tmp_path / "model.onnx", dynamic_batch=False)
        assert "DequantizeLinear" not in {node.op_type for node in onnx.load(path).graph.node}
        found = onnxruntime_session(path)(x)[0]
    else:
        assert F32["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == "0"
        compiled = require_openvino().compile_model(to_openvino(model, x, dynamic_batch=False), "CPU", F32)
        found = torch.from_numpy(compiled([x.numpy()])[0])
    with torch.no_grad():
        expected = model(x)
    step = expected.unique().diff().min()
    assert float(((found - expected).abs() > step / 2).double().mean()) < 1e-3


class Packs(nn.Module):
    """Stands for the modules that convert_stored places."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_stored_models_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Packs, "__module__", "dqa_plugins.storage.places")
    model = nn.Sequential()
    model.add_module("stored_relu", Packs())
    with pytest.raises(UnsupportedCombination, match="'stored_relu' packs a stored activation into bytes"):
        to_onnx(model, torch.randn(2, 3), tmp_path / "q.onnx")
    assert not list(tmp_path.iterdir())
