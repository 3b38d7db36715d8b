"""Hypothesis profiles, and one thread per test process.

The default profile is deterministic; HYPOTHESIS_PROFILE=thorough looks much longer.
"""

from __future__ import annotations

import os

# two test processes with two OpenMP threads each spin against one another on two cores
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from hypothesis import HealthCheck, Phase, settings

quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("default", deadline=None, max_examples=60, derandomize=True, suppress_health_check=quiet)
settings.register_profile("thorough", deadline=None, max_examples=2000, suppress_health_check=quiet)
# tests.mutations: that a test fails is all it wants to know
phases = [Phase.explicit, Phase.generate]
settings.register_profile("mutations", settings.get_profile("default"), phases=phases)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
