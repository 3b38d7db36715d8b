"""Sites: the same names as in the FX adapter, in order of execution, with the right channel axis.

Where NNCF's own quantizer propagation puts points elsewhere, the difference is written out below with its reason.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dqa_plugins import DQA, ActivationQuantizer, iter_quantizers
from tests.adapters.nncf.models import MODELS, batches, build, quantized, site_list

# NNCF quantizes no output of the model (quantize_outputs does)
# NNCF quantizes no tensor that only feeds a GELU: it fuses the two
# NNCF quantizes what a mean, or an average pool, gives to a Linear; FX lets it share the quantizer before it
# NNCF quantizes the inputs of a cat with one scale, FX its output as well
# NNCF quantizes no embedding and no parameter: the first quantizer is behind their sum
# NNCF fuses matmul, scale and softmax, and quantizes the softmax; of SDPA it quantizes query and key
EXPECTED: dict[str, tuple[list[str], set[str], set[str]]] = {
    # model: (sites, not in FX, only in FX)
    "residual": (["input.0", "relu1", "bn2", "relu2", "mean.0"], {"mean.0"}, {"fc"}),
    "bottleneck": (
        [
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
        {"pool"},
        {"fc"},
    ),
    "concat": (["input.0", "relu.0", "right"], set(), {"cat.0", "join"}),
    "functional": (["input.0", "relu.0", "b", "relu.1", "gelu.0", "mean.0"], {"mean.0"}, {"c", "fc"}),
    "tokens": (["input.0", "norm", "gelu.0", "fc2", "add.0", "mean.0"], set(), {"fc1", "head"}),
    "attention": (
        ["add.0", "norm", "query", "key", "value", "softmax.0", "matmul.1", "out"],
        {"softmax.0"},
        {"embed", "position", "matmul.0", "add.1"},
    ),
    "sdpa": (
        ["add.0", "norm", "query", "key", "scaled_dot_product_attention.0", "out"],
        set(),
        {"embed", "position", "value", "add.1"},
    ),
    "listed": (["input.0", "down.0.relu", "down.1.relu"], set(), {"down.2.relu"}),
    "twice": (["input.0", "relu", "relu.1"], set(), {"c"}),
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
    sites, extra, missing = EXPECTED[name]
    assert list(ours) == sites
    assert set(ours) - set(theirs) == extra
    assert set(theirs) - set(ours) == missing
    assert [n for n in ours if n in theirs] == [n for n in theirs if n in ours], "another order"


@pytest.mark.parametrize("name", MODELS)
def test_order_and_index(name: str) -> None:
    quantizers = [q for _, q in iter_quantizers(quantized(name))]
    assert [q.index for q in quantizers] == list(range(len(quantizers)))


def test_quantize_outputs_adds_the_output() -> None:
    assert site_list(quantized("residual", quantize_outputs=True)) == [*EXPECTED["residual"][0], "fc"]


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("residual", {"input.0": 1, "relu1": 1, "mean.0": 1}),
        # add.0 adds a Linear to the input: tokens, although the input alone would be taken for channels first
        ("tokens", {"norm": -1, "gelu.0": -1, "fc2": -1, "add.0": -1, "mean.0": 1}),
        ("attention", dict.fromkeys(EXPECTED["attention"][0], -1)),
        ("sdpa", dict.fromkeys(EXPECTED["sdpa"][0], -1)),
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
    """NNCF wants one scale; DQA's extra bits belong to channels, so only equal channels can share them."""
    import nncf

    from dqa_plugins.adapters.nncf import quantize
    from tests.adapters.nncf.models import Concat, config

    data = nncf.Dataset(batches("concat"))
    model = quantize(Concat(channels).eval(), data, config())
    assert site_list(model) == ["input.0", "relu.0", *([] if shared else ["right"])]
    direct = quantize(Concat(channels).eval(), data, config({"mode": "direct"}))
    assert site_list(direct) == ["input.0", "relu.0"], "per tensor, one scale for both"
    assert dict(iter_quantizers(direct))["relu.0"].signed, "the other branch has no ReLU"


def test_names_survive_copies() -> None:
    model = quantized("listed")
    assert site_list(copy.deepcopy(model)) == site_list(model)
