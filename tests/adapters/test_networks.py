"""Networks that others write, in FX and PT2E: the same sites, names and axes, and outputs near the float ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization.backend_config import get_onednn_backend_config
from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.nn import functional as F
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from dqa_plugins import DQA, Direct, Method, NoisyQuant, iter_quantizers
from dqa_plugins.adapters import fx, pt2e
from dqa_plugins.errors import DQAWarning, NotAMethod, UncalibratedQuantizer, UnsupportedInput
from dqa_plugins.host.placement import PLACEMENT
from tests.graph.nets import NETS, build, inputs

ROOMS = {"fx": fx, "pt2e": pt2e}


def prepared_by(room: str, model: nn.Module, x: tuple[Tensor, ...], method: Method) -> Any:
    if room == "fx":
        return prepare_fx(model, fx.get_qconfig_mapping(method), x)
    program = torch.export.export(model, x).module()
    return prepare_pt2e(program, pt2e.PluginQuantizer().set_global(method))


def error(room: str, model: nn.Module, x: tuple[Tensor, ...], method: Method) -> float:
    """Relative to the float output."""
    with torch.no_grad():
        expected = model(*x)
        prepared = prepared_by(room, model, x, method)
        # FX fakes the quantization of a functional layer's weight while calibrating
        torch.testing.assert_close(prepared(*x), expected, rtol=1e-2, atol=1e-3)
        found = (convert_fx if room == "fx" else convert_pt2e)(prepared)(*x)
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("method", [Direct(), DQA()], ids=["shares", "looks_at_channels"])
@pytest.mark.parametrize("name", NETS)
def test_both_rooms_have_the_same_sites_axes_and_quantizers(name: str, method: Method) -> None:
    found = []
    for room in ROOMS:
        summary = prepared_by(room, build(name), inputs(name), method).meta[PLACEMENT]
        found.append([(site.name, site.channel_axis, site.quantizer) for site in summary.sites])
    assert found[0] == found[1]


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("name", NETS)
def test_eight_bits_are_near_float(room: str, name: str) -> None:
    """A learned position, a mask, norms written out, a squeeze, a 0-d factor, a write through a view."""
    assert 0 < error(room, build(name), inputs(name), Direct(bits=8)) < 0.03


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.g(self.f(x) * 0.02)


class Pooled(nn.Module):
    """Mean zero: an average over 64 values is a small part of the range before it."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.pool, self.g = (
            nn.Conv2d(3, 8, 1, bias=False),
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(8, 4, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.g(self.pool(self.f(x)))


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("net", [Scaled, Pooled])
def test_small_results_have_a_range_of_their_own(room: str, net: type[nn.Module]) -> None:
    """Scalar multiplication and average pooling shared their input's quantizer: a third of the output was lost."""
    torch.manual_seed(0)
    assert error(room, net().eval(), (torch.randn(4, 3, 32, 32),), Direct(bits=8)) < 0.03


class Written(nn.Module):
    """A part of a tensor is written after it was made: as a mask, and of an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        mask = x.new_zeros(8)
        mask[4:] = 7
        y = self.g(x)
        y[:, 2:] = 5
        return self.f(x) + mask + y


def test_a_write_in_place_is_not_lost() -> None:
    """PT2E quantized both tensors before the writes."""
    torch.manual_seed(0)
    assert error("pt2e", Written().eval(), (torch.randn(4, 8),), Direct(bits=8)) < 0.03


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("method", [DQA(), NoisyQuant(amplitude=0.3), Direct(granularity="channel")], ids=str)
def test_another_length_than_calibrated(room: str, method: Method) -> None:
    """input.0 of (B, L, D) had its channels counted along L."""
    net = nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(), nn.Linear(8, 4)).eval()
    x = torch.randn(4, 5, 6)
    if room == "fx":
        prepared: Any = prepared_by(room, net, (x,), method)
    else:
        length = torch.export.Dim("length", min=2, max=32)
        program = torch.export.export(net, (x,), dynamic_shapes=({1: length},)).module()
        prepared = prepare_pt2e(program, pt2e.PluginQuantizer().set_global(method))
    prepared(x)
    converted = (convert_fx if room == "fx" else convert_pt2e)(prepared)
    assert converted(torch.randn(4, 9, 6)).shape == (4, 9, 4)
    assert {q.channel_axis for _, q in iter_quantizers(converted)} == {-1}


@pytest.mark.parametrize("room", ROOMS)
def test_parameters_and_positions_are_no_sites(room: str) -> None:
    prepared = prepared_by(room, build("language"), inputs("language"), DQA())
    summary = prepared.meta[PLACEMENT]
    assert not {"learned", "positions", "norm1.weight", "norm1.rsqrt.0"} & {site.name for site in summary.sites}
    assert {"learned", "positions", "norm1.weight", "norm1.rsqrt.0"} <= dict(summary.floats).keys()


class Causal(nn.Module):
    """Attention scores with a causal mask, as language models add it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])
        mask = torch.where(positions[:, None] >= positions[None], 0.0, torch.finfo(torch.float32).min)
        return torch.softmax(4 * self.q(x) @ x.transpose(1, 2) + mask, -1) @ self.v(x)


