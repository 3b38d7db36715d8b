"""What was placed where, and what each activation costs and loses."""

from .activations import ActivationReport, SiteReport, activation_report, fixed_length_bits, kept_share
from .placement import PlacementReport, PlacementRow, placement_report

__all__ = [
    "ActivationReport",
    "PlacementReport",
    "PlacementRow",
    "SiteReport",
    "activation_report",
    "fixed_length_bits",
    "kept_share",
    "placement_report",
]
