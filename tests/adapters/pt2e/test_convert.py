"""What becomes of a prepared model: copies, files, compilers, batches."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from dqa_plugins import DQA, DenseSparse, Direct, NoisyQuant, iter_quantizers
from dqa_plugins.adapters.pt2e import PluginQuantizer
from dqa_plugins.errors import NonFiniteInput, UncalibratedQuantizer, UnsupportedCombination

from .zoo import CONVERTED, calibrate, exported, inputs, sites

METHODS = {
    "direct": Direct(bits=4),
    "dqa_static": DQA(bits=3),
    "dqa_dynamic": DQA.paper(bits=3),
    "dqa_channel": DQA(bits=4, granularity="channel", clip="mse"),
    "noisyquant": NoisyQuant(bits=4, amplitude=1.0),
    "noisyquant_dynamic": NoisyQuant(bits=4, amplitude=1.0, qparams="dynamic"),
    "dense_sparse": DenseSparse(bits=3),
    "dense_sparse_dynamic": DenseSparse.paper(bits=3),
}


def prepared(name: str, method: Any, *, dynamic: bool = False, **kwargs: Any) -> Any:
    """The network prepared and calibrated."""
    model = prepare_pt2e(exported(name, dynamic=dynamic), PluginQuantizer(**kwargs).set_global(method))
    calibrate(model, name)
    return model


def run(model: Any, name: str, seed: int = 5, batch: int = 3) -> torch.Tensor:
    """Output on fresh inputs."""
    with torch.no_grad():
        return model(*inputs(name, seed, batch))  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_copies_and_state_dicts_convert_to_the_same_model(method: Any) -> None:
    """deepcopy before and after calibration; state_dict into a freshly prepared model."""
    model = prepared("shared_relu", method)
    fresh = prepare_pt2e(exported("shared_relu"), PluginQuantizer().set_global(method))
    twin = copy.deepcopy(fresh)
    fresh.load_state_dict(model.state_dict())
    calibrate(twin, "shared_relu")
    expected = run(convert_pt2e(copy.deepcopy(model)), "shared_relu")
    for other in (fresh, twin, model):
        converted = convert_pt2e(other)
        assert torch.equal(run(converted, "shared_relu"), expected)
        assert torch.equal(run(copy.deepcopy(converted), "shared_relu"), expected)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_dynamic_batch_export_and_file(method: Any) -> None:
    """The converted model exports again, with the batch free; the file loads and computes the same at any batch."""
    converted = convert_pt2e(prepared("shared_relu", method, dynamic=True))
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(converted, inputs("shared_relu"), dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch in (2, 3, 7):
        assert torch.equal(run(loaded, "shared_relu", 5, batch), run(converted, "shared_relu", 5, batch))


@pytest.mark.parametrize("name", CONVERTED)
def test_every_network_exports_again(name: str) -> None:
    """With quantized weights, at the batch it was made for."""
    converted = convert_pt2e(prepared(name, DQA(bits=3)))
    again = torch.export.export(converted, inputs(name)).module()
    assert torch.equal(run(again, name), run(converted, name))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_compiles_in_one_graph(method: Any) -> None:
    """torch.compile(fullgraph=True) traces without a break, and the traced graph computes the same."""
    torch._dynamo.reset()
    converted = convert_pt2e(prepared("shared_relu", method))
    compiled = torch.compile(converted, fullgraph=True, backend="aot_eager")
    assert torch.equal(run(compiled, "shared_relu"), run(converted, "shared_relu"))


@pytest.mark.slow
def test_compiles_with_inductor() -> None:
    """The default backend; convolutions may sum in another order, so float layers are compared, not codes."""
    torch._dynamo.reset()
    converted = convert_pt2e(prepared("shared_relu", DQA(bits=8)))
    compiled = torch.compile(converted, fullgraph=True)
    found, expected = run(compiled, "shared_relu"), run(converted, "shared_relu")
    step = float(dict(iter_quantizers(converted))["relu.2"].scale)
    assert (found - expected).abs().max() <= step * 1.001
    assert (found != expected).double().mean() < 0.01


def test_folding_weights_changes_nothing() -> None:
    """fold_quantize=True holds int8 weights, False float ones behind quantize and dequantize: the same output."""
    model = prepared("residual", DQA(bits=3))
    folded = convert_pt2e(copy.deepcopy(model), fold_quantize=True)
    plain = convert_pt2e(model, fold_quantize=False)
    assert torch.equal(run(folded, "residual"), run(plain, "residual"))
    assert any(value.dtype == torch.int8 for value in folded.state_dict().values())
    assert not any(value.dtype == torch.int8 for value in plain.state_dict().values())


@pytest.mark.parametrize("method", [Direct(), DQA.paper(), DenseSparse.paper()], ids=["static", "dynamic", "ranges"])
def test_converting_without_data_raises_by_name(method: Any) -> None:
    """Dynamic quantizers too: they need to know sign and channels."""
    model = prepare_pt2e(exported("shared_relu"), PluginQuantizer().set_global(method))
    with pytest.raises(UncalibratedQuantizer, match=r"'(input\.0|relu)'"):
        convert_pt2e(model)


def test_nan_in_calibration_data_names_the_site() -> None:
    """NaN raises where it is first seen."""
    model = prepare_pt2e(exported("shared_relu"), PluginQuantizer().set_global(Direct()))
    bad = inputs("shared_relu")[0].clone()
    bad[0, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteInput, match=r"'input\.0'"):
        model(bad)


def test_converted_equals_the_quantizers_run_by_hand() -> None:
    """SharedReLU written out: fake_quantize at each site between torch's own operations, exactly."""
    model = prepared("shared_relu", DQA(bits=3), weight_bits=None)
    converted = convert_pt2e(model)
    q = dict(iter_quantizers(converted))
    weight = dict(converted.named_parameters())
    conv = torch.nn.functional.conv2d
    with torch.no_grad():
        (x,) = inputs("shared_relu", 5)
        x = q["relu"](conv(q["input.0"](x), weight["conv1.weight"], weight["conv1.bias"]).relu())
        y = q["relu.1"](conv(x, weight["conv2.weight"], weight["conv2.bias"]).relu())
        assert torch.equal(q["relu.2"]((x + y).relu()), run(converted, "shared_relu"))


