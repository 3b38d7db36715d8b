"""The figures of the pages are those of the JSONs, and a page that differs is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.results import __main__ as command
from examples.results import pages, parts
from examples.results.pages import ROOT, ResultsError, find, rendered


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of one page with one JSON."""
    (tmp_path / "docs" / "results").mkdir(parents=True)
    rows = [{"bits": 2, "name": "a b", "score": 50.04}, {"bits": 3, "name": "a b", "score": 75.06}]
    (tmp_path / "docs" / "results" / "x.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "README.md").write_text('At 3 bits <!--= value x "rows/bits=3&name=a b/score" .1f -->?<!--/-->%.\n')
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "RESULTS", tmp_path / "docs" / "results")
    pages.load.cache_clear()
    yield tmp_path
    pages.load.cache_clear()


def test_a_page_that_differs_is_found_and_mended(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--check"]) == 1
    assert "README.md and its JSONs differ" in capsys.readouterr().err
    assert command.main([]) == 0
    assert "-->75.1<!--/-->%." in (small / "README.md").read_text()
    assert command.main(["--check"]) == 0
    page = (small / "README.md").read_text()
    (small / "README.md").write_text(page.replace("75.1", "75.2"))
    assert command.main(["--check"]) == 1


def test_a_path_that_leads_nowhere_says_where_it_ends(small: Path) -> None:
    assert find("x", "rows/1/bits") == 3
    for path, where in (("rows/bits=9/score", "bits=9"), ("rows/7", "7"), ("columns", "columns")):
        with pytest.raises(ResultsError, match=f"'{where}' is not there"):
            find("x", path)
    with pytest.raises(ResultsError, match="make results PARTS=absent"):
        find("absent", "rows")
    with pytest.raises(ResultsError, match="page: chart x"):
        rendered("<!--= chart x --><!--/-->", "page")


def test_tables_stand_on_lines_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pages.BLOCKS, "two", lambda: pages.table(["", "n"], [["a", 1]]))
    text = rendered("<!--= two -->\nold\n<!--/-->\n\nand <!--= two --><!--/-->")
    assert text.count("\n| | n |\n| --- | --- |\n| a | 1 |\n<!--/-->") == 2
    assert rendered(text) == text


def test_the_pages_are_as_their_jsons_say() -> None:
    assert pages.differing(write=False) == []


def test_reproductions_say_what_measured_them() -> None:
    for name, part in parts.PARTS.items():
        path = ROOT / "docs" / "results" / part.folder / f"{name}.json"
        if part.module.startswith("reproductions") and name != "language_model" and path.is_file():
            report = json.loads(path.read_text())
            assert {"code", "machine", "seeds"} <= set(report), path
            assert report["machine"]["threads"] == 1
            if report["code"].startswith("see"):
                assert all("code" in row for row in report["rows"]), path


def test_parts_are_scripts_that_exist() -> None:
    for name, part in parts.PARTS.items():
        assert (ROOT / "examples" / (part.module.replace(".", "/") + ".py")).is_file(), name
