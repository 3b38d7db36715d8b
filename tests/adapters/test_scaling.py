"""Twice the network is twice the work: nothing of ours is quadratic in the number of sites."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from dqa_plugins import DQA, QPP, DenseSparse, Method
from examples.benchmarks.scaling import Residual

OURS = ("dqa_plugins", "adapters")
ROOT = Path(__file__).parents[2]


def lines(work: Callable[[], Any]) -> int:
    """Lines of our own code that run, loops by their rounds."""
    count = 0
    places = tuple(str(ROOT / name) for name in OURS)

    def watch(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(places):
            return None
        count += event == "line"
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def fx(layers: int, method: Method) -> None:
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    from dqa_plugins.adapters.fx import get_qconfig_mapping

    torch.manual_seed(0)  # the weights: which sites a regression fits decides how much work it is
    x = torch.randn(9, 8)
    prepared = prepare_fx(Residual(layers).eval(), get_qconfig_mapping(method), (x,))
    with torch.no_grad():
        prepared(x)
    convert_fx(prepared)


def pt2e(layers: int, method: Method) -> None:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    from dqa_plugins.adapters.pt2e import PluginQuantizer

    torch.manual_seed(0)
    x = torch.randn(9, 8)
    exported = torch.export.export(Residual(layers).eval(), (x,)).module()
    prepared = prepare_pt2e(exported, PluginQuantizer().set_global(method))
    with torch.no_grad():
        prepared(x)
    convert_pt2e(prepared)


@pytest.mark.parametrize("room", [fx, pt2e])
@pytest.mark.parametrize("method", [DQA(), DenseSparse(qparams=QPP(augment=False))], ids=["static", "predicted"])
@pytest.mark.filterwarnings("ignore::dqa_plugins.errors.DQAWarning")
def test_our_work_grows_with_the_number_of_sites(room: Callable[[int, Method], None], method: Method) -> None:
    """Prepare, calibrate and convert 20, 38 and 74 sites: linear growth doubles; a scan for each site gave 2.8."""
    room(3, method)  # imports and caches
    small, middle, large = (lines(lambda n=n: room(n, method)) for n in (6, 12, 24))
    assert (large - middle) < 2.25 * (middle - small), (small, middle, large)
