"""form="qdq": integers in the file, chosen for each quantizer and weight, and the numbers of torch."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import dqa_plugins
from dqa_plugins import DQA, DenseSparse, Direct, Method, NoisyQuant
from dqa_plugins.adapters.fx import get_qconfig_mapping
from dqa_plugins.errors import ExportFailed, InvalidArgument
from dqa_plugins.export import onnxruntime_session, to_onnx
from tests.export.test_parity import frozen


class Net(nn.Module):
    """Convolutions on images, or Linear layers on tokens; no layer is small enough to be folded by the exporter."""

    def __init__(self, tokens: bool = False) -> None:
        super().__init__()
        layer = (lambda i, o: nn.Linear(i, o)) if tokens else (lambda i, o: nn.Conv2d(i, o, 3, padding=1))
        self.first, self.relu, self.second, self.relu2 = layer(16, 64), nn.ReLU(), layer(64, 64), nn.ReLU()
        self.third = layer(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.relu2(self.second(self.relu(self.first(x)))))


def data(tokens: bool = False, batch: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((batch, 12, 16) if tokens else (batch, 16, 10, 12), generator=generator)


def converted(method: Method, tokens: bool = False, bits: int | None = 8) -> nn.Module:
    torch.manual_seed(0)
    prepared = prepare_fx(Net(tokens).eval(), get_qconfig_mapping(method, weight_bits=bits), (data(tokens),))
    prepared(data(tokens))
    return convert_fx(prepared)


def operators(path: Path) -> Counter[str]:
    onnx.checker.check_model(str(path), full_check=True)
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def optimized(path: Path) -> list[str]:
    """Operators that ONNX Runtime computes with, after its optimizations."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path) + ".optimized"
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("method", [Direct(bits=8), Direct(bits=8, symmetric=False), Direct(bits=5)], ids=str)
def test_convolutions_with_one_scale_run_in_integers(method: Method, bits: int, tmp_path: Path) -> None:
    model = converted(method, bits=bits)
    path = to_onnx(model, data(), tmp_path / "m.onnx", form="qdq")
    assert set(path.sites.values()) == {"uint8"}
    assert set(path.weights.values()) == {f"int{bits}"}
    assert {"Round", "Div", "Mul"}.isdisjoint(operators(path))
    assert optimized(path).count("QLinearConv") == 3
    with torch.no_grad():
        expected = model(data())
    step = expected.unique().diff().min()
    # a convolution in integers rounds its bias to the product of the two steps, which is coarser for 4-bit weights
    for optimize, share, steps in ((True, 0.05 if bits == 8 else 0.2, 2), (False, 0.01, 1)):
        difference = (onnxruntime_session(path, optimize=optimize)(data())[0] - expected).abs() / step
        assert float((difference > 0.5).double().mean()) < share, optimize
        assert float(difference.max()) < steps + 0.5, optimize


@pytest.mark.parametrize("tokens", [False, True], ids=["convolutions", "tokens"])
@pytest.mark.parametrize("method", [DQA(bits=4), DQA(bits=3, qparams="dynamic"), DenseSparse(), NoisyQuant()], ids=str)
def test_other_weights_become_float_when_the_file_is_loaded(method: Method, tokens: bool, tmp_path: Path) -> None:
    """Behind DequantizeLinear ONNX Runtime would quantize activations of MatMul, and dequantize in every run."""
    model = converted(method, tokens)
    path = to_onnx(model, data(tokens), tmp_path / "m.onnx", form="qdq")
    assert set(path.weights.values()) == {"int8"}
    found = set(optimized(path))
    # NoisyQuant found no noise for what a ReLU gives: Direct
    assert isinstance(method, NoisyQuant) or not {"QLinearConv", "MatMulIntegerToFloat"} & found
    assert {"MatMulNBits", "DynamicQuantizeMatMul", "Cast"} & found == set()
    with torch.no_grad():
        expected = model(data(tokens))
    step = expected.unique().diff().min()
    difference = (onnxruntime_session(path)(data(tokens))[0] - expected).abs()
    assert float((difference > max(1e-5, step / 2)).double().mean()) < 0.01


def test_no_integers_beside_float_weights(tmp_path: Path) -> None:
    """ONNX Runtime would quantize them by itself."""
    model = converted(Direct(bits=8), bits=None)
    path = to_onnx(model, data(), tmp_path / "m.onnx", form="qdq")
    assert Counter(path.sites.values()) == {"float: the weights that it meets are float": 3, "int8": 1}
    assert "QLinearConv" not in optimized(path)


@pytest.mark.parametrize("bits", [8, 4])
def test_files_have_the_size_that_the_bits_promise(bits: int, tmp_path: Path) -> None:
    model = converted(DQA(bits=4), bits=bits)
    weights = sum(p.numel() for name, p in Net().named_parameters() if name.endswith("weight"))
    sizes = {form: to_onnx(model, data(), tmp_path / form, form=form).stat().st_size for form in ("float", "qdq")}
    assert sizes["float"] - sizes["qdq"] >= weights * (4 - bits / 8) - 4096
    codes = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(tmp_path / "qdq").graph.initializer}
    assert codes["third.weight"].dtype == ("int8" if bits == 8 else "int4")
    assert np.abs(codes["third.weight"].astype(int)).max() == 2 ** (bits - 1) - 1


