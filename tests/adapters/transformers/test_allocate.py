"""The search for the steps that take a target of bits."""

from __future__ import annotations

from dqa_plugins.adapters.transformers.allocate import _next_level


def test_levels_close_in_on_the_target_where_the_estimate_is_far_too_flat() -> None:
    """Corrected by its last error alone, such an estimate goes further off each time."""
    measured: list[tuple[float, float]] = []
    for _ in range(6):
        level = _next_level(measured, 3.0, lambda level: 4.0 - 0.3 * level, -8.0)
        measured.append((level, 5.0 - 1.2 * level - 0.05 * level**2))
    assert min(abs(bits - 3.0) for _, bits in measured) < 0.01
