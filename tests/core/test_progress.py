"""Bars come where a call takes longer than it may in silence, and nowhere else."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from dqa_plugins import Direct, progress
from dqa_plugins.adapters.fx import quantize_model
from dqa_plugins.report import activation_report


def test_a_short_call_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.counted(range(3), what="counting", unit="number")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_a_call_without_steps_counts_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.05)

    @progress.busy("thinking")
    def think() -> None:
        time.sleep(0.3)

    think()
    assert "thinking" in capsys.readouterr().err
    with progress.Progress(3, False, what="a caller that wants no bar", unit="step"):
        think()
        assert len(list(progress.counted([1, time.sleep(0.1)], what="counting", unit="number"))) == 2
    assert capsys.readouterr().err == ""


def test_a_long_one_shows_what_it_does(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.05)

    def slowly() -> Iterator[torch.Tensor]:
        for _ in range(3):
            time.sleep(0.2)
            yield torch.ones(2, 1, 4, 4)

    quantized = quantize_model(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()).eval(), Direct(bits=4), slowly())
    assert "calibrating" in capsys.readouterr().err
    activation_report(quantized, slowly())
    assert "activation_report" in capsys.readouterr().err
