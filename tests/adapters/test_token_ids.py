"""Token ids in all four adapters: integers are never quantized, the embedding is a site, its channels come last.

In NNCF 3.4 the embedding of a word is a weight, and the first site is its sum with the position (`add.0`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dqa_plugins import DQA, iter_quantizers
from tests.matrix.rooms import ROOMS

METHOD = DQA(bits=4, granularity="channel")


class Encoder(nn.Module):
    """An embedding and positions, a post-norm transformer block, a classifier: (B, T) int64 to (B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(13, 8), nn.Parameter(torch.randn(5, 8))
        self.query, self.key, self.value, self.project = (nn.Linear(8, 8) for _ in range(4))
        self.norm1, self.up, self.gelu, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)
        self.start, self.head = nn.Identity(), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.start(self.words(ids) + self.positions)
        weights = torch.softmax(torch.matmul(self.query(x), self.key(x).transpose(1, 2)), dim=-1)
        x = self.norm1(x + self.project(torch.matmul(weights, self.value(x))))
        x = x + self.down(self.gelu(self.up(x)))
        return self.head(x.mean(1))


def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder().eval()


def ids(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 13, (count, 5), generator=torch.Generator().manual_seed(seed))


def fx(model: nn.Module) -> Any:
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    from dqa_plugins.adapters.fx import get_qconfig_mapping

    prepared = prepare_fx(model, get_qconfig_mapping(METHOD, weight_bits=None), (ids(6),))
    prepared(ids(6))
    return convert_fx(prepared)


def pt2e(model: nn.Module) -> Any:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    from dqa_plugins.adapters.pt2e import PluginQuantizer

    exported = torch.export.export(model, (ids(6),), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    prepared = prepare_pt2e(exported, PluginQuantizer(weight_bits=None).set_global(METHOD))
    prepared(ids(6))
    return convert_pt2e(prepared)


def brevitas(model: nn.Module) -> Any:
    from brevitas.graph.calibrate import calibration_mode

    from dqa_plugins.adapters.brevitas import substitute_layers

    # Brevitas 0.13 has no output_quant on an embedding: the identity behind the sum holds the quantizer
    model.down = nn.Sequential(model.down, nn.Identity())
    substitute_layers(model, {nn.Identity: METHOD, nn.GELU: METHOD})
    with calibration_mode(model):
        model(ids(6))
    return model.eval()


def nncf(model: nn.Module) -> Any:
    import nncf as host

    from dqa_plugins.adapters.nncf import quantize

    activations = {"mode": "dqa", "bits": 4, "granularity": "channel"}
    config = {"compression": {"algorithm": "quantization", "activations": activations}}
    return quantize(model, host.Dataset([ids(6)]), config)


CONVERT = {"fx": fx, "pt2e": pt2e, "brevitas": brevitas, "nncf": nncf}


def test_every_adapter_is_here() -> None:
    assert set(CONVERT) == set(ROOMS)


@pytest.mark.parametrize("adapter", CONVERT)
def test_ids_stay_and_the_embedding_is_a_site(adapter: str) -> None:
    first = "start" if adapter == "brevitas" else "words"
    with torch.no_grad():
        model = CONVERT[adapter](encoder())
        # in Brevitas the site is the identity behind the layer
        sites = {name.removesuffix(".1"): quantizer for name, quantizer in iter_quantizers(model)}
        seen: dict[str, list[Tensor]] = {name: [] for name in sites}
        for name, quantizer in sites.items():
            quantizer.register_forward_pre_hook(lambda _m, args, name=name: seen[name].append(args[0]))
        output, expected = model(ids(9, seed=1)), encoder()(ids(9, seed=1))
    assert "input.0" not in sites
    assert all(len(xs) == 1 and xs[0].is_floating_point() for xs in seen.values()), "integers were quantized"
    assert next(iter(sites)) == first
    for name, channels in {first: 8, "gelu": 12, "down": 8}.items():
        assert sites[name].channel_axis in (-1, 2), name
        assert sites[name].num_channels == channels, name
    model = encoder()
    table = model.words.weight if first == "words" else model.words.weight[:, None] + model.positions
    rows = [table[i] if first == "words" else table[i, range(5)] for i in (ids(6), ids(9, seed=1))]
    assert torch.equal(seen[first][0], rows[1])
    assert torch.equal(sites[first].scale, rows[0].abs().amax((0, 1)) / 8), "one scale per channel of the embedding"
    assert not torch.equal(output, expected)
    assert (output - expected).abs().max() < 0.5
