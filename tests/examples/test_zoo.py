"""The zoo: cells resume, one that is stopped keeps what it knows, the page says what misses; a few cells for real."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dqa_plugins import ActivationQuantizer, Direct
from examples.zoo import cell, hosts, run, same_sites, table
from examples.zoo.hosts import ROOMS
from examples.zoo.networks import NETWORKS
from examples.zoo.own import ENTRIES

Cell = dict[str, Any]


def made(network: str = "unet", room: str = "fx", **values: Any) -> Cell:
    """A cell in which all is well."""
    well = {"sites": 3, "stock": 0.03, "error8": 0.02, "error4": 0.2, "stock_seconds": 2.0, "seconds8": 1.0}
    checks = {"batch": [], "silent": [], "deepcopy": True, "state_dict": True, "stored": "equal"}
    return {
        "network": network,
        "room": room,
        "code": "abc",
        "failed": {},
        "floats": {"0-d": 1},
        **well,
        **checks,
    } | values


# ------------------------------------------------------------ resuming


def test_cells_that_are_there_are_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half-written ones, and with `again` those of other code, are."""
    computed: list[tuple[str, str]] = []

    def run_cell(network: str, room: str, folder: Path, limit: float, version: str) -> Cell:
        computed.append((network, room))
        found = made(network, room, code=version, seconds=1.0)
        run.write(run.path_of(folder, network, room), found)
        return found

    monkeypatch.setattr(run, "run_cell", run_cell)
    monkeypatch.setattr(run, "code_version", lambda: "new")
    cells = [("unet", "fx"), ("unet", "nncf"), ("matcher", "fx")]
    run.restore([made(code="old")], tmp_path)
    run.restore([made(code="older")], tmp_path)
    run.path_of(tmp_path, "unet", "nncf").write_text('{"network": "un')
    run.write(
        run.path_of(tmp_path, "matcher", "fx"), {"network": "matcher", "room": "fx", "failed": {}, "step": "stock"}
    )
    run.run_all(cells, tmp_path)
    assert computed == cells[1:]
    run.run_all(cells, tmp_path)
    assert computed == cells[1:]
    assert run.read(tmp_path)[-2]["code"] == "old"
    run.run_all(cells, tmp_path, again=True)
    assert computed == [*cells[1:], cells[0]]
    assert "unet" in capsys.readouterr().out
    assert len(run.read(tmp_path)) == 3


def _slow(network: str, room: str, folder: Path, limit: float) -> None:
    run.write(run.path_of(folder, network, room), {"network": network, "room": room, "failed": {}, "step": "8 bits"})
    time.sleep(30)


def _dies(network: str, room: str, folder: Path, limit: float) -> None:
    os._exit(3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("process", "step", "why"), [(_slow, "8 bits", "longer than 1 s"), (_dies, "start", "the process ended with 3")]
)
def test_a_cell_that_does_not_end_by_itself_is_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: Any, step: str, why: str
) -> None:
    monkeypatch.setattr(run, "_measure", process)
    monkeypatch.setattr(run, "PATIENCE", 15)  # a process that imports torch takes a while to start
    found = run.run_cell("unet", "fx", tmp_path, 1.0, "abc")
    assert found["stopped"] == {"step": step, "why": why}
    assert run.is_done(run.path_of(tmp_path, "unet", "fx"))
    assert table.broken(found, "8 bits") == (why if step == "8 bits" else None)


# ------------------------------------------------------------ the page


def test_what_misses_is_said() -> None:
    assert not table.misses_stock(made(error8=0.045))
    assert table.misses_stock(made(error8=0.046))
    assert not table.misses_stock(made(stock=0.001, error8=0.0199))
    assert not table.misses_stock({k: v for k, v in made(error8=9.0).items() if k != "stock"})
    assert table.misses_at_same_sites(made(error8=0.3))
    assert table.misses_at_same_sites(made(error8=0.3, same_sites=0.2))
    assert not table.misses_at_same_sites(made(error8=0.3, same_sites=0.031))
    assert "3.0 / **30.0** (3.1) / 20.0" in table.cell_text(made(error8=0.3, same_sites=0.031))
    assert table.spread([made(error4=0.2), made(error4=0.5)]) == pytest.approx(2.5)
    assert table.spread([made()]) is None


