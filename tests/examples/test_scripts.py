"""The demo and the script of each framework, from end to end on a few images: they run, and say what is true."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from examples import brevitas_digits, demo, fx_digits, minilm_tokens, nncf_efficientnet, pt2e_digits, vit_tokens
from examples.networks.digits import DigitsSplit, calibration_subset, load_split
from examples.networks.minilm import SentenceEncoder
from examples.networks.photos import photo_crops

slow = pytest.mark.slow


def few() -> DigitsSplit:
    """64 training and 64 test digits."""
    split = load_split()
    return DigitsSplit(
        *(getattr(split, field.name)[:64].clone() for field in dataclasses.fields(split)),
    )


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Gives a script few digits."""

    def shrink(script: Any) -> None:
        monkeypatch.setattr(script, "load_split", few)
        monkeypatch.setattr(script, "calibration_subset", lambda split, count: calibration_subset(split, 32))

    return shrink


def percentages(text: str) -> dict[str, float]:
    """{what a line begins with: its percentage}."""
    return {name: float(value) for name, value in re.findall(r"^(.*?):? ([0-9.]+) ?%", text, re.MULTILINE)}


@slow
def test_fx(small: Callable[[Any], None], capsys: pytest.CaptureFixture[str]) -> None:
    small(fx_digits)
    fx_digits.main()
    text = capsys.readouterr().out
    scores = percentages(text)
    assert scores["float"] > 95
    assert scores["quantized"] > 85
    assert re.search(r"blocks\.0\.relu1 +DenseSparse", text)
    assert re.search(r"blocks\.14\.relu2 +Direct", text)
    assert int(re.search(r"same answer on (\d+) of 64", text).group(1)) >= 62


@slow
def test_pt2e(small: Callable[[Any], None], capsys: pytest.CaptureFixture[str]) -> None:
    small(pt2e_digits)
    pt2e_digits.main()
    text = capsys.readouterr().out
    assert percentages(text)["float"] > 95
    assert "the saved program gives the same outputs for all 64 images" in text


@slow
def test_brevitas(small: Callable[[Any], None], capsys: pytest.CaptureFixture[str]) -> None:
    small(brevitas_digits)
    brevitas_digits.main()
    text = capsys.readouterr().out
    assert set(percentages(text)) == {"float", "DQA, 2 bits", "after one epoch"}
    assert int(re.search(r"same answer on (\d+) of 64", text).group(1)) >= 62


@slow
def test_nncf(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """36 of 42 crops of 64 pixels, one setting."""
    monkeypatch.setattr(nncf_efficientnet, "photo_crops", lambda per_photo: photo_crops(6, size=64))
    monkeypatch.setattr(nncf_efficientnet, "SETTINGS", [{"mode": "direct", "bits": 8}])
    nncf_efficientnet.main()
    torch_line, openvino_line = capsys.readouterr().out.splitlines()[-2:]
    assert "'bits': 8" in torch_line
    assert openvino_line == "OpenVINO: 100.0% of 10 crops as in torch"


@slow
def test_vit(small: Callable[[Any], None], capsys: pytest.CaptureFixture[str]) -> None:
    small(vit_tokens)
    vit_tokens.main(bits=(6,))
    scores = percentages(capsys.readouterr().out)
    assert list(scores) == ["float", *(f"6 bits, {m}" for m in ("Direct", "NoisyQuant", "DQA", "DenseSparse"))]
    assert min(scores.values()) > 85


def test_minilm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With a tiny encoder: the trained one is 84 MB."""

    def tiny() -> tuple[SentenceEncoder, Callable[[list[str]], tuple[Tensor, Tensor]]]:
        torch.manual_seed(0)
        model = SentenceEncoder(words=200, channels=24, heads=2, hidden=32, layers=1, positions=32).eval()

        def tokenize(sentences: list[str]) -> tuple[Tensor, Tensor]:
            ids = torch.randint(1, 200, (len(sentences), 8), generator=torch.Generator().manual_seed(0))
            return ids, torch.ones(ids.shape)

        return model, tokenize

    monkeypatch.setattr(minilm_tokens, "minilm", tiny)
    monkeypatch.setattr(minilm_tokens, "sentences", lambda count: ["a sentence"] * 40)
    minilm_tokens.main(bits=(8,))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    for line in lines:
        assert float(re.search(r"cosine ([0-9.]+)", line).group(1)) > 0.95, line


def test_sentences_are_what_scikit_learn_says() -> None:
    assert minilm_tokens.sentences(3) == minilm_tokens.sentences(5)[:3]
    assert all(minilm_tokens.sentences(5))


def test_the_nearest_other_sentence() -> None:
    embeddings = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), dim=1)
    assert minilm_tokens.nearest(embeddings).tolist() == [1, 0, 1]


@slow
def test_a_row_of_the_demo(small: Callable[[Any], None]) -> None:
    small(demo)
    row = demo.measure("Dense+Sparse", 4)
    assert row["accuracy"] > 95
    assert row["ort_same_top1"] > 95
    assert 4 < row["bits_per_activation"] < 5


def test_the_demos_table_plot_and_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is made of the rows, whatever their order; the rows are made up."""

    def measure(name: str, bits: int) -> dict[str, Any]:
        row = {"method": name, "bits": bits, "bits_per_activation": bits + 0.5, "accuracy": 90.0 + bits}
        row |= {"agreement_fp32": 91.0, "sites_with_noise": 7 if name == "NoisyQuant" else 0}
        if name in demo.EXPORTED:
            row |= {"ort_same_top1": 100.0, "ort_median_difference": 0.0, "ort_max_difference": 1e-6}
        return row

    monkeypatch.setattr(demo, "measure", measure)
    monkeypatch.setattr(demo, "load_split", few)
    monkeypatch.setattr(demo, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
    demo.main(["--out", str(tmp_path), "--bits", "3", "4", "--no-progress"])
    report = json.loads((tmp_path / "demo.json").read_text())
    assert [(r["method"], r["bits"]) for r in report["rows"]] == [(n, b) for b in (3, 4) for n in demo.variants(b)]
    assert report["fp32_accuracy"] > 95
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    text = capsys.readouterr().out
    assert text.count("NoisyQuant, signed") == 2
    assert "NoisyQuant, 4 bits: a noise that lowers the error at 7 sites." in text