@pytest.mark.parametrize("room", ROOMS)
def test_the_range_of_logits_is_not_that_of_their_mask(room: str) -> None:
    """Scores were zero beside -3e38: every position got the same attention."""
    torch.manual_seed(0)
    assert error(room, Causal().eval(), (torch.randn(3, 6, 8),), Direct(bits=8)) < 0.05


class Zero(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y * y.mean()


@pytest.mark.parametrize("room", ROOMS)
def test_a_0d_activation_stays_float(room: str) -> None:
    """It failed the whole calibration."""
    torch.manual_seed(0)
    assert error(room, Zero().eval(), (torch.randn(2, 3, 4, 4),), Direct(bits=8)) < 0.05


class Shared(nn.Module):
    """A convolution that a batch norm and an addition read."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.n = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(x)
        return y + self.n(y)


@pytest.mark.parametrize("room", ROOMS)
def test_a_batch_norm_is_not_folded_into_a_layer_that_others_read(room: str) -> None:
    """torchao 0.18 folds it: 24% off before any quantizer, and the site of the layer was called like the norm."""
    torch.manual_seed(0)
    net, x = Shared().eval(), (torch.randn(2, 3, 4, 4),)
    net.n.running_mean.normal_()
    net.n.running_var.uniform_(0.5, 1.5)
    prepared = prepared_by(room, net, x, Direct(bits=8))
    assert [site.name for site in prepared.meta[PLACEMENT].sites] == ["input.0", "c", "n", "add.0"]
    torch.testing.assert_close(prepared(*x), net(*x), rtol=1e-5, atol=1e-5)


class Own(nn.Conv2d):
    """Hosts look into it: a function to FX, which folds no batch norm into one."""


class Standardized(nn.Conv2d):
    """Its weight is standardized by a batch norm in training mode, as in NFNets."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias)


@pytest.mark.parametrize("room", ROOMS)
def test_hosts_that_look_into_a_layer_or_see_no_identity_have_the_same_sites(room: str) -> None:
    """r2plus1d's and nf_resnet's; the standardized weight was taken for an activation's batch norm, and refused."""
    torch.manual_seed(0)
    layers = (Own(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), Standardized(4, 4, 1), nn.Identity(), nn.ReLU())
    x = (torch.randn(2, 3, 4, 4),)
    prepared = prepared_by(room, nn.Sequential(*layers).eval(), x, Direct(bits=8))
    assert [site.name for site in prepared.meta[PLACEMENT].sites] == ["input.0", "2", "5"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.d, self.r = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.r(self.c(x) + self.d(x))


def blocks() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Conv2d(4, 2, 1)).eval()


def test_sites_of_standalone_modules_have_qualified_names() -> None:
    """FX prepares them by themselves: their sites were called relative to themselves."""
    custom = PrepareCustomConfig()
    for name in ("0", "1"):
        custom.set_standalone_module_name(name, None, (), None, None)
    x = torch.randn(2, 4, 5, 5)
    prepared = prepare_fx(blocks(), fx.get_qconfig_mapping(DQA()), (x,), prepare_custom_config=custom)
    names = [name for name, _ in iter_quantizers(prepared)]
    assert names == ["0.input.0", "0.c", "0.d", "0.r", "1.input.0", "1.c", "1.d", "1.r", "1", "2"]
    prepared(x)
    assert [name for name, _ in iter_quantizers(convert_fx(prepared))] == names


def test_sites_of_fused_additions_have_names_of_their_own() -> None:
    x, config = torch.randn(2, 4, 5, 5), get_onednn_backend_config()
    prepared = prepare_fx(blocks(), fx.get_qconfig_mapping(DQA()), (x,), backend_config=config)
    names = [name for name, _ in iter_quantizers(prepared)]
    assert names == ["input.0", "0.d", "0.r", "1.d", "1.r", "2"]
    prepared(x)
    assert [name for name, _ in iter_quantizers(convert_fx(prepared, backend_config=config))] == names


def test_a_name_that_matches_nothing_is_said() -> None:
    mapping = fx.get_qconfig_mapping(DQA()).set_module_name("blocks.7", None)
    with pytest.warns(DQAWarning, match=r"matched nothing for 'blocks\.7'"):
        prepare_fx(blocks(), mapping, (torch.randn(2, 4, 5, 5),))


# ------------------------------------------------------------ one call


@pytest.mark.parametrize("room", ROOMS)
def test_one_call_prepares_calibrates_and_converts(room: str) -> None:
    """The same numbers as by the host's own functions; the float model is not changed."""
    net, x = blocks(), [torch.randn(3, 4, 5, 5) for _ in range(2)]
    before = {key: value.clone() for key, value in net.state_dict().items()}
    quantized = ROOMS[room].quantize_model(net, DQA(bits=4), x)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    prepared = prepared_by(room, blocks(), (x[0],), DQA(bits=4))
    with torch.no_grad():
        for batch in x:
            prepared(batch)
        assert torch.equal(quantized(x[0]), (convert_fx if room == "fx" else convert_pt2e)(prepared)(x[0]))
        assert quantized(torch.randn(5, 4, 5, 5)).shape == (5, 2, 5, 5), "the batch is dynamic"


@pytest.mark.parametrize("room", ROOMS)
def test_one_call_with_methods_by_site(room: str) -> None:
    wanted = {"0.r": DQA(bits=3), "2": Direct(bits=8), "input.0": None}
    quantized = ROOMS[room].quantize_model(blocks(), wanted, [torch.randn(3, 4, 5, 5)], weight_bits=None)
    methods = {name: q.method for name, q in iter_quantizers(quantized)}
    assert methods["0.r"] == DQA(bits=3)
    assert methods["2"] == Direct(bits=8)
    assert not {"input.0", "0.c", "1.c"} & methods.keys()
    quantized = ROOMS[room].quantize_model(blocks(), {"": DQA(), "1": None}, [torch.randn(3, 4, 5, 5)])
    assert {"0.r", "2"} <= dict(iter_quantizers(quantized)).keys()
    assert "1.c" not in dict(iter_quantizers(quantized))


@pytest.mark.parametrize("room", ROOMS)
def test_one_call_with_a_site_of_a_fused_pattern(room: str) -> None:
    """FX ignores the name of a ReLU that it fused into the layer before: nothing would be quantized."""
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    quantized = ROOMS[room].quantize_model(net, {"1": DQA(bits=3)}, [torch.randn(3, 4, 5, 5)])
    assert {name: q.method for name, q in iter_quantizers(quantized)} == {"1": DQA(bits=3)}


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.a(first) + self.b(second)


@pytest.mark.parametrize("room", ROOMS)
def test_one_call_takes_tuples_dicts_and_a_function(room: str) -> None:
    torch.manual_seed(0)
    first, second = torch.randn(3, 4), torch.randn(3, 5)
    quantize, net = ROOMS[room].quantize_model, Two().eval()
    expected = quantize(net, Direct(), [(first, second)])(first, second)
    by_name = {"second": second, "first": first}
    assert torch.equal(quantize(net, Direct(), [by_name])(**by_name), expected)
    labelled = [((first, second), torch.zeros(3))]
    assert torch.equal(quantize(net, Direct(), labelled, inputs=lambda item: item[0])(first, second), expected)


@pytest.mark.parametrize("room", ROOMS)
def test_one_call_says_what_is_wrong(room: str) -> None:
    quantize, x = ROOMS[room].quantize_model, torch.randn(3, 4, 5, 5)
    with pytest.raises(UncalibratedQuantizer, match="empty"):
        quantize(blocks(), DQA(), [])
    with pytest.raises(UnsupportedInput, match="inputs="):
        quantize(blocks(), DQA(), ["photo.png"])
    with pytest.raises(NotAMethod, match="'2'"):
        quantize(blocks(), {"2": "dqa"}, [x])
