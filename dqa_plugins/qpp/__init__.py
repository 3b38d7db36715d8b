"""QPP: quantization parameters predicted per sample from the network's input."""

from .bus import Bus, connect, link
from .fit import fit
from .predictor import Predictor

__all__ = ["Bus", "Predictor", "QPPReport", "connect", "fit", "link", "qpp_report"]


def __getattr__(name: str) -> object:
    """The report on first use: the quantizer imports this package."""
    if name in ("QPPReport", "qpp_report"):
        from . import report

        return getattr(report, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
