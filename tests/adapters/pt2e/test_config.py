"""PluginQuantizer: which method where, weights, other Quantizers, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.composable_quantizer import ComposableQuantizer
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)
from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

from dqa_plugins import DQA, ActivationQuantizer, DenseSparse, Direct, NoisyQuant, iter_quantizers
from dqa_plugins.adapters.pt2e import PluginQuantizer
from dqa_plugins.errors import DQAWarning, InvalidArgument, NotAMethod, UnsupportedInput

from .zoo import build, calibrate, exported, inputs, sites


def methods(quantizer: PluginQuantizer, name: str = "residual") -> dict[str, Any]:
    """{site: method} of the prepared network."""
    prepared = prepare_pt2e(exported(name), quantizer)
    return {site: found.method for site, found in iter_quantizers(prepared)}


def test_name_before_type_before_global() -> None:
    """The nearest name decides, then the nearest type, then the global method."""
    block, conv, relu, rest = DQA(bits=3), DenseSparse(), NoisyQuant(amplitude=0.5), Direct(bits=8)
    quantizer = (
        PluginQuantizer()
        .set_global(rest)
        .set_module_type(nn.Linear, conv)
        .set_module_name("blocks.0", block)
        .set_module_name("blocks.0.relu1", relu)
    )
    found = methods(quantizer)
    assert found["blocks.0.relu1"] == relu
    assert found["blocks.0.bn2"] == found["blocks.0.relu2"] == block
    assert found["fc"] == conv
    assert found["relu"] == found["blocks.1.relu1"] == rest


def test_a_site_left_out_by_name() -> None:
    """A module of a pattern, a function and an input can be left out; a layer is left float with its weight."""
    full = methods(PluginQuantizer().set_global(DQA()), "functional")
    out = methods(
        PluginQuantizer().set_global(DQA()).set_module_name("input", None).set_module_name("relu.1", None),
        "functional",
    )
    assert set(full) - set(out) == {"input.0", "relu.1"}
    assert "blocks.0.relu1" not in methods(PluginQuantizer().set_global(DQA()).set_module_name("blocks.0.relu1", None))
    prepared = prepare_pt2e(exported("residual"), PluginQuantizer().set_global(DQA()).set_module_name("fc", None))
    calibrate(prepared, "residual")
    converted = convert_pt2e(prepared)
    assert "fc" not in sites(converted)
    assert converted.get_parameter("fc.weight").dtype == torch.float32


def test_a_pool_or_clamp_by_name_gets_its_own_method() -> None:
    """Sharing with the input ends where the user says so."""
    found = methods(PluginQuantizer().set_global(Direct()).set_module_name("expand.2", DQA(bits=3)), "bottleneck")
    assert found["expand.2"] == DQA(bits=3)
    found = methods(PluginQuantizer().set_global(Direct()).set_module_name("pool", Direct(bits=8)))
    assert found["pool"] == Direct(bits=8)
    assert found["blocks.1.relu2"] == Direct()


def test_skip_first_and_last() -> None:
    """The first and last layer with a weight stay float, input and output with them."""
    found = methods(PluginQuantizer(skip=("first", "last")).set_global(DQA()))
    assert "input.0" not in found
    assert "fc" not in found
    assert "blocks.0.relu1" in found
    left = [site for site in methods(PluginQuantizer(skip=["blocks.1"]).set_global(DQA())) if "blocks.1" in site]
    assert left == ["blocks.1.relu2"]  # what the pool reads


def test_type_none_leaves_a_class_float() -> None:
    """set_module_type(Conv2d, None): only what other calls read or make is quantized."""
    found = methods(PluginQuantizer().set_global(DQA()).set_module_type(nn.Conv2d, None))
    assert "blocks.0.relu1" not in found
    assert "fc" in found


def test_several_methods_bit_widths_and_float_layers_in_one_model() -> None:
    """One model mixes everything and still converts."""
    quantizer = (
        PluginQuantizer()
        .set_global(Direct(bits=8))
        .set_module_name("relu", DQA(bits=3))
        .set_module_name("blocks.0.relu1", NoisyQuant(bits=4, amplitude=1.0))
        .set_module_name("blocks.0.relu2", DenseSparse(bits=2, qparams="dynamic"))
        .set_module_name("blocks.1.conv1", None)
        .set_module_name("blocks.1.relu2", DQA(bits=2, qparams="dynamic", granularity="channel"))
    )
    prepared = prepare_pt2e(exported("residual"), quantizer)
    calibrate(prepared, "residual")
    converted = convert_pt2e(prepared)
    found = {site: (type(q.method).__name__, q.method.bits) for site, q in iter_quantizers(converted)}
    assert found["relu"] == ("DQA", 3)
    assert found["blocks.0.relu1"] == ("NoisyQuant", 4)
    assert found["blocks.0.relu2"] == ("DenseSparse", 2)
    assert found["blocks.1.relu2"] == ("DQA", 2)
    assert found["fc"] == ("Direct", 8)
    with torch.no_grad():
        assert torch.isfinite(converted(*inputs("residual"))).all()


def test_activations_only_leaves_weights_float() -> None:
    """weight_bits=None: no quantize or dequantize node at all, and the weights of the float model."""
    prepared = prepare_pt2e(exported("shared_relu"), PluginQuantizer(weight_bits=None).set_global(DQA()))
    calibrate(prepared, "shared_relu")
    converted = convert_pt2e(prepared)
    assert not [node for node in converted.graph.nodes if "quantized_decomposed" in str(node.target)]
    assert torch.equal(converted.get_parameter("conv1.weight"), build("shared_relu").conv1.weight)


def x86() -> X86InductorQuantizer:
    """torchao's own, 8 bits everywhere."""
    quantizer = X86InductorQuantizer()
    quantizer.set_global(get_default_x86_inductor_quantization_config())
    return quantizer


