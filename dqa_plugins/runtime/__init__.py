"""Models that compute in int8: their convolutions and linears behind quantizers, whichever room converted them."""

from .layers import engine, set_engine
from .lowering import lower
from .report import LayerReport, LoweringReport, SiteReport, lowering_report

__all__ = ["LayerReport", "LoweringReport", "SiteReport", "engine", "lower", "lowering_report", "set_engine"]
