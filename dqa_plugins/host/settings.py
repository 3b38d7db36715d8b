"""Settings without effect: one warning that names them."""

from __future__ import annotations

import warnings

from dqa_plugins.errors import DQAWarning

from .sites import Summary


def warn_idle(summary: Summary, *, asked: bool = True, advice: str = "") -> None:
    """Say in one warning which settings matched nothing, and where nothing is quantized, that.

    Args:
        summary: of the placement.
        asked: False where no method was set at all.
        advice: of the room, where nothing is quantized although a method was set.
    """
    said = [f"{setting!r} ({reason})" for setting, reason in summary.unmatched]
    parts = [f"settings matched nothing for {', '.join(said[:8])}{', ...' if said[8:] else ''}."] if said else []
    if not asked:
        parts.append("No method is set for any layer or site: the model stays float.")
    elif not summary.sites:
        parts.append(
            "dqa_plugins placed no quantizer: no operation that could be quantized has a method. Check names, types "
            f"and skip{advice}; placement_report(model) says of each layer why it stays float."
        )
    if parts:
        warnings.warn(DQAWarning(" ".join(parts)), stacklevel=5)
