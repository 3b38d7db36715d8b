"""The same tensors as in FX get a quantizer, under the same names; and the quantizers agree bit for bit."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization.backend_config import BackendConfig
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from dqa_plugins import DQA, ActivationQuantizer, DenseSparse, Direct, NoisyQuant, iter_quantizers
from dqa_plugins.adapters.fx import get_qconfig_mapping
from dqa_plugins.adapters.pt2e import PluginQuantizer
from dqa_plugins.graph.operations import QUANTIZED, facts

from .zoo import CONVERTED, ZOO, build, calibrate, exported, inputs, sites

warnings.filterwarnings("ignore", category=DeprecationWarning)


def both(name: str, method: Any, weight_bits: int | None = None) -> tuple[Any, Any]:
    """The network prepared by FX and by PT2E."""
    mapping = get_qconfig_mapping(method, weight_bits=weight_bits)
    fx = prepare_fx(build(name), mapping, inputs(name))
    pt2e = prepare_pt2e(exported(name), PluginQuantizer(weight_bits=weight_bits).set_global(method))
    return fx, pt2e


@pytest.mark.parametrize("method", [Direct(), DQA(bits=3)], ids=["shares", "looks_at_channels"])
@pytest.mark.parametrize("name", ZOO)
def test_site_names_are_those_of_fx(name: str, method: Any) -> None:
    """Names and order, for methods that share quantizers between tensors and for methods that cannot."""
    fx, pt2e = both(name, method)
    assert sites(pt2e) == sites(fx)


@pytest.mark.parametrize(
    ("skip", "floats"),
    [
        (("first", "last"), ()),
        (("blocks.1",), ()),
        ((), ("blocks.0.conv1",)),
        ((), ("blocks.0.relu1",)),
        ((), ("pool", "fc")),
        ((), ("input.0", "blocks.0")),
    ],
)
def test_what_is_left_out_is_what_fx_leaves_out(skip: tuple[str, ...], floats: tuple[str, ...]) -> None:
    """skip and set_module_name(name, None)."""
    mapping = get_qconfig_mapping(Direct(), skip=skip)
    quantizer = PluginQuantizer(skip=skip).set_global(Direct())
    for name in floats:
        mapping.set_module_name(name, None)
        quantizer.set_module_name(name, None)
    fx = prepare_fx(build("residual"), mapping, inputs("residual"))
    assert sites(prepare_pt2e(exported("residual"), quantizer)) == sites(fx)


@pytest.mark.parametrize("name", ["residual", "functional", "tokens", "two_inputs"])
def test_strict_export_gives_the_same_names(name: str) -> None:
    """A strict export describes modules and functions by other metadata."""
    quantizer = PluginQuantizer().set_global(DQA())
    assert sites(prepare_pt2e(exported(name, strict=True), quantizer)) == sites(prepare_pt2e(exported(name), quantizer))


@pytest.mark.parametrize("name", CONVERTED)
@pytest.mark.parametrize("method", [DQA(bits=3), DenseSparse(qparams="dynamic")], ids=["dqa", "dense_sparse"])
def test_frozen_quantizers_equal_those_of_fx_bit_for_bit(name: str, method: Any) -> None:
    """The same calibration data gives the same quantizers; the whole network gives the same output."""
    fx, pt2e = both(name, method)
    for seed in range(3):
        fx(*inputs(name, seed)), pt2e(*inputs(name, seed))
    compare(fx, pt2e, inputs(name), exact=name != "token_ids")


@pytest.mark.slow
@pytest.mark.xdist_group("pt2e-batch-norms")
def test_batch_norms_that_stay_equal_those_of_fx() -> None:
    """Batch norms that no convolution takes in are quantized themselves."""
    fx, pt2e = both("norms", DQA(bits=3))
    calibrate(fx, "norms")
    calibrate(pt2e, "norms")
    compare(fx, pt2e, inputs("norms"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet32", "mobilenetv2", "unet", "espcn", "vit"])
def test_trained_networks_equal_those_of_fx(name: str) -> None:
    """The repository's own networks: the same sites, quantizers and outputs."""
    from examples.networks import load

    x = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    mapping = get_qconfig_mapping(DQA(bits=3), weight_bits=8)
    fx = prepare_fx(load(name)[0], mapping, (x,))
    program = torch.export.export(load(name)[0], (x,)).module()
    pt2e = prepare_pt2e(program, PluginQuantizer(weight_bits=8).set_global(DQA(bits=3)))
    with torch.no_grad():
        fx(x), pt2e(x)
    compare(fx, pt2e, (x,))


def compare(fx: Any, pt2e: Any, x: tuple[Tensor, ...], *, exact: bool = True) -> None:
    """Convert both; the same sites, the same quantizers on the tensors they meet, the same output.

    Args:
        exact: False for torch's attention layer, which has a fast path of its own that export does not take.
    """
    fx, pt2e = convert_fx(fx), convert_pt2e(pt2e)
    theirs = dict(iter_quantizers(fx))
    ours = dict(iter_quantizers(pt2e))
    assert list(ours) == list(theirs)
    with torch.no_grad():
        seen, found = watch(ours, lambda: pt2e(*x))
        expected = fx(*x)
    torch.testing.assert_close(found, expected, **({"rtol": 0, "atol": 0} if exact else {}))
    assert seen.keys() == ours.keys()
    for site, tensors in seen.items():
        assert ours[site].channel_axis == theirs[site].channel_axis, site
        for tensor in tensors:
            assert torch.equal(ours[site](tensor), theirs[site](tensor)), site


