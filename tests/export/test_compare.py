"""compare_backends: what fails is reported, NaN never passes, rows need not be samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dqa_plugins import ActivationQuantizer, Direct, Method
from dqa_plugins.errors import ExportFailed, InvalidArgument, MissingDependency, missing
from dqa_plugins.export import compare_backends, runners
from dqa_plugins.export.compare import Comparison
from dqa_plugins.export.parity import largest


class Two(nn.Module):
    """Two sites; the second has `rows` rows for each sample."""

    def __init__(self, rows: int = 1, method: Method | None = None) -> None:
        super().__init__()
        self.rows = rows
        self.a, self.b = (ActivationQuantizer(method or Direct(), name=name) for name in "ab")

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).reshape(-1, x.shape[1] // self.rows) * 1.37)
        return y.reshape(x.shape[0], -1)


def two(rows: int = 1) -> tuple[Two, Tensor]:
    model, x = Two(rows), torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    model(x)
    model.a.freeze()
    model.b.freeze()
    return model, x


def answering(change: Callable[[list[Tensor]], list[Tensor]]) -> Callable[[Any], Iterator[tuple[str, Any]]]:
    """A backend that computes what torch computes, and changes its answer."""

    def backend(target: Any) -> Iterator[tuple[str, Any]]:
        program = target.program.module()
        yield "changed", lambda *xs: change(runners.flat_outputs(program(*xs)))

    return backend


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The table of backends, restored afterwards."""
    table = dict(runners.BACKENDS)
    monkeypatch.setattr(runners, "BACKENDS", table)
    return table


@pytest.mark.parametrize("where", ["everywhere", "all but the first tensor", "one value of the last tensor"])
def test_a_backend_that_answers_nan_does_not_pass(where: str, backends: dict[str, Any]) -> None:
    def nan(tensors: list[Tensor]) -> list[Tensor]:
        if where == "one value of the last tensor":
            last = tensors[-1].clone()
            last.view(-1)[-1] = math.nan
            return [*tensors[:-1], last]
        return [y if i == 0 and where != "everywhere" else y * math.nan for i, y in enumerate(tensors)]

    backends["nan"] = answering(nan)
    model, x = two()
    (found,) = compare_backends(model, x, ("nan",))
    assert not found.max_difference <= 1e-5
    assert found.share_off > 0
    assert not found.network.only_ties
    assert found.network.samples_touched > 0
    if where == "everywhere":
        assert math.isnan(found.network.max_difference)


def test_a_network_that_is_nan_in_torch_too_is_equal() -> None:
    model, x = two()
    x[1, 2] = math.nan
    (found,) = compare_backends(model, x, ("torch.export",))
    assert found.max_difference == found.share_off == found.network.max_difference == 0


def test_a_missing_row_does_not_pass(backends: dict[str, Any]) -> None:
    """One row would broadcast against all."""
    backends["short"] = answering(lambda tensors: [y[:1] for y in tensors])
    model, x = two()
    with pytest.raises(ExportFailed, match=r"shape \(1, 12\) where torch has \(4, 12\)"):
        compare_backends(model, x, ("short",))


def broken(_: Any) -> Any:
    raise missing("nowhere", "extra", "The broken backend")


def test_one_failing_backend_leaves_the_others(backends: dict[str, Any]) -> None:
    backends["broken"] = broken
    model, x = two()
    failed, fine = compare_backends(model, x, ("broken", "torch.export"))
    assert fine.error is None
    assert fine.max_difference == 0
    assert isinstance(failed.error, MissingDependency)
    assert "broken: failed with MissingDependency: The broken backend needs 'nowhere'" in str(failed)
    assert not failed.max_difference <= 1
    assert not failed.share_off <= 1
    assert not failed.network.only_ties


def test_errors_are_raised_where_asked_or_where_nothing_is_left(backends: dict[str, Any]) -> None:
    backends["broken"] = broken
    model, x = two()
    with pytest.raises(MissingDependency):
        compare_backends(model, x, ("torch.export", "broken"), raise_errors=True)
    with pytest.raises(MissingDependency):
        compare_backends(model, x, ("broken",))
    with pytest.raises(InvalidArgument, match="'tensorrt'"):
        compare_backends(model, x, ("torch.export", "tensorrt"))


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_sites_may_have_other_rows_than_samples(rows: int, backends: dict[str, Any]) -> None:
    """Windows, heads, tokens first."""
    model, x = two(rows)
    (found,) = compare_backends(model, x, ("torch.export",))
    assert [q.site for q in found.quantizers] == ["a", "b"]
    assert found.network.max_difference == found.network.samples_touched == 0
    assert found.network.only_ties

    step = float(model.b.scale)
    backends["a step off"] = answering(lambda tensors: [*tensors[:-1], tensors[-1] + step * (tensors[-1] == 0)])
    (wrong,) = compare_backends(model, x, ("a step off",))
    assert not wrong.network.only_ties
    assert wrong.network.samples_touched > 0


def test_largest_keeps_nan() -> None:
    assert largest([]) == 0
    assert largest([1.0, 3.0]) == 3
    for values in ([math.nan, 1.0], [1.0, math.nan]):
        assert math.isnan(largest(values))


class Several(nn.Module):
    """Outputs in a dict and in a list, and one that is None."""

    def __init__(self) -> None:
        super().__init__()
        self.model = two()[0]

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.model(x)
        return {"first": y, "others": [y.sum(1), None]}


@pytest.mark.parametrize("backend", ["torch.export", "onnxruntime"])
def test_several_outputs_are_compared(backend: str, backends: dict[str, Any]) -> None:
    for found in compare_backends(Several(), two()[1], (backend,)):
        assert found.network.max_difference <= 1e-5
        assert found.network.only_ties
    backends["wrong"] = answering(lambda tensors: [t + (0.5 if i == 1 else 0) for i, t in enumerate(tensors)])
    (wrong,) = compare_backends(Several(), two()[1], ("wrong",))
    assert wrong.network.max_difference == pytest.approx(0.5)


def test_each_backend_says_what_is_promised() -> None:
    model, x = two()
    assert runners.PROMISES.keys() == runners.BACKENDS.keys()
    (found,) = compare_backends(model, x, ("torch.export",))
    assert str(found).splitlines()[1] == "  promised: torch's numbers, bit for bit"


def test_progress_counts_backends(capsys: pytest.CaptureFixture[str], backends: dict[str, Any]) -> None:
    model, x = two()
    backends["broken"] = broken
    compare_backends(model, x, ("torch.export", "broken"), progress=True)
    assert "2/2" in capsys.readouterr().err
    compare_backends(model, x, ("torch.export",))
    assert capsys.readouterr().err == ""


def test_the_file_of_the_network_is_that_of_the_record_without_its_other_outputs() -> None:
    import onnx

    model, x = two()
    comparison = Comparison(model, x)
    plain, recorded = onnx.load(comparison.plain.onnx).graph, onnx.load(comparison.recorded.onnx).graph
    assert list(plain.node) == list(recorded.node)
    assert (len(plain.output), len(recorded.output)) == (1, 3)
