"""The command line gives what the calls give, as text and as JSON, with exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dqa_plugins import DQA, Direct, iter_quantizers, method_to_dict, rank_channels
from dqa_plugins.cli.__main__ import main
from dqa_plugins.cli.networks import method
from dqa_plugins.errors import DQAError
from dqa_plugins.export import onnxruntime_session
from dqa_plugins.report import activation_report
from dqa_plugins.storage import pack
from tests.cli.factories import converted

HERE = "tests.cli.factories"


def run(capsys: pytest.CaptureFixture[str], *arguments: Any, code: int = 0) -> tuple[str, str]:
    assert main([str(argument) for argument in arguments]) == code
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_inspect_a_packed_frame(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, x = converted()
    packed = pack(x, next(iter(iter_quantizers(model)))[1], coding="joint")
    path = tmp_path / "frame"
    path.write_bytes(packed.to_bytes())
    found = json.loads(run(capsys, "inspect", path, "--json")[0])
    assert (found["shape"], found["coding"], found["bytes"]) == (list(x.shape), "joint", packed.nbytes)
    path.write_bytes(packed.to_bytes()[:-3])
    assert "truncated" in run(capsys, "inspect", path, code=2)[1]


def test_inspect_a_rank_table_a_method_and_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = converted()
    table = rank_channels(model, strategy="random", progress=False)
    table.save(tmp_path / "ranks.json")
    assert json.loads(run(capsys, "inspect", tmp_path / "ranks.json", "--json")[0]) == table.to_dict()
    (tmp_path / "method").write_text(json.dumps(method_to_dict(DQA(bits=3))))
    assert run(capsys, "inspect", tmp_path / "method")[0].strip() == "DQA(bits=3)"
    config = {
        "compression": {"algorithm": "quantization", "activations": {"mode": "dqa", "bits": 5}, "skip": ["first"]}
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = json.loads(run(capsys, "inspect", tmp_path / "config.json", "--json")[0])
    assert (found["activations"], found["skip"]) == ("DQA(bits=5)", ["first"])


@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_inspect_saved_quantizers(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = converted()
    state = {key: value for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    path = tmp_path / "state"
    if form == "pt":
        torch.save(state, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(state, path)
    found = json.loads(run(capsys, "inspect", path, "--json")[0])["quantizers"]
    assert len(found) == len(list(iter_quantizers(model)))
    assert {row["method"] for row in found} == {"DQA(bits=4)"}
    assert {row["state"] for row in found} == {"frozen"}


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"{}", b"[1]", b"PK\x03\x04", b"DQAP", b"[" * 100_000, b"12345678{"]
)
def test_inspect_what_is_not_ours(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_bytes(content)
    out, err = run(capsys, "inspect", tmp_path / "file", code=2)
    assert not out
    assert err.startswith("dqa-plugins inspect: ")
    assert "No such file" in run(capsys, "inspect", tmp_path / "missing", code=2)[1]


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    packages = {row["package"]: row for row in found["packages"]}
    assert packages["torch"]["verdict"] == "as tested"
    assert {"numpy", "numba", "torchao", "brevitas", "nncf"} <= set(packages)
    assert code == int(any(row["verdict"] in ("MISSING", "NOT TESTED") for row in found["packages"]))
    main(["doctor"])
    assert "torch threads" in capsys.readouterr().out


def test_compare(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "compare", f"{HERE}:network", "direct:bits=8", "dqa:bits=3,granularity=channel", "--json")
    rows = json.loads(out)["rows"]
    assert [row["name"] for row in rows] == ["float", "direct:bits=8", "dqa:bits=3,granularity=channel"]
    assert rows[0]["score"] > rows[1]["score"] > rows[2]["score"]
    out, _ = run(capsys, "compare", f"{HERE}:network", "noisyquant:objective=output", "--room", "brevitas", code=1)
    assert "UnsupportedCombination" in out


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    """A method that cannot be had has no score."""
    out, _ = run(
        capsys, "compare", f"{HERE}:network", "noisyquant:objective=output", "--room", "brevitas", "--json", code=1
    )
    row = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["rows"][1]
    assert row["score"] is None
    assert row["failed"].startswith("UnsupportedCombination")


def test_an_exception_of_the_network_has_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    err = run(capsys, "export", f"{HERE}:broken", "model.onnx", code=3)[1]
    assert "ZeroDivisionError" in err
    assert "factories.py" in err


def test_methods_as_text() -> None:
    assert method("dqa:bits=3,granularity=channel,ratio=0.5") == DQA(bits=3, granularity="channel", ratio=0.5)
    assert method("direct:clip=0.999,signed=true,symmetric=True") == Direct(clip=0.999, signed=True)
    assert method("dense_sparse:qparams=qpp").source == "predicted"
    for wrong in ("dqaa", "dqa:bits", "dqa:bits=x", "dqa:colour=red", ""):
        with pytest.raises(DQAError):
            method(wrong)


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_export(ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, x = converted()
    path = tmp_path / f"model.{ending}"
    found = json.loads(run(capsys, "export", f"{HERE}:converted", path, "--json")[0])
    assert found["bytes"] == path.stat().st_size
    got = onnxruntime_session(path)(x)[0] if ending == "onnx" else torch.export.load(path).module()(x)
    assert torch.allclose(got, model(x), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export", f"{HERE}:converted", "model.txt"), r"\.onnx, \.xml or \.pt2"),
        (("export", f"{HERE}:nothing", "model.onnx"), "returned a NoneType"),
        (("export", "nowhere:at_all", "model.onnx"), "No module named 'nowhere'"),
        (("export", "tests.cli.factories", "model.onnx"), "module:function"),
        (("compare", f"{HERE}:network", "dqa", "--room", "tensorflow"), "no such adapter"),
        (("compare", f"{HERE}:network", "dqa:bits=99"), "bits=99"),
    ],
)
def test_errors_are_one_sentence(arguments: Any, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(capsys, *arguments, code=2)
    assert not out

    assert re.search(message, err)
    assert "Traceback" not in err


@pytest.mark.slow
def test_as_a_program() -> None:
    command = [sys.executable, "-m", "dqa_plugins.cli"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(name in shown for name in ("inspect", "doctor", "compare", "export"))
    assert subprocess.run([*command, "inspect", "/nowhere"], capture_output=True, check=False).returncode == 2
    assert subprocess.run(command, capture_output=True, check=False).returncode == 2


def test_what_it_compares_is_what_the_report_says(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "compare", f"{HERE}:network", "dqa:bits=4", "--json")
    model, x = converted()
    assert json.loads(out)["rows"][1]["bits"] == activation_report(model, [x]).bits_per_activation