def test_composed_with_torchaos_own() -> None:
    """Ours where asked, X86's everywhere else, both calibrated and converted by the same calls."""
    ours = PluginQuantizer().set_module_name("blocks.0", DQA(bits=3))
    prepared = prepare_pt2e(exported("residual"), ComposableQuantizer([ours, x86()]))
    calibrate(prepared, "residual")
    converted = convert_pt2e(prepared)
    # relu is read by the block's first layer and its shortcut: quantized there
    assert sites(converted) == ["relu", "blocks.0.relu1", "blocks.0.bn2", "blocks.0.relu2"]
    targets = [str(node.target) for node in converted.graph.nodes]
    assert targets.count("quantized_decomposed.quantize_per_tensor.default") >= 3
    alone = prepare_pt2e(exported("residual"), PluginQuantizer().set_module_name("blocks.0", DQA(bits=3)))
    calibrate(alone, "residual")
    # X86's fake quantization in front of it belongs to convert: while calibrating, ours saw the same data
    theirs = dict(iter_quantizers(convert_pt2e(alone)))["relu"]
    ours_now = dict(iter_quantizers(converted))["relu"]
    assert torch.equal(ours_now.scale, theirs.scale)
    assert torch.equal(ours_now.extra_bits, theirs.extra_bits)


def test_everything_ours_leaves_nothing_to_torchaos_own() -> None:
    """In front of X86's, a global method takes every call that X86's would."""
    prepared = prepare_pt2e(exported("residual"), ComposableQuantizer([PluginQuantizer().set_global(DQA()), x86()]))
    assert sites(prepared) == sites(prepare_pt2e(exported("residual"), PluginQuantizer().set_global(DQA())))
    calibrate(prepared, "residual")
    converted = convert_pt2e(prepared)
    assert not [node for node in converted.graph.nodes if "quantize_per_tensor" in str(node.target)]


