"""The NNCF tests: skipped without NNCF, and without its progress bars and its C++ build."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator

import pytest
import torch

nncf = pytest.importorskip("nncf")


@pytest.fixture(autouse=True, scope="session")
def _quiet_nncf() -> Iterator[None]:
    # not nncf.set_log_level: it also sets the level of every handler of the root logger, pytest's caplog included
    logging.getLogger("nncf").setLevel(logging.ERROR)
    # stock weight quantizers compile a C++ extension on first use, for minutes; NNCF's own fallback in plain torch
    # computes the same (the adapter's weight quantizers need neither)
    from nncf.torch.quantization import extensions
    from nncf.torch.quantization.reference import ReferenceBackendType, ReferenceQuantize

    class Fallback:
        Quantize_forward = ReferenceQuantize(ReferenceBackendType.TORCH).forward
        Quantize_backward = ReferenceQuantize(ReferenceBackendType.TORCH).backward

    loaded = extensions.QuantizedFunctionsCPU._loaded_namespace
    extensions.QuantizedFunctionsCPU._loaded_namespace = Fallback
    yield
    extensions.QuantizedFunctionsCPU._loaded_namespace = loaded


@pytest.fixture(autouse=True, scope="session")
def _fast_nncf() -> Iterator[None]:
    """NNCF builds the same pattern graphs anew for every model, half a second each: build them once."""
    from nncf.common.graph.patterns.manager import PatternsManager

    names = ("get_full_hw_pattern_graph", "get_full_ignored_pattern_graph")
    originals = {name: PatternsManager.__dict__[name] for name in names}
    for name in names:
        setattr(PatternsManager, name, staticmethod(functools.cache(getattr(PatternsManager, name))))
    threads = torch.get_num_threads()
    torch.set_num_threads(min(threads, 2))
    yield
    torch.set_num_threads(threads)
    for name, original in originals.items():
        setattr(PatternsManager, name, original)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def registered() -> Iterator[None]:
    """`register`, undone afterwards."""
    from dqa_plugins.adapters.nncf import register, unregister

    register()
    yield
    unregister()
