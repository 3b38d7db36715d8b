"""Every quantizer computes the same in ONNX Runtime, optimizations on and off; networks differ only at ties."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from dqa_plugins import DQA, ActivationQuantizer, DenseSparse, Direct, NoisyQuant
from dqa_plugins.adapters.fx import get_qconfig_mapping
from dqa_plugins.errors import ExportFailed, InvalidArgument, UncalibratedQuantizer
from dqa_plugins.export import compare_backends, onnxruntime_session, to_exported_program, to_onnx
from tests.nets import build, inputs

METHODS = [
    Direct(bits=4),
    Direct(bits=3, symmetric=False, clip=0.99),
    Direct(bits=8, granularity="channel"),
    DQA(bits=3),
    DQA(bits=2, granularity="channel"),
    NoisyQuant(bits=4, amplitude=0.4),
    DenseSparse(bits=3, density=0.05),
    DenseSparse(bits=4, granularity="channel"),
]
BOTH = [m.replace(qparams=q) for m in METHODS for q in ("static", "dynamic")]


def frozen(method: Any, relu: bool = False, shape: tuple[int, ...] = (8, 6, 5, 5)) -> tuple[Any, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * torch.linspace(0.2, 3, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    x = x.relu() if relu else x
    quantizer = ActivationQuantizer(method, name="site")
    quantizer(x)
    return quantizer.freeze(), x


@pytest.mark.parametrize("relu", [False, True], ids=["signed", "unsigned"])
@pytest.mark.parametrize("method", BOTH, ids=str)
def test_a_single_quantizer_exports_with_its_numbers(method: Any, relu: bool, tmp_path: Path) -> None:
    quantizer, x = frozen(method, relu)
    expected = quantizer(x)
    step = (expected.unique().diff()).min()
    path = to_onnx(quantizer, x, tmp_path / "q.onnx")
    for optimize in (True, False):
        run = onnxruntime_session(path, optimize=optimize)
        for batch in (x, x[:1], torch.cat([x, x])):
            worst = float((run(batch)[0] - quantizer(batch)).abs().max())
            assert worst <= min(1e-5, float(step) / 2 + 1e-5), f"{worst} with optimizations {optimize}"


@pytest.mark.parametrize("method", [DQA(bits=3), DQA(bits=3, qparams="dynamic"), DenseSparse(), NoisyQuant()], ids=str)
def test_a_converted_network_differs_only_at_ties(method: Any) -> None:
    mapping = get_qconfig_mapping(method, skip=("first", "last"))
    prepared = prepare_fx(build("residual"), mapping, inputs("residual"))
    prepared(*inputs("residual", batch=32))
    for found in compare_backends(convert_fx(prepared), inputs("residual", batch=64, seed=5)):
        assert found.quantizers, "no quantizer was compared"
        assert found.max_difference <= 1e-5, str(found)
        assert found.share_off == 0, str(found)
        assert found.network.only_ties, str(found)
        assert found.network.top1_agreement is not None
        assert found.network.top1_agreement > 0.9, str(found)


def test_the_comparison_sees_a_wrong_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that rounds up instead of to even, and one that is off by a step, must not pass."""
    from dqa_plugins.export import runners

    def wrong(target: Any) -> Any:
        def run(*xs: torch.Tensor) -> list[torch.Tensor]:
            flat = runners.flat_outputs(target.module(*xs))
            return [y + 0.3 * (y == y.max()) for y in flat]

        yield "wrong", run

    monkeypatch.setitem(runners.BACKENDS, "wrong", wrong)
    prepared = prepare_fx(build("residual"), get_qconfig_mapping(DQA(bits=3)), inputs("residual"))
    prepared(*inputs("residual", batch=16))
    (found,) = compare_backends(convert_fx(prepared), inputs("residual", batch=16, seed=5), backends=("wrong",))
    assert found.share_off > 0
    assert not found.network.only_ties
    assert found.network.samples_touched > 0