@pytest.mark.parametrize("form", ["float", "qdq"])
@pytest.mark.parametrize("opset", [18, 20, 22, 25, 26])
def test_files_have_the_opset_that_was_asked_for(opset: int, form: str, tmp_path: Path) -> None:
    quantizer, x = frozen(Direct(bits=6))
    path = to_onnx(nn.Sequential(nn.Conv2d(6, 6, 1), quantizer), x, tmp_path / "m.onnx", opset=opset, form=form)
    operators(path)
    assert onnx.load(path).opset_import[0].version == opset
    assert torch.isfinite(onnxruntime_session(path)(x)[0]).all()


@pytest.mark.parametrize("opset", [17, 27, True, 21.0])
def test_other_opsets_are_refused(opset: Any, tmp_path: Path) -> None:
    quantizer, x = frozen(Direct())
    with pytest.raises(InvalidArgument, match=r"opset=.*18 to 26"):
        to_onnx(quantizer, x, tmp_path / "q.onnx", opset=opset)


@pytest.mark.parametrize("form", ["float", "qdq"])
def test_files_say_what_they_are(form: str, tmp_path: Path) -> None:
    path = to_onnx(converted(DQA(bits=3)), data(), tmp_path / "m.onnx", form=form)
    (entry,) = onnx.load(path).metadata_props
    assert entry.key == "dqa_plugins"
    about = json.loads(entry.value)
    assert (about["version"], about["form"]) == (dqa_plugins.__version__, form)
    assert list(about["sites"]) == ["input.0", "relu", "relu2", "third"]
    assert (about["sites"]["relu"]["method"], about["sites"]["relu"]["bits"]) == ("dqa", 3)
    assert {site: entry["form"] for site, entry in about["sites"].items()} == path.sites
    assert about["weights"] == path.weights
    assert list(path.weights) == ["first.0.weight", "second.0.weight", "third.weight"]  # FX fuses the ReLU


@pytest.mark.parametrize("form", ["float", "qdq"])
def test_height_width_and_length_may_be_open(form: str, tmp_path: Path) -> None:
    size = {0: torch.export.Dim("batch", max=64), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    for tokens, shapes, other in (
        (False, size, torch.randn(1, 16, 7, 19)),
        (True, {1: torch.export.Dim("length")}, torch.randn(4, 5, 16)),
    ):
        model = converted(DQA(bits=4), tokens)
        path = to_onnx(model, data(tokens), tmp_path / "m.onnx", form=form, dynamic_shapes=(shapes,))
        with torch.no_grad():
            expected = model(other)
        found = onnxruntime_session(path)(other)[0]
        assert found.shape == expected.shape
        assert float(((found - expected).abs() > 1e-5).double().mean()) < 0.01


def test_large_models_keep_their_weights_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.onnx._internal.exporter._onnx_program as exporter

    model = converted(DQA(bits=4))
    monkeypatch.setattr(exporter, "_LARGE_MODEL_THRESHOLD", 1000)
    (tmp_path / "m.onnx.data").write_text("mine")
    with pytest.raises(ExportFailed, match=r"m\.onnx\.data is in the way"):
        to_onnx(model, data(), tmp_path / "m.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx.data"]
    for form in ("float", "qdq", "float"):
        path = to_onnx(model, data(), tmp_path / "large.onnx", form=form)
        assert path.stat().st_size < path.with_name("large.onnx.data").stat().st_size
        with torch.no_grad():
            assert float((onnxruntime_session(path)(data())[0] - model(data())).abs().mean()) < 1e-3
    assert (tmp_path / "m.onnx.data").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 3


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(x)


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(4, -1)


def test_errors_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ExportFailed) as found:
        to_onnx(Unknown(), torch.randn(4, 3, 3), tmp_path / "m.onnx")
    assert str(found.value).startswith("the ONNX exporter failed: ")
    with pytest.raises(ExportFailed, match=r"dynamic_batch=False\.$") as other:
        to_onnx(Fixed(), torch.randn(4, 3, 3), tmp_path / "m.onnx")
    for error in (found, other):
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 400
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tokens", [False, True], ids=["convolutions", "tokens"])
@pytest.mark.parametrize("method", [Direct(bits=8), DQA(bits=4)], ids=["Direct", "DQA"])
def test_openvino_reads_integers_with_the_same_numbers(method: Method, tokens: bool, tmp_path: Path) -> None:
    """Of a matrix product of per-channel integers it made other values, up to 3 where outputs are below 1."""
    from dqa_plugins.export.openvino import F32, read_onnx, require_openvino

    model = converted(method, tokens)
    path = to_onnx(model, data(tokens), tmp_path / "m.onnx", form="qdq")
    compiled = require_openvino().compile_model(read_onnx(path), "CPU", F32)
    with torch.no_grad():
        expected = model(data(tokens))
    step = expected.unique().diff().min()
    difference = (torch.from_numpy(compiled([data(tokens).numpy()])[0]) - expected).abs()
    assert float((difference > step / 2).double().mean()) < 0.01
