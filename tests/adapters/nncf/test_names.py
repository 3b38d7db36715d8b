"""Sites: the judge's, with the names and channel axes of the FX adapter; model outputs are float by NNCF's default."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dqa_plugins import DQA, ActivationQuantizer, Direct, iter_quantizers
from tests.adapters.nncf.models import MODELS, batches, build, quantized, site_list

EXPECTED: dict[str, list[str]] = {
    "residual": ["input.0", "relu1", "bn2", "relu2", "mean.0"],
    "bottleneck": [
        "input.0",
        "stem",
        "blocks.0.expand.2",
        "blocks.0.depth.2",
        "blocks.0.project.1",
        "blocks.0.add.0",
        "blocks.1.expand.2",
        "blocks.1.depth.2",
        "blocks.1.project.1",
        "blocks.1.add.0",
        "pool",
    ],
    "concat": ["input.0", "relu.0", "right", "cat.0"],
    "functional": ["input.0", "relu.0", "b", "relu.1", "c", "gelu.0", "mean.0"],
    "tokens": ["input.0", "norm", "fc1", "gelu.0", "fc2", "add.0", "mean.0"],
    "attention": [
        *("embed", "add.0", "norm", "query", "key", "value", "matmul.0", "mul.0", "softmax.0", "matmul.1", "out"),
    ],
    "sdpa": ["embed", "add.0", "norm", "query", "key", "value", "scaled_dot_product_attention.0", "out"],
    "listed": ["input.0", "down.0.relu", "down.1.relu"],
    "twice": ["input.0", "relu", "relu.1"],
}
OUTPUTS = {
    **dict.fromkeys(("residual", "bottleneck", "functional"), "fc"),
    **dict.fromkeys(("attention", "sdpa"), "add.1"),
    "concat": "join",
    "tokens": "head",
    "listed": "down.2.relu",
    "twice": "c",
}


def fx_quantizers(name: str) -> dict[str, ActivationQuantizer]:
    """What the FX adapter places, activations only, observed once."""
    from torch.ao.quantization.quantize_fx import prepare_fx

    from dqa_plugins.adapters.fx import get_qconfig_mapping

    x = batches(name)[0]
    prepared = prepare_fx(build(name), get_qconfig_mapping(DQA(), weight_bits=None), (x,))
    prepared(x)
    return {n: q for n, q in iter_quantizers(prepared) if q.calibration.count}


@pytest.mark.parametrize("name", MODELS)
def test_sites_are_those_of_the_fx_adapter(name: str) -> None:
    ours = dict(iter_quantizers(quantized(name)))
    theirs = fx_quantizers(name)
    assert list(ours) == EXPECTED[name]
    assert list(ours) == [n for n in theirs if n != OUTPUTS[name]]
    assert {n: q.channel_axis for n, q in ours.items()} == {n: theirs[n].channel_axis for n in ours}


@pytest.mark.parametrize("name", MODELS)
def test_order_and_index(name: str) -> None:
    quantizers = [q for _, q in iter_quantizers(quantized(name))]
    assert [q.index for q in quantizers] == list(range(len(quantizers)))


def test_quantize_outputs_adds_the_output() -> None:
    assert site_list(quantized("residual", quantize_outputs=True)) == [*EXPECTED["residual"], "fc"]


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("residual", {"input.0": 1, "relu1": 1, "mean.0": 1}),
        # a LayerNorm reads the input, and the mean over tokens leaves the channels the last
        ("tokens", dict.fromkeys(EXPECTED["tokens"], -1)),
        # heads: behind query @ key.T the last axis is that of tokens
        ("attention", {"embed": -1, "query": -1, "matmul.0": 1, "mul.0": 1, "softmax.0": 1, "matmul.1": -1}),
        ("sdpa", dict.fromkeys(EXPECTED["sdpa"], -1)),
    ],
)
def test_channel_axis(name: str, axes: dict[str, int]) -> None:
    found = {n: q.channel_axis for n, q in iter_quantizers(quantized(name))}
    assert {n: found[n] for n in axes} == axes


def test_channels_of_tokens_are_the_last_axis() -> None:
    """16 channels, 6 tokens: the stock hard-coded axis 1 would give 6 scales."""
    model = quantized("tokens", {"mode": "direct", "granularity": "channel"})
    scales = {n: tuple(q.scale.shape) for n, q in iter_quantizers(model)}
    assert scales["norm"] == (16,)
    assert scales["gelu.0"] == (32,)
    assert scales["add.0"] == (16,)


class Patches(nn.Module):
    """Patch embedding by a convolution: (B, 3, 8, 8) -> flatten, transpose -> (B, 16, 12) tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Conv2d(3, 12, 2, 2), nn.Parameter(torch.randn(1, 16, 12))
        self.norm, self.fc = nn.LayerNorm(12), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position
        return self.fc(self.norm(x) * x)