def test_the_exported_program_equals_the_model_bit_for_bit() -> None:
    prepared = prepare_fx(build("residual"), get_qconfig_mapping(DQA(bits=3)), inputs("residual"))
    prepared(*inputs("residual"))
    converted = convert_fx(prepared)
    program = to_exported_program(converted, inputs("residual"))
    for batch in (1, 2, 7):
        x = inputs("residual", batch=batch, seed=3)
        with torch.no_grad():
            assert torch.equal(program.module()(*x), converted(*x))


def test_a_static_quantizer_is_five_operations(tmp_path: Path) -> None:
    quantizer, x = frozen(DQA(bits=3))
    graph = onnx.load(to_onnx(quantizer, x, tmp_path / "q.onnx")).graph
    assert sorted(n.op_type for n in graph.node if n.op_type != "Constant") == ["Div", "Max", "Min", "Mul", "Round"]


@pytest.mark.parametrize("opset", [18, 21, 23])
def test_the_opset_asked_for_is_written(opset: int, tmp_path: Path) -> None:
    quantizer, x = frozen(Direct(bits=4))
    model = onnx.load(to_onnx(quantizer, x, tmp_path / "q.onnx", opset=opset))
    assert {i.version for i in model.opset_import if i.domain == ""} == {opset}


def test_a_fixed_batch_stays_fixed(tmp_path: Path) -> None:
    quantizer, x = frozen(Direct(bits=4))
    graph = onnx.load(to_onnx(quantizer, x, tmp_path / "q.onnx", dynamic_batch=False)).graph
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_value == len(x)


def test_the_file_agrees_with_numpy_on_every_code(tmp_path: Path) -> None:
    """ONNX Runtime against integer arithmetic: code = clamp(rint(x / delta)), no torch in between."""
    quantizer, x = frozen(Direct(bits=3, signed=True))
    got = onnxruntime_session(to_onnx(quantizer, x, tmp_path / "q.onnx"))(x)[0].numpy()
    delta = np.float32(np.abs(x.numpy()).max() / np.float32(4))
    codes = np.clip(np.rint(x.numpy() / delta).astype(np.int64), -4, 3)
    assert np.array_equal(got, codes.astype(np.float32) * delta)


def test_two_inputs_share_one_dynamic_batch(tmp_path: Path) -> None:
    prepared = prepare_fx(build("two_inputs"), get_qconfig_mapping(DQA(bits=4)), inputs("two_inputs"))
    prepared(*inputs("two_inputs"))
    converted = convert_fx(prepared)
    run = onnxruntime_session(to_onnx(converted, inputs("two_inputs"), tmp_path / "two.onnx"))
    x = inputs("two_inputs", batch=9, seed=4)
    with torch.no_grad():
        assert run(*x)[0].shape == converted(*x).shape


def test_what_cannot_be_exported_says_so(tmp_path: Path) -> None:
    quantizer = ActivationQuantizer(DQA(), name="layer1.relu")
    x = torch.randn(2, 4, 3, 3)
    with pytest.raises(UncalibratedQuantizer, match=r"layer1\.relu"):
        to_onnx(quantizer, x, tmp_path / "q.onnx")
    quantizer(x)
    quantizer.freeze()
    with pytest.raises(InvalidArgument, match="opset=12"):
        to_onnx(quantizer, x, tmp_path / "q.onnx", opset=12)
    with pytest.raises(ExportFailed, match="does not exist"):
        to_onnx(quantizer, x, tmp_path / "nowhere" / "q.onnx")
    with pytest.raises(ExportFailed, match="example_inputs"):
        to_onnx(quantizer, "x", tmp_path / "q.onnx")
    with pytest.raises(InvalidArgument, match="tensorrt"):
        compare_backends(quantizer, x, backends=("tensorrt",))
    assert not list(tmp_path.iterdir()), "a failed export left a file"


STATIC = [
    Direct(bits=4, signed=True),
    Direct(bits=3),
    DQA(bits=3),
    DQA(bits=2, extra_bits=2),
    NoisyQuant(amplitude=0.4),
]