@pytest.mark.parametrize(
    ("check", "values"),
    [
        ("batch", {"batch": ["a"]}),
        ("deepcopy", {"deepcopy": False}),
        ("stored", {"stored": "differs"}),
        ("onnxruntime", {"onnxruntime": {"quantizers": 2, "off": ["a"]}}),
        ("state_dict", {"failed": {"state_dict": "KeyError: 'a'"}}),
    ],
)
def test_checks_that_do_not_hold_are_counted_and_listed(check: str, values: Cell) -> None:
    cells = [made(), made(room="pt2e", **values)]
    assert table.broken(cells[0], check) is None
    assert table.broken(cells[1], check)
    good, ran = table.held(cells, check)
    assert ran - good == 1
    assert f"- unet, pt2e, {check}: " in table.page(cells, {"unet": NETWORKS["unet"]})


def test_the_page_names_whose_failure_it_is() -> None:
    cells = [
        made(error8=0.3),
        {**made(room="nncf", failed={"stock": "IndexError: 3"})},
        made(room="brevitas", error4=0.9, failed={}),
    ]
    text = table.page(cells, {"unet": NETWORKS["unet"]})
    assert "| fx | 1 of 1 | 0 of 1 | 0 of 1 | 0.5 | unet |" in text
    assert "unet (4.5)" in text
    assert "3: 3.0 / **30.0** / 20.0" in text
    assert "not run" in text
    ours, hosts = text.split("## The hosts' own")
    assert "IndexError" in hosts
    assert "IndexError" not in ours
    assert json.loads(table.merged(cells)) == cells


def test_enough_networks_of_every_kind() -> None:
    assert len(NETWORKS) >= 60
    families = {entry.family for entry in NETWORKS.values()}
    assert {"cnn", "detection", "segmentation", "video", "vision transformer", "text", "audio", "mixer"} <= families


def test_inputs_are_those_of_their_seed() -> None:
    for entry in ENTRIES.values():
        for one, two, other in zip(entry.batch_of(1), entry.batch_of(1), entry.batch_of(2), strict=True):
            assert torch.equal(one, two)
            assert not torch.equal(one, other)


# ------------------------------------------------------------ a few cells

CELLS = [("matcher", room) for room in ROOMS] + [
    ("bert", "pt2e"),
    ("t5", "nncf"),
    ("llama", "fx"),
    ("llama", "brevitas"),
]


@pytest.mark.slow
@pytest.mark.parametrize("room", same_sites.EXCHANGE)
@torch.no_grad()
def test_quantizers_are_exchanged_where_the_host_has_its_own(room: str) -> None:
    """At its sites, and in its affine form, Direct is about as far off as the host is."""
    pytest.importorskip({"pt2e": "torchao"}.get(room, room))
    entry = ENTRIES["matcher"]
    model, batches, test = entry.model(), [entry.batch_of(seed) for seed in (1, 2)], entry.batch_of(9)
    expected = model(*test)
    given = model if room == "brevitas" else hosts.for_room(model, room, test)[0]
    stock, _ = hosts.STOCK[room](given, batches)
    error = cell.distance(stock(*test), expected)
    same = same_sites.at_sites_of_the_host(room, stock, Direct(bits=8, symmetric=False), batches)
    quantizers = {m for m in same.modules() if isinstance(m, ActivationQuantizer) and m.state == "frozen"}
    assert 2 < len(quantizers) < 18
    assert 0.1 * error < cell.distance(same(*test), expected) < 1.5 * error


@pytest.mark.slow
@pytest.mark.parametrize(("network", "room"), CELLS)
def test_cells(network: str, room: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Own networks in every room, those of transformers in one or two; the host's own int8 is left out."""
    if NETWORKS[network].source == "transformers" and importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed: pip install '.[zoo]'")
    pytest.importorskip({"fx": "torch", "pt2e": "torchao"}.get(room, room))
    monkeypatch.setitem(cell.STOCK, room, lambda model, batches: (model, "float"))
    monkeypatch.setattr(cell, "EXCHANGE", {})  # a float model has no sites of the host
    steps: list[str] = []
    found = cell.measure(network, room, save=lambda so_far: steps.append(so_far["step"]))
    assert not found["failed"], found["failed"]
    assert steps[:3] == ["float", "trace", "stock"]
    assert found["sites"] > 10
    assert found["error8"] < 0.06
    assert found["error8"] < found["error4"] < 0.6
    assert [text for check in table.CHECKS if (text := table.broken(found, check))] == []