def test_a_transpose_moves_the_channel_axis() -> None:
    import nncf

    from dqa_plugins.adapters.nncf import quantize
    from tests.adapters.nncf.models import config

    model = quantize(Patches().eval(), nncf.Dataset([torch.randn(2, 3, 8, 8)]), config())
    axes = {n: q.channel_axis for n, q in iter_quantizers(model)}
    assert axes["add.0"] == -1
    assert dict(iter_quantizers(model))["add.0"].extra_bits.shape == (12,)


def test_a_model_with_options_counts_inputs_by_position() -> None:
    """FX counts every parameter of forward; so the second tensor is input.2 here."""
    import nncf

    from dqa_plugins.adapters.nncf import quantize
    from tests.adapters.nncf.models import config

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor, flag: bool = True, y: torch.Tensor | None = None) -> torch.Tensor:
            return self.a(x) + self.b(y)

    data = [{"x": torch.randn(1, 3, 4, 4), "y": torch.randn(1, 3, 4, 4)}]
    model = quantize(Two().eval(), nncf.Dataset(data), config())
    assert site_list(model) == ["input.0", "input.2", "a", "b"]


@pytest.mark.parametrize(("channels", "shared"), [(4, False), (6, True)])
def test_the_inputs_of_a_cat_share_a_quantizer_where_channels_allow(channels: int, shared: bool) -> None:
    """A cat has one scale; DQA's extra bits belong to channels, so only equal channels can share them."""
    import nncf

    from dqa_plugins.adapters.nncf import quantize
    from tests.adapters.nncf.models import Concat, config

    data = nncf.Dataset(batches("concat"))
    model = quantize(Concat(channels).eval(), data, config())
    assert site_list(model) == ["input.0", "relu.0", *([] if shared else ["right"]), "cat.0"]
    direct = quantize(Concat(channels).eval(), data, config({"mode": "direct"}))
    assert site_list(direct) == ["input.0", "relu.0"], "per tensor, one scale for all"
    assert dict(iter_quantizers(direct))["relu.0"].signed, "the other branch has no ReLU"


def test_names_survive_copies() -> None:
    model = quantized("listed")
    assert site_list(copy.deepcopy(model)) == site_list(model)


@pytest.mark.parametrize("method", [DQA(), Direct(granularity="channel")], ids=str)
@pytest.mark.parametrize("options", [{"batch_first": True}, {"batch_first": False}], ids=str)
def test_multihead_attention(method: object, options: dict[str, bool]) -> None:
    """NNCF sees six operations inside, whose channels a view and a transpose move to axis 0; it is one layer."""
    import nncf

    from dqa_plugins.adapters.nncf import quantize

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.attend, self.out = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, **options), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.embed(x)
            return self.out(self.attend(x, x, x)[0])

    model = quantize(Net().eval(), nncf.Dataset([torch.randn(4, 5, 8) for _ in range(3)]), method)
    assert {n: q.channel_axis for n, q in iter_quantizers(model)} == {"input.0": -1, "embed": -1, "attend": -1}
    assert model(torch.randn(4, 5, 8)).shape == (4, 5, 4)


def test_channels_on_the_axis_of_samples() -> None:
    import nncf

    from dqa_plugins.adapters.nncf import quantize

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.conv(x).permute(1, 0, 2, 3) + 1).relu().exp()

    model = quantize(Net().eval(), nncf.Dataset([torch.randn(2, 3, 4, 4)]), DQA())
    assert dict(iter_quantizers(model))["relu.0"].channel_axis == -1
    assert model(torch.randn(5, 3, 4, 4)).shape == (6, 5, 4, 4)