def watch(quantizers: dict[str, ActivationQuantizer], run: Any) -> tuple[dict[str, list[Tensor]], Tensor]:
    """What each quantizer is fed while `run` runs, and what that returns."""
    seen: dict[str, list[Tensor]] = {}

    def hook(site: str) -> Any:
        return lambda module, args: seen.setdefault(site, []).append(args[0].detach().clone())

    handles = [quantizer.register_forward_pre_hook(hook(site)) for site, quantizer in quantizers.items()]
    result = run()
    for handle in handles:
        handle.remove()
    return seen, result


@pytest.mark.parametrize("scheme", ["channel", "qpp"])
def test_weights_equal_those_of_fx(scheme: str) -> None:
    """The same integer weights: identical outputs, transposed convolution and folded batch norms included."""
    for name, bits in (("concat", 4), ("bottleneck", 8)):
        fx = prepare_fx(
            build(name), get_qconfig_mapping(Direct(bits=8), weight_bits=bits, weight_scheme=scheme), inputs(name)
        )
        quantizer = PluginQuantizer(weight_bits=bits, weight_scheme=scheme).set_global(Direct(bits=8))
        pt2e = prepare_pt2e(exported(name), quantizer)
        calibrate(fx, name)
        calibrate(pt2e, name)
        fx, pt2e = convert_fx(fx), convert_pt2e(pt2e)
        with torch.no_grad():
            found = pt2e(*inputs(name))
            assert torch.equal(found, fx(*inputs(name)))
            assert not torch.equal(found, build(name)(*inputs(name)))


def test_calibration_runs_behind_float_weights() -> None:
    """As in FX, a weight's quantization does not change what the activations' observers see."""
    found = []
    for bits in (2, None):
        pt2e = prepare_pt2e(exported("residual"), PluginQuantizer(weight_bits=bits).set_global(Direct()))
        calibrate(pt2e, "residual")
        found.append(dict(iter_quantizers(pt2e))["fc"].calibration.maximum)
    assert torch.equal(*found)


def test_observer_is_behind_the_relu_and_not_behind_the_convolution() -> None:
    """relu1 of a block sees no negative value; nothing observes conv1 or bn1."""
    pt2e = prepare_pt2e(exported("residual"), PluginQuantizer().set_global(Direct()))
    calibrate(pt2e, "residual")
    quantizers = dict(iter_quantizers(pt2e))
    assert not quantizers["blocks.0.relu1"].calibration.negative
    assert quantizers["blocks.0.bn2"].calibration.negative
    assert not {"blocks.0.conv1", "blocks.0.bn1", "blocks.0.conv2"} & quantizers.keys()


def test_shared_observers_are_one_module_and_stay_one() -> None:
    """Direct: both sides of a cat and the cat itself share; DQA: tensors of other channels do not."""
    for method, calls in ((Direct(), 5), (DQA(), 2)):  # a, relu, two cats and c; a and relu
        pt2e = prepare_pt2e(exported("concat"), PluginQuantizer().set_global(method))
        calibrate(pt2e, "concat")
        converted = convert_pt2e(pt2e)
        shared = dict(iter_quantizers(converted))["a"]
        targets = [node for node in converted.graph.nodes if node.op == "call_module"]
        mine = [node for node in targets if converted.get_submodule(node.target) is shared]
        assert len({node.target for node in mine}) == 1
        assert len(mine) == calls
        assert shared.num_channels == (None if isinstance(method, Direct) else 4)


def test_value_preserving_operations_are_not_quantized_again() -> None:
    """flatten, slice, chunk, transpose, max-pool and dropout hand on what was quantized."""
    for name in ("residual", "bottleneck", "concat", "tokens"):
        converted = prepare_pt2e(exported(name), PluginQuantizer().set_global(DQA()))
        operations = {"flatten", "slice", "chunk", "transpose", "max_pool2d", "dropout", "getitem"}
        for node in converted.graph.nodes:
            if node.op == "call_module" and hasattr(converted.get_submodule(str(node.target)), "quantizer"):
                assert str(node.args[0].target).removeprefix("aten.").split(".")[0] not in operations, node.args[0]


def test_what_torch_ao_quantizes_is_quantized() -> None:
    """Every single-call pattern of the native backend config changes, computes, clamps, joins, norms or moves."""
    from torch.ao.quantization.backend_config import ObservationType, get_native_backend_config

    missing = set()
    config: BackendConfig = get_native_backend_config()
    for entry in config.configs:
        static = [d for d in entry.dtype_configs if d.input_dtype == d.output_dtype == torch.quint8]
        fixed = any(d.output_dtype_with_constraints.scale_exact_match for d in static)  # sigmoid, tanh, softmax
        pattern = entry.pattern
        if not static or fixed or pattern is None or isinstance(pattern, tuple):
            continue
        if entry.observation_type is ObservationType.INPUT_OUTPUT_NOT_OBSERVED:
            continue
        how, name = _describe(pattern)
        if how and facts(name).kind not in QUANTIZED | {"moves"}:
            missing.add(name)
    assert missing == {"resize_"}  # of a tensor's memory, by sizes that may not fit: float


def _describe(pattern: Any) -> tuple[str, str]:
    if isinstance(pattern, str):
        return "method", pattern
    module = getattr(pattern, "__module__", "") or ""
    if isinstance(pattern, type):
        plain = module.startswith("torch.nn.modules") and issubclass(pattern, nn.Module)
        return ("module" if plain else ""), pattern.__name__
    return ("operator" if module == "_operator" else "function"), pattern.__name__


def test_preparing_twice_gives_equal_models() -> None:
    """A Quantizer keeps nothing of a model."""
    quantizer = PluginQuantizer().set_global(NoisyQuant(amplitude=1.0))
    first = prepare_pt2e(exported("residual"), quantizer)
    second = prepare_pt2e(exported("residual"), copy.deepcopy(quantizer))
    assert sites(first) == sites(second) != []
