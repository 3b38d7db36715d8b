"""What was placed where, what each activation costs and loses, and which method a network needs."""

from .activations import ActivationReport, activation_report, fixed_length_bits, kept_share
from .comparison import Comparison, MethodRow, compare_methods
from .measured import SiteReport
from .placement import PlacementReport, PlacementRow, placement_report
from .suggestion import SiteChoice, Suggestion, suggest

__all__ = [
    "ActivationReport",
    "Comparison",
    "MethodRow",
    "PlacementReport",
    "PlacementRow",
    "SiteChoice",
    "SiteReport",
    "Suggestion",
    "activation_report",
    "compare_methods",
    "fixed_length_bits",
    "kept_share",
    "placement_report",
    "suggest",
]
