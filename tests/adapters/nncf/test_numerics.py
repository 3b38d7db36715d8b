"""A site computes what a bare ActivationQuantizer computes, bit for bit, whatever NNCF does around it."""

from __future__ import annotations

from typing import Any

import nncf
import pytest
import torch
from torch import Tensor, nn

from dqa_plugins import DQA, DenseSparse, Direct, Method, NoisyQuant, iter_quantizers, method_to_dict
from dqa_plugins.adapters.nncf import quantize
from dqa_plugins.errors import ChannelMismatch, NonFiniteInput, UncalibratedQuantizer, UnsupportedInput
from tests.adapters.nncf.models import (
    bare,
    batches,
    build,
    config,
    inputs_of_quantizers,
    outputs_of_modules,
    quantized,
)
from tests.compare import assert_exact, same_bits

METHODS: list[Method] = [
    kind(bits=bits, qparams=source, granularity=granularity, **fields)
    for kind, bits, fields in [
        (Direct, 4, {}),
        (Direct, 5, {"symmetric": False}),
        (Direct, 3, {"clip": "mse"}),
        (DQA, 3, {"ratio": 0.5}),
        (DQA, 4, {"reduce": "mean"}),
        (NoisyQuant, 4, {"seed": 7}),
        (DenseSparse, 4, {"density": 0.05}),
    ]
    for source in ("static", "dynamic")
    for granularity in ("tensor", "channel")
]

# sites whose float tensor is the output of a module, so that torch's own hooks can record it
MODULE_SITES = {"residual": ["relu1", "bn2", "relu2"], "tokens": ["norm", "fc2"]}
CASES = [("residual", m) for m in METHODS] + [("tokens", m) for m in METHODS if m.granularity == "channel"]


def fields_of(method: Method) -> dict[str, Any]:
    fields = method_to_dict(method)
    return {"mode": fields.pop("method"), **fields}


@pytest.mark.parametrize(
    ("model", "method"), CASES, ids=[f"{n}-{m.name}-{m.qparams}-{m.granularity}-{m.bits}" for n, m in CASES]
)
def test_a_site_equals_a_bare_quantizer(model: str, method: Method) -> None:
    """Calibrated on what the float model gives, fed what the site is fed: torch.equal."""
    converted = quantized(model, fields_of(method))
    quantizers = dict(iter_quantizers(converted))
    data = outputs_of_modules(build(model), MODULE_SITES[model], batches(model))
    for site, seen in inputs_of_quantizers(converted, batches(model, seed=5)[0]).items():
        if site in data:
            reference = bare(method, site, data[site], quantizers[site].producer_axis)
            assert_exact(quantizers[site](seen[0]), reference(seen[0]), site)
            for name, buffer in reference.named_buffers():
                assert same_bits(dict(quantizers[site].named_buffers())[name], buffer), f"{site}.{name}"


@pytest.mark.parametrize("method", METHODS[::3], ids=lambda m: f"{m.name}-{m.qparams}-{m.granularity}-{m.bits}")
def test_a_site_equals_the_fx_adapters(method: Method) -> None:
    """The same float model and data through the two adapters: the same decisions and the same output."""
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    from dqa_plugins.adapters.fx import get_qconfig_mapping

    data = batches("listed")  # no batch norm: FX would fold it into the convolution, and change the tensors
    prepared = prepare_fx(build("listed"), get_qconfig_mapping(method, weight_bits=None), (data[0],))
    for x in data:
        prepared(x)
    theirs = dict(iter_quantizers(convert_fx(prepared)))
    ours = dict(iter_quantizers(quantized("listed", fields_of(method))))
    assert set(ours) == set(theirs) - {"down.2.relu"}
    x = torch.randn(2, 8, 8, 8)
    for site, quantizer in ours.items():
        tensor = x[:, :3] if site == "input.0" else x.relu()
        assert_exact(quantizer(tensor), theirs[site](tensor), site)


def test_static_scale_is_the_maximum_over_samples_not_the_mean_of_maxima() -> None:
    data = [torch.full((1, 3, 8, 8), 1.0), torch.full((1, 3, 8, 8), 7.0)]
    model = quantize(build("residual"), nncf.Dataset(data), config({"mode": "direct", "bits": 4}))
    quantizer = dict(iter_quantizers(model))["input.0"]
    assert float(quantizer.scale) == 7.0 / 2**4  # NNCF's default would be (1 + 7) / 2
    assert not quantizer.signed


def test_outputs_of_relu_are_unsigned() -> None:
    signed = {n: q.signed for n, q in iter_quantizers(quantized("residual"))}
    assert signed == {"input.0": True, "relu1": False, "bn2": True, "relu2": False, "mean.0": False}
    assert not dict(iter_quantizers(quantized("bottleneck")))["blocks.0.depth.2"].signed


