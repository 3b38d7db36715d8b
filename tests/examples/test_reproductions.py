"""Small pieces of the reproductions: the arithmetic that they add to the package, and one quick pass of each kind."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dqa_plugins import DQA, QPP, DenseSparse, Direct, NoisyQuant, iter_quantizers
from dqa_plugins.metrics import IGNORED
from dqa_plugins.qpp import qpp_report
from examples.reproductions import (
    common,
    dqa_figure2,
    dqa_table1,
    noisyquant_transformer,
    qpp_figures,
    qpp_tables,
    qpp_toy,
    workloads,
)
from examples.reproductions.workloads import Workload, workload


@pytest.fixture(scope="module")
def task() -> Workload:
    """ResNet-32 on 32 test digits, calibrated on 32."""
    full = workload("resnet32", quick=True)
    inputs, targets = full.test[0]
    return dataclasses.replace(full, test=[(inputs[:32], targets[:32])], calibration=32, ranking=16)


def test_the_command_line_refuses_what_does_not_go_together(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path)]
    assert common.parse("", [*out, "--quick"], runs=(5, 3)).runs == 3
    for arguments in (["--runs", "0"], ["--weights", "a"], ["--data", "a"]):
        with pytest.raises(SystemExit):
            common.parse("", [*out, *arguments], networks=("unet",))


def test_reports_are_json_with_means_and_deviations(tmp_path: Path) -> None:
    options = common.parse("", ["--out", str(tmp_path)])
    found = common.mean_std([1.0, 3.0])
    assert (found.mean, found.std) == (2.0, math.sqrt(2))
    path = common.write(options, "name", {"cell": found}, 0.0)
    assert json.loads(path.read_text())["cell"] == {"mean": 2.0, "std": math.sqrt(2)}


def test_ignored_pixels_do_not_count() -> None:
    outputs = torch.tensor([[[[2.0, 0.0, 0.0]], [[0.0, 1.0, 1.0]]]])  # classes 0, 1, 1
    targets = torch.tensor([[[0, 1, IGNORED]]])
    assert workloads.mean_iou(torch.nn.Identity(), [(outputs, targets)]) == 100
    targets = torch.tensor([[[0, 1, 0]]])
    assert workloads.mean_iou(torch.nn.Identity(), [(outputs, targets)]) == 50


def test_shifted_exposure_keeps_grey_levels_in_range(task: Workload) -> None:
    mean, std = task.grey
    ((shifted, _),) = task.shifted()
    grey = shifted * std + mean
    assert -1e-6 <= float(grey.min()) <= float(grey.max()) <= 1 + 1e-6
    assert torch.equal(task.shifted()[0][0], shifted)


def test_weights_are_asked_for_with_a_data_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give --weights"):
        workload("unet", tmp_path)
    with pytest.raises(ValueError, match="no workload"):
        workload("vgg")


@pytest.mark.parametrize("method", [Direct.paper(3), DQA.paper(3)])
def test_literal_codes_are_those_of_the_paper_in_integers(method: Direct | DQA) -> None:
    """One scale per batch, nothing clamped: code = round(x / delta) in n bits, or n + m on important channels."""
    x = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))
    extra = torch.tensor([3, 0]) if isinstance(method, DQA) else torch.tensor([0, 0])
    delta = np.float32(x.abs().max()) / np.float32(4)
    step = delta / np.array([[[2.0 ** int(m)] for m in extra]], np.float32)
    expected = np.round(x.numpy() / step) * step
    assert np.array_equal(dqa_table1.Literal(method, extra)(x).numpy(), expected)
    assert expected.max() == x.max() or expected.min() == x.min()  # max|A| keeps its value


def test_one_row_of_table_1(task: Workload) -> None:
    setting = dqa_table1.settings(3, task.ratio)["DQA, literal"]
    prepared = dqa_table1.calibrated(task, setting.method, seed=0)
    bits = dqa_table1.stored_bits(prepared, setting, task)
    dqa_table1.freeze(prepared, setting.literal)
    assert 4 < bits < 3 + 3 * 0.45 + 1.2
    assert 0 <= task.score(prepared) <= 100
    names = set(dqa_table1.settings(2, 0.4))
    assert {"Direct", "NoisyQuant", "DQA"} <= names


def test_shift_errors_are_counted_once_each(task: Workload) -> None:
    prepared = dqa_table1.calibrated(task, DQA.paper(3, ratio=0.5), 0)
    dqa_table1.freeze(prepared, literal=False)
    inputs = task.test[0][0]
    found = dqa_figure2.shift_errors(prepared, inputs)
    name, quantizer = next(iter_quantizers(prepared))
    everything, nonzero = found[name]
    assert everything.shape == (len(inputs), 8)
    assert everything.sum() == len(inputs) * int((quantizer.extra_bits > 0).sum()) * 16 * 16
    assert (nonzero <= everything).all()


def test_entropy_and_huffman_of_known_counts() -> None:
    assert dqa_figure2.entropy(np.array([4, 2, 1, 1])) == 1.75
    counts = np.array([4000, 2000, 1000, 1000])
    assert dqa_figure2.huffman(counts, counts) == 1.75
    assert dqa_figure2.huffman(counts, np.ones(4)) == 2


def test_equation_10_is_the_recursion_of_equations_8_and_9() -> None:
    model = qpp_toy.build(divisor=16, seed=0)
    for layer in qpp_toy.SHOWN:
        closed, stepwise = qpp_toy.predicted_slope(model, layer)
        assert closed == pytest.approx(stepwise, rel=1e-12)
    assert qpp_toy.sizes(1) == [784, 3088, 2832, 2576, 2320, 2064, 1808, 1552, 1296, 1040, 784]


def test_equation_10_holds_on_average_over_untrained_networks() -> None:
    """Width 193 to 49: one draw scatters, the mean of 30 lies within a few of its standard errors (seeded)."""
    inputs = torch.rand(8, 49, generator=torch.Generator().manual_seed(0))
    ratios = []
    for seed in range(30):
        model = qpp_toy.build(divisor=16, seed=seed)
        slope = qpp_toy.predicted_slope(model, 4)[0]
        square = inputs.double().square().mean(1)
        ratios.append(float((qpp_toy.variances(model, inputs)[4] / (slope * square)).mean()))
    assert np.mean(ratios) == pytest.approx(1, abs=4 * np.std(ratios) / math.sqrt(30))


def test_a_perfect_threshold_has_the_target_density() -> None:
    assert qpp_figures.gaussian_density(0.0) == pytest.approx(0.01, rel=1e-9)
    assert qpp_figures.gaussian_density(-0.3) == pytest.approx(0.0517, abs=1e-4)  # the paper: up to 6%


def test_one_predicted_row_of_the_qpp_tables(task: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qpp_tables, "SAMPLES", 32)
    chosen = qpp_tables.method("Dense+Sparse", 4, qpp_tables.qparams_of("QPP, paper", "resnet32"))
    assert chosen == DenseSparse(bits=4, qparams=QPP(mode="paper"))
    assert qpp_tables.method("standard", 8, "static") == Direct(bits=8, symmetric=False, reduce="mean")
    model = qpp_tables.quantize(task, chosen, 0)
    assert next(name for name, _ in iter_quantizers(model)) == "relu1"  # the first convolution stays float
    found = qpp_tables.rates(qpp_report(model, qpp_tables.density_samples(task, task.test)))
    assert found["dynamic FR(1)"] <= found["static FR(1)"]
    assert 0 <= found["predicted FR(1)"] <= found["predicted FR(0.5)"] <= 100


def test_only_what_the_convolutions_of_espcn_read_is_quantized() -> None:
    pytest.importorskip("skimage")
    espcn = dataclasses.replace(workload("espcn", quick=True), calibration=1)
    draw = espcn.draw
    small = dataclasses.replace(espcn, draw=lambda count, seed: draw(2, seed))
    model = qpp_tables.quantize(small, qpp_tables.method("Dense+Sparse", 4, "dynamic"), 0)
    assert [name for name, _ in iter_quantizers(model)] == ["input.0", "relu1", "relu2"]


def test_noise_is_searched_on_the_output_of_a_linear_layer() -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)]
    model = noisyquant_transformer.place(torch.nn.Sequential(*layers), NoisyQuant.official(4, clip_steps=20))
    (layer,) = noisyquant_transformer.layers(model)
    with torch.no_grad():
        model(torch.randn(16, 3, 4))
        layer.quantizer.freeze(layer.linear.weight)
        model(torch.randn(16, 3, 4))
    assert 0 < layer.errors[0] < 0.2