@pytest.mark.parametrize("opset", [18, 21])
@pytest.mark.parametrize("method", [*STATIC, Direct(bits=8, granularity="channel")], ids=str)
def test_the_compact_form_has_the_same_numbers(method: Any, opset: int, tmp_path: Path) -> None:
    quantizer, x = frozen(method)
    path = to_onnx(quantizer, x, tmp_path / "q.onnx", form="qdq", opset=opset)
    graph = onnx.load(path).graph
    assert {"QuantizeLinear", "DequantizeLinear"} <= {n.op_type for n in graph.node}
    assert not {"Round", "Div"} & {n.op_type for n in graph.node}
    for optimize in (True, False):
        assert torch.equal(onnxruntime_session(path, optimize=optimize)(x)[0], quantizer(x))


def test_the_compact_form_writes_four_bit_codes_where_they_fit(tmp_path: Path) -> None:
    for bits, opset, expected in ((4, 21, onnx.TensorProto.INT4), (5, 21, onnx.TensorProto.INT8)):
        quantizer, x = frozen(Direct(bits=bits, signed=True))
        graph = onnx.load(to_onnx(quantizer, x, tmp_path / "q.onnx", form="qdq", opset=opset)).graph
        (node,) = [n for n in graph.node if n.op_type == "QuantizeLinear"]
        assert [a.i for a in node.attribute if a.name == "output_dtype"] == [expected]


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (DenseSparse(), "outliers"),
        (DQA(qparams="dynamic"), "dynamic"),
        (DQA(bits=8, extra_bits=3), "11-bit"),
        (Direct(symmetric=False), "zero point"),
    ],
    ids=str,
)
def test_what_has_no_compact_form_is_arithmetic_and_says_why(method: Any, reason: str, tmp_path: Path) -> None:
    quantizer, x = frozen(method)
    if not getattr(method, "symmetric", True):
        quantizer.lower.fill_(1.0)  # the range excludes zero
    path = to_onnx(quantizer, x, tmp_path / "q.onnx", form="qdq")
    assert path.sites["site"].startswith("float: ")
    assert reason in path.sites["site"]
    assert "QuantizeLinear" not in {n.op_type for n in onnx.load(path).graph.node}
    assert float((onnxruntime_session(path)(x)[0] - quantizer(x)).abs().max()) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["openvino", "torch.export", "torch.compile"])
@pytest.mark.parametrize("method", [DQA(bits=3), DenseSparse(bits=3, qparams="dynamic")], ids=str)
def test_the_other_backends_agree_too(backend: str, method: Any) -> None:
    prepared = prepare_fx(build("tokens"), get_qconfig_mapping(method), inputs("tokens"))
    prepared(*inputs("tokens", batch=16))
    (found,) = compare_backends(convert_fx(prepared), inputs("tokens", batch=16, seed=5), backends=(backend,))
    assert found.quantizers
    assert found.max_difference <= 1e-5, str(found)
    assert found.share_off == 0, str(found)
    assert found.network.only_ties, str(found)


def test_openvino_saves_float32_and_loads_with_the_same_numbers(tmp_path: Path) -> None:
    import openvino as ov

    from dqa_plugins.export.openvino import F32, to_openvino

    quantizer, x = frozen(DQA(bits=3))
    found = to_openvino(quantizer, x, tmp_path / "q.xml")
    assert found.get_rt_info("dqa_plugins").astype(str) == "onnx"
    compiled = ov.compile_model(str(tmp_path / "q.xml"), "CPU", F32)
    assert torch.equal(torch.from_numpy(compiled([x.numpy()])[0]), quantizer(x))
    with pytest.raises(ExportFailed, match=r"\.xml"):
        to_openvino(quantizer, x, tmp_path / "q.bin")


def test_openvino_reads_the_program_where_the_way_through_onnx_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from dqa_plugins.export import openvino as exporter

    def fail(_: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(exporter, "read_onnx", fail)
    quantizer, x = frozen(DQA(bits=3))
    found = exporter.to_openvino(quantizer, x)
    assert found.get_rt_info("dqa_plugins").astype(str) == "torch.export"
    assert found.inputs[0].partial_shape.to_string() == "[?,6,5,5]"
    compiled = exporter.require_openvino().compile_model(found, "CPU", exporter.F32)
    assert float((torch.from_numpy(compiled([x.numpy()])[0]) - quantizer(x)).abs().max()) <= 1e-5
    with pytest.raises(RuntimeError, match="no"):
        exporter.to_openvino(quantizer, x, form="qdq")
