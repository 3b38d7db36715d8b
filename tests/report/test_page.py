"""Saturation, histograms, and the page: figures by hand, and HTML that needs nothing else."""

from __future__ import annotations

import json
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from dqa_plugins import DQA, ActivationQuantizer, DenseSparse, Direct
from dqa_plugins.errors import DQAWarning
from dqa_plugins.report import ActivationReport, activation_report


def frozen(method: Direct | DQA | DenseSparse, calibration: torch.Tensor, name: str = "site") -> ActivationQuantizer:
    quantizer = ActivationQuantizer(method, name=name)
    quantizer(calibration)
    return quantizer.freeze()


def test_the_largest_value_that_was_calibrated_is_not_saturated() -> None:
    x = torch.linspace(0, 16, 17).reshape(1, 1, 17)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert activation_report(frozen(Direct(bits=4), x), [x]).sites[0].saturated == 0


def test_saturation_is_counted_and_said_once() -> None:
    x = torch.linspace(0, 16, 17).reshape(1, 1, 17)
    quantizer = frozen(Direct(bits=4), x)  # step 1, codes to 15
    with pytest.warns(DQAWarning, match=r"'site' \(16%\)") as caught:
        report = activation_report(quantizer, [2 * x, x, x])  # 18 to 32 of 3 x 17
    assert len(caught) == 1
    assert report.sites[0].saturated == pytest.approx(8 / 51)


def test_outliers_that_stay_in_float_are_not_saturated() -> None:
    x = torch.linspace(0, 1, 1000).reshape(1, 10, 100)
    site = activation_report(frozen(DenseSparse(bits=4, density=0.1), x), [x]).sites[0]
    assert site.density == pytest.approx(0.1)
    assert site.saturated == 0


def test_a_site_without_a_range_is_said() -> None:
    quantizer = frozen(Direct(bits=4), torch.zeros(1, 2, 3), "dead")
    with pytest.warns(DQAWarning, match="no range at 'dead'"):
        activation_report(quantizer, [torch.full((1, 2, 3), 1e-3)])


def test_a_channel_that_was_always_zero_is_no_missing_range() -> None:
    x = torch.tensor([[0.0, 0.0, 0.0], [0.1, 0.5, 1.0]]).reshape(1, 2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = activation_report(frozen(Direct(bits=4, granularity="channel"), x), [x]).sites[0].histogram
    assert found is not None
    assert found.step == pytest.approx(1 / 16)


def test_histograms() -> None:
    x = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 4.0]).reshape(1, 2, 3)
    found = activation_report(frozen(Direct(bits=2), x), [x, x]).sites[0].histogram
    assert found is not None
    assert (found.low, found.high, found.represented, found.step) == (0, 4, (0, 3), 1)
    assert sum(found.counts) == 12
    assert found.counts[-1] == 4
    assert found.thresholds is None
    kept = activation_report(frozen(DenseSparse(bits=2, density=0.2), x), [x]).sites[0].histogram
    assert kept is not None
    assert kept.thresholds is not None


class Balanced(HTMLParser):
    """Refuses what a browser would repair in silence."""

    VOID = ("meta",)

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [str(value) for key, value in attrs if key in ("href", "src")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def two_sites(folder: Path) -> tuple[ActivationReport, str]:
    torch.manual_seed(0)
    x = torch.rand(4, 6, 5, 5)
    model = torch.nn.Sequential(
        frozen(DQA(bits=3), x, "block.<script>relu"), frozen(DenseSparse(bits=4, density=0.05), x, "out")
    )
    report = activation_report(model, [x])
    path = report.write_html(folder / "page.html", sensitivity={"out": 0.125})
    return report, path.read_text(encoding="utf-8")


def test_the_page_is_whole_and_needs_no_network(tmp_path: Path) -> None:
    _, text = two_sites(tmp_path)
    parser = Balanced()
    parser.feed(text)
    assert not parser.open
    assert all(link.startswith("#") for link in parser.links)
    assert not re.search(r"https?://", text)
    assert "block.&lt;script&gt;relu" in text
    assert "<script>relu" not in text


def test_the_page_says_what_the_report_says(tmp_path: Path) -> None:
    report, text = two_sites(tmp_path)
    for site in report.sites:
        assert f"{site.bits:.2f}" in text
        assert f"{site.sqnr:.1f}" in text
    assert "12.50%" in text
    assert f"important channels: {', '.join(map(str, report.sites[0].important))}" in text
    assert len(report.sites[0].important) == 2
    assert text.count("<svg") == 2
    assert json.loads(json.dumps(report.as_dict()))["sites"][1]["histogram"]["counts"]
    assert "<table>" in report._repr_html_()