@pytest.mark.parametrize(
    ("wanted", "batch", "peak"), [(1, 1, 1.0), (3, 2, 3.0), (4, 4, 4.0), (5, 2, 5.0), (None, 3, 8.0)]
)
def test_num_init_samples_counts_samples(wanted: int | None, batch: int, peak: float) -> None:
    """Sample k has the value k everywhere, so the scale tells how many were seen, whatever the batch size."""
    samples = torch.arange(1.0, 9.0).reshape(8, 1, 1, 1).expand(8, 3, 8, 8)
    initializer = {} if wanted is None else {"initializer": {"range": {"num_init_samples": wanted}}}
    entry = config({"mode": "direct"}, **initializer)
    for item in (lambda x: x, lambda x: (x,), lambda x: {"x": x}):
        dataset = nncf.Dataset([item(x) for x in samples.split(batch)])
        model = quantize(build("residual"), dataset, entry)
        assert float(dict(iter_quantizers(model))["input.0"].scale) * 16 == peak


def test_too_few_samples_are_said(caplog: pytest.LogCaptureFixture) -> None:
    entry = config(initializer={"range": {"num_init_samples": 100}})
    quantize(build("residual"), nncf.Dataset(batches("residual")), entry)
    assert "num_init_samples=100, but the dataset holds 8 samples" in caplog.text


def test_a_dataloader_with_a_transform() -> None:
    """Not only lists: NNCF's Dataset around a loader of (input, label) pairs."""
    data = torch.utils.data.TensorDataset(torch.cat(batches("residual")), torch.arange(8))
    dataset = nncf.Dataset(torch.utils.data.DataLoader(data, batch_size=3), lambda item: item[0])
    model = quantize(build("residual"), dataset, config({"mode": "direct"}))
    expected = dict(iter_quantizers(quantized("residual", {"mode": "direct"})))
    for site, quantizer in iter_quantizers(model):
        assert torch.allclose(quantizer.scale, expected[site].scale, rtol=1e-5)


def test_the_model_is_left_alone() -> None:
    model = build("residual").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    converted = quantize(model, nncf.Dataset(batches("residual")), config(weights={}))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    assert not converted.training
    assert type(model.forward).__name__ == "method"


def test_calibration_leaves_batch_norm_statistics_alone() -> None:
    model = quantize(build("residual").train(), nncf.Dataset(batches("residual")), config())
    assert torch.equal(model.bn1.running_mean, build("residual").bn1.running_mean)


def test_empty_dataset() -> None:
    with pytest.raises(UncalibratedQuantizer, match="the dataset is empty"):
        quantize(build("residual"), nncf.Dataset([]), config())


class Forgetful(nn.Module):
    """The second convolution runs only at first: NNCF sees it in its graph, calibration does not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.runs = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        x = self.a(x)
        return self.b(x.relu()) if self.runs <= 3 else x


def test_a_site_without_data_is_named() -> None:
    with pytest.raises(UncalibratedQuantizer, match=r"'relu\.0' \(DQA, 4 bits\): no calibration item reached"):
        quantize(Forgetful().eval(), nncf.Dataset(batches("residual")), config())


def test_not_finite_calibration_data_names_the_site() -> None:
    data = batches("residual")
    data[2][0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteInput, match=r"'input\.0'.*1 NaN"):
        quantize(build("residual"), nncf.Dataset(data), config())


def test_wrong_arguments() -> None:
    with pytest.raises(UnsupportedInput, match=r"nncf\.Dataset\(\.\.\.\)"):
        quantize(build("residual"), batches("residual"), config())  # type: ignore[arg-type]
    with pytest.raises(UnsupportedInput, match=r"quantized already \('input\.0'"):
        quantize(quantized("residual"), nncf.Dataset(batches("residual")), config())
    with pytest.raises(UnsupportedInput, match=r"torch\.nn\.Module; got a str"):
        quantize("model.xml", nncf.Dataset(batches("residual")), config())  # type: ignore[arg-type]


def test_another_number_of_channels_is_named() -> None:
    quantizer = dict(iter_quantizers(quantized("residual")))["relu1"]
    with pytest.raises(ChannelMismatch, match="'relu1'"):
        quantizer(torch.randn(1, 4, 8, 8))


@pytest.mark.parametrize("source", ["static", "dynamic"])
def test_batch_independence(source: str) -> None:
    model = quantized("residual", {"mode": "dqa", "qparams": source})
    x = torch.cat(batches("residual", seed=9))
    for site, seen in inputs_of_quantizers(model, x).items():
        quantizer = dict(iter_quantizers(model))[site]
        alone = torch.cat([quantizer(sample) for sample in seen[0].split(1)])
        assert_exact(quantizer(seen[0]), alone, site)


def test_token_ids_and_sequence_lengths() -> None:
    """Integer inputs get no quantizer; tokens may have another length than in calibration."""
    model = quantized("attention", {"mode": "dqa", "bits": 4})
    assert model(torch.randint(0, 50, (3, 6))).shape == (3, 6, 16)
    # nothing is before the input: its channels are axis 1 unless told otherwise
    tokens = quantized("tokens", scope_overrides={"activations": {"input.0": {"channel_axis": -1}}})
    assert tokens(torch.randn(2, 9, 16)).shape == (2, 4)


def test_gradients_pass_through() -> None:
    model = quantized("residual", weights={}).train()
    model(batches("residual")[0]).sum().backward()
    for name, parameter in model.named_parameters():
        if name.startswith(("conv", "fc")):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
    assert all(q.state == "frozen" for _, q in iter_quantizers(model))
