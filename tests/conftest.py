"""Hypothesis profiles, and one thread per test process.

The default profile is deterministic; HYPOTHESIS_PROFILE=thorough looks much longer.
"""

from __future__ import annotations

import functools
import os

# two test processes with two OpenMP threads each spin against one another on two cores
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
from hypothesis import HealthCheck, Phase, settings

quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("default", deadline=None, max_examples=60, derandomize=True, suppress_health_check=quiet)
settings.register_profile("thorough", deadline=None, max_examples=2000, suppress_health_check=quiet)
# tests.mutations: that a test fails is all it wants to know
phases = [Phase.explicit, Phase.generate]
settings.register_profile("mutations", settings.get_profile("default"), phases=phases)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="session", autouse=True)
def one_onnx_registry_per_process() -> None:
    """torch's exporter collects its 900 ONNX functions anew for every file: half a second each, in hundreds of tests.

    Only with torch 2.13's private class; where it is gone the tests are slower, no more.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
    except (ImportError, AttributeError):
        pass
