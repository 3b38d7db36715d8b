"""Hypothesis profiles. The default one is deterministic; HYPOTHESIS_PROFILE=thorough looks much longer."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("default", deadline=None, max_examples=60, derandomize=True, suppress_health_check=quiet)
settings.register_profile("thorough", deadline=None, max_examples=2000, suppress_health_check=quiet)
# tests.mutations: that a test fails is all it wants to know
phases = [Phase.explicit, Phase.generate]
settings.register_profile("mutations", settings.get_profile("default"), phases=phases)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
