"""The benchmark of the packed KV cache, every part of it, with a small random model in place of SmolLM2."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from examples.benchmarks import kv_cache


class Letters:
    """A token for each of the first letters."""

    def __call__(self, text: str, return_tensors: str) -> Any:
        return SimpleNamespace(input_ids=torch.tensor([[2 + ord(c) % 95 for c in text[:30_000]]]))

    def decode(self, ids: torch.Tensor) -> str:
        return " ".join(map(str, ids.tolist()))


def small(_: Path | None) -> tuple[Any, Any]:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=48, intermediate_size=64, **heads)).eval(), Letters()


@pytest.mark.slow
def test_every_part_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(kv_cache, "load", small)
    monkeypatch.setattr(sys, "argv", ["kv_cache", "--json", "--quick", "--out", str(tmp_path)])
    try:
        kv_cache.main()
    finally:
        torch.set_num_threads(threads)
        kv_cache.set_threads(None)
    report = json.loads((tmp_path / "kv_cache.json").read_text())
    assert json.loads(capsys.readouterr().out) == report
    assert (tmp_path / "kv_cache.png").stat().st_size > 10_000
    rounded = {row["cache"]: row for row in report["rounded"]}
    assert rounded["token 4"]["bits"] == 4.5
    assert rounded["kivi 4"]["bits"] == 5.0
    # 252 tokens are three whole blocks and a rest; four tokens float
    assert 1.9 < rounded["ours 2.2"]["bits"] - 32 * 4 / 256 < 2.6
    held = {row["cache"]: row for row in report["held"]}
    assert held["float"]["bits_held"] == 32.0
    assert held["packed 2.2"]["bits_held"] < 16
    assert 1 < report["memory"]["float"] * 1e6 / (2 * 2 * 192 * 4 * 513) < 2.1  # a layer's concatenation besides
    assert set(report["speed"]["token_ratio_cpu"]) == {"packed 2.2"}
    assert len(report["text"]["packed 2.2"].split()) == 4