def test_dynamic_qparams_do_not_depend_on_the_batch() -> None:
    """A site's tensor whole, and its first two samples alone: the same scales, bit for bit, at every site."""
    converted = convert_pt2e(prepared("tokens", DQA.paper(bits=4), dynamic=True))
    fed: dict[str, torch.Tensor] = {}

    def note(module: Any, args: Any) -> None:
        fed[module.name] = args[0]

    for _, quantizer in iter_quantizers(converted):
        quantizer.register_forward_pre_hook(note)
    run(converted, "tokens", batch=4)
    assert len(fed) == len(sites(converted))
    for site, quantizer in iter_quantizers(converted):
        if len(fed[site]) == 4:  # all but the parameter
            whole, part = (quantizer.runtime_qparams(x).scale for x in (fed[site], fed[site][:2]))
            assert torch.equal(whole[:2], part), site


def test_names_are_the_same_before_and_after() -> None:
    """prepare, convert, and the states between."""
    model = prepared("functional", Direct())
    before = sites(model)
    assert {quantizer.state for _, quantizer in iter_quantizers(model)} == {"observe"}
    converted = convert_pt2e(model)
    assert sites(converted) == before
    assert {quantizer.state for _, quantizer in iter_quantizers(converted)} == {"frozen"}


@pytest.mark.slow
def test_a_file_loads_in_another_process(tmp_path: Path) -> None:
    """Without importing dqa_plugins: the exported program holds plain operators."""
    converted = convert_pt2e(prepared("shared_relu", DQA(bits=3)))
    program = torch.export.export(converted, inputs("shared_relu"))
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save((inputs("shared_relu", 5), run(converted, "shared_relu")), tmp_path / "data.pt")
    script = (
        "import sys, torch, torch.ao.quantization.fx._decomposed\n"
        f"x, y = torch.load({str(tmp_path / 'data.pt')!r})\n"
        f"assert torch.equal(torch.export.load({str(tmp_path / 'model.pt2')!r}).module()(*x), y)\n"
        "assert 'dqa_plugins' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_batch_norm_in_training_mode_is_not_folded_in_silence() -> None:
    """torchao folds it with its running statistics, which a forward in training mode does not use."""
    x = torch.randn(4, 3, 8, 8)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    trained, evaluated = (torch.export.export(model.train(mode), (x,)).module() for mode in (True, False))
    with pytest.raises(UnsupportedCombination, match=r"'1' is a batch norm in training mode.*eval"):
        prepare_pt2e(trained, PluginQuantizer().set_global(Direct()))
    prepare_pt2e(evaluated, PluginQuantizer().set_global(Direct()))


def test_batch_norms_that_are_left_cost_no_search_for_those_of_qat(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao exports 96 patterns, half a minute, as soon as one is left; without a scaled convolution none can fit."""

    def exported_pattern(*_arguments: Any, **_options: Any) -> Any:
        raise AssertionError("a pattern of QAT was exported")

    x = torch.randn(4, 3, 8, 8)
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU()).eval()
    prepared = prepare_pt2e(torch.export.export(model, (x,)).module(), PluginQuantizer().set_global(Direct(bits=8)))
    prepared(x)
    monkeypatch.setattr("torchao.quantization.pt2e.qat_utils._get_aten_graph_module_for_pattern", exported_pattern)
    with torch.no_grad():
        assert (convert_pt2e(prepared)(x) - model(x)).norm() < 0.05 * model(x).norm()