def test_behind_torchaos_own_what_it_took_is_left_to_it() -> None:
    """ComposableQuantizer forbids changing annotations: ours keeps off, and says so where nothing is left."""
    with pytest.warns(DQAWarning, match="another Quantizer took them all"):
        prepare_pt2e(exported("residual"), ComposableQuantizer([x86(), PluginQuantizer().set_global(DQA())]))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: PluginQuantizer(weight_bits=9), InvalidArgument, "weight_bits=9"),
        (lambda: PluginQuantizer(weight_bits=True), InvalidArgument, "weight_bits=True"),
        (lambda: PluginQuantizer(weight_scheme="row"), InvalidArgument, "'row'"),
        (lambda: PluginQuantizer(skip="first"), InvalidArgument, "tuple"),
        (lambda: PluginQuantizer().set_global(DQA), NotAMethod, "did you mean DQA()"),
        (lambda: PluginQuantizer().set_module_name("a", "dqa"), NotAMethod, "'a'"),
        (lambda: PluginQuantizer().set_module_name(nn.ReLU, DQA()), InvalidArgument, "qualified name"),
        (lambda: PluginQuantizer().set_module_type("ReLU", DQA()), InvalidArgument, "class of modules"),
    ],
)
def test_bad_arguments_are_named(call: Any, error: type[Exception], words: str) -> None:
    """Typed errors that name the value and the way out."""
    with pytest.raises(error, match=words.replace("(", r"\(").replace(")", r"\)")):
        call()


def test_unknown_names_are_refused_when_preparing() -> None:
    """A misspelt name does not leave a layer in silence."""
    with pytest.raises(InvalidArgument, match=r"blocks\.7"):
        prepare_pt2e(exported("residual"), PluginQuantizer().set_global(DQA()).set_module_name("blocks.7", None))
    with pytest.raises(InvalidArgument, match="skip='head'"):
        prepare_pt2e(exported("residual"), PluginQuantizer(skip=("head",)).set_global(DQA()))


def test_a_quantizer_that_finds_nothing_warns() -> None:
    """Methods were given, none applied."""
    with pytest.warns(DQAWarning, match="placed no quantizer"):
        prepare_pt2e(exported("shared_relu"), PluginQuantizer().set_module_type(nn.Embedding, DQA()))


def test_quantizers_are_the_modules_of_the_core() -> None:
    """The converted graph calls ActivationQuantizer itself."""
    prepared = prepare_pt2e(exported("shared_relu"), PluginQuantizer().set_global(DQA()))
    calibrate(prepared, "shared_relu")
    converted = convert_pt2e(prepared)
    called = [converted.get_submodule(n.target) for n in converted.graph.nodes if n.op == "call_module"]
    assert [type(m) for m in called if not type(m).__module__.startswith("torch")] == [ActivationQuantizer] * 4


class _Permuted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x).permute(0, 2, 3, 1))


def test_xnnpacks_quantizer_does_not_share_ours() -> None:
    """It gave the permute our observer, which then saw channels on another axis: ChannelMismatch."""
    rest = XNNPACKQuantizer().set_global(get_symmetric_quantization_config())
    ours = PluginQuantizer().set_module_type(nn.Conv2d, DQA(bits=8))
    x = torch.randn(2, 3, 8, 8)
    model = _Permuted().eval()
    prepared = prepare_pt2e(torch.export.export(model, (x,)).module(), ComposableQuantizer([ours, rest]))
    prepared(x)
    converted = convert_pt2e(prepared)
    assert [name for name, _ in iter_quantizers(converted)] == ["input.0", "conv"]
    assert any("quantize_per_tensor" in str(node.target) for node in converted.graph.nodes), "the rest is XNNPACK's"
    expected = model(x)
    assert float((converted(x) - expected).norm() / expected.norm()) < 0.05


def test_a_second_prepare_is_refused() -> None:
    prepared = prepare_pt2e(exported("residual"), PluginQuantizer().set_global(DQA()))
    calibrate(prepared, "residual")
    with pytest.raises(UnsupportedInput, match="quantized already"):
        prepare_pt2e(convert_pt2e(prepared), PluginQuantizer().set_global(DQA()))
