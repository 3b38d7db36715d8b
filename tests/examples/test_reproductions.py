"""Small pieces of the reproductions: the arithmetic that they add to the package, and one quick pass of each kind."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from dqa_plugins import DQA, QPP, DenseSparse, Direct, NoisyQuant, functional, iter_quantizers
from dqa_plugins.metrics import IGNORED
from dqa_plugins.qpp import qpp_report
from examples.networks import others
from examples.reproductions import (
    common,
    datasets,
    dqa_figure2,
    dqa_table1,
    noisyquant_transformer,
    qpp_figures,
    qpp_guard,
    qpp_tables,
    qpp_toy,
    style,
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


@pytest.fixture
def weights(tmp_path: Path) -> Callable[[torch.nn.Module], Path]:
    """Saves the weights of a network."""
    from safetensors.torch import save_file

    def save(model: torch.nn.Module) -> Path:
        save_file(model.state_dict(), tmp_path / "weights.safetensors")
        return tmp_path / "weights.safetensors"

    return save


def pictures(folder: Path, names: Sequence[str], size: tuple[int, int], top: int = 255, grey: bool = False) -> None:
    """Random images of (height, width)."""
    from PIL import Image

    draw = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shape = size if grey else (*size, 3)
        Image.fromarray(draw.integers(0, top + 1, shape, dtype=np.uint8)).save(folder / name)


def test_resnet18_reads_imagenet(
    tmp_path: Path, weights: Callable[[torch.nn.Module], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The QPP paper's network on a folder of its format, cut to three classes."""
    pytest.importorskip("torchvision")
    pictures(tmp_path / "val", [f"n0{k}/{i}.jpg" for k in range(3) for i in range(2)], (40, 50))
    monkeypatch.setattr(workloads, "imagenet", lambda folder: datasets.imagenet(folder, classes=3))
    file = weights(others.torchvision_resnet("resnet18", trained=False))
    task = workload("resnet18", tmp_path, file, quick=True)
    assert task.real
    assert [tuple(x.shape) for x, _ in task.test] == [(3, 3, 224, 224)]
    assert len(task.draw(2, 0)[0]) == 2
    assert 0 <= task.score(task.model) <= 100


def test_hrnet_reads_cityscapes(
    tmp_path: Path, weights: Callable[[torch.nn.Module], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The QPP paper's network on a folder of its format; places of its four predictors."""
    pytest.importorskip("timm")
    for part in ("train", "val"):
        pictures(tmp_path / "leftImg8bit" / part / "ulm", [f"{k}_leftImg8bit.png" for k in range(2)], (64, 128))
        names = [f"{k}_gtFine_labelIds.png" for k in range(2)]
        pictures(tmp_path / "gtFine" / part / "ulm", names, (64, 128), top=33, grey=True)
    monkeypatch.setattr(workloads, "HRNET_SIZE", (32, 64))
    task = workload("hrnet", tmp_path, weights(others.HRNetSegmentation()), quick=True)
    assert set(task.scores(task.model)) == {"score", "pixel_accuracy"}
    monkeypatch.setattr(qpp_tables, "SAMPLES", 2)
    small = dataclasses.replace(task, calibration=2)
    model = qpp_tables.quantize(
        small, qpp_tables.method("Dense+Sparse", 4, qpp_tables.qparams_of("QPP, paper", "hrnet")), 0
    )
    read = {q.predictor.site for _, q in iter_quantizers(model)}
    assert read == {f"backbone.{s}" for s in ("act1", "transition1.1.0.2", "transition2.2.0.2", "transition3.3.0.2")}


def test_the_papers_own_networks_ask_for_data() -> None:
    with pytest.raises(ValueError, match="ResNet-18 has no stand-in"):
        workload("resnet18")


def test_shifting_divides_the_error_by_two_to_the_m() -> None:
    """Equations 2 and 4 of the DQA paper: |error| is delta * re on average, and delta / 2^m * re; re averages 1/4."""
    x = torch.rand(64, 1, 4096, generator=torch.Generator().manual_seed(0)) * 1.625 - 0.8125  # whole steps, no clamp
    bits, scale = 4, torch.tensor(1 / 8)
    for extra in range(4):
        codes, errors = functional.dqa_quantize(x, scale, torch.tensor([extra]), bits)
        found = (functional.dqa_dequantize(codes, errors, scale, torch.tensor([extra])) - x).abs()
        assert float(found.max()) <= float(scale) / 2**extra / 2 + 1e-6
        assert float(found.mean() / scale) == pytest.approx(0.25 / 2**extra, rel=0.01)


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
    dqa_table1.freeze(prepared, literal="")
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


def test_rows_are_written_as_they_come_and_measured_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def measure(bits: int, options: common.Options) -> dict[str, float]:
        calls.append(bits)
        if bits == 4:
            raise RuntimeError("cut off")
        return {"score": bits / 3}

    options = common.parse("", ["--out", str(tmp_path), "--no-progress", "--workers", "1"])
    with pytest.raises(RuntimeError):
        common.collect(measure, [{"bits": 2}, {"bits": 4}], options, "x")
    report = common.collect(measure, [{"bits": 2}, {"bits": 3}], options, "x", data="numbers")
    assert calls == [2, 4, 3]
    written = json.loads((tmp_path / "x.json").read_text())
    assert [row["score"] for row in written["rows"]] == [0.666667, 1.0]
    assert all(row["code"] == written["code"] for row in report["rows"])
    again = common.parse("", ["--out", str(tmp_path), "--no-progress", "--workers", "1", "--again"])
    common.collect(measure, [{"bits": 3}], again, "x")
    assert calls[-1] == 3
    assert len(json.loads((tmp_path / "x.json").read_text())["rows"]) == 2
    other = common.parse("", ["--out", str(tmp_path), "--no-progress", "--quick"])
    assert len(common.collect(measure, [{"bits": 2}], other, "x")["rows"]) == 1  # smaller sizes do not mix


def test_outliers_beyond_the_cap_are_clamped_nearest_first() -> None:
    x = torch.tensor([[0.5, 2.0, 3.0, -4.0, 1.5], [0.1, 0.2, 5.0, 0.3, 0.4]])
    found = qpp_guard.bounded(x, torch.tensor(-1.0), torch.tensor(1.0), 2)
    assert found.tolist() == [[0.5, 1.0, 3.0, -4.0, 1.0], [*x[1].tolist()]]


def test_guards_bound_the_density(task: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qpp_tables, "SAMPLES", 32)
    monkeypatch.setattr(qpp_guard, "workload", lambda *_, **__: task)
    options = common.Options(Path(), True, 1, 1, False, None, None, None)
    found = {a: qpp_guard.measure("resnet32", "static", a, 0, options)["shifted"] for a in qpp_guard.ACTIONS}
    assert found["none"]["over_limit"] > 5
    assert found["none"]["acted"] == 0
    for action in ("cap", "guard"):
        assert found[action]["largest_density"] <= 100 * qpp_guard.LIMIT * qpp_tables.DENSITY
        assert found[action]["acted"] > 5


def test_every_row_of_a_picture_has_the_colour_of_its_method() -> None:
    names = [*dqa_table1.settings(4, 0.4), *qpp_tables.FITTED, *noisyquant_transformer.methods(4)]
    for name in names:
        assert style.family(name) in name
    assert style.colour("DQA, literal") == style.colour("DQA, first best") == style.COLOURS["DQA"]
    assert style.colour("QPP, paper, same data") == style.COLOURS["QPP, paper"]
    with pytest.raises(KeyError, match="has no colour"):
        style.colour("AdaRound")
