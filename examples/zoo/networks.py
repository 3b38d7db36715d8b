"""Every network of the zoo by name. No package is imported before a network of it is built."""

from __future__ import annotations

from . import from_smp, from_timm, from_torchvision, from_transformers, own
from .entry import Entry

NETWORKS: dict[str, Entry] = {
    **own.ENTRIES,
    **from_transformers.ENTRIES,
    **from_torchvision.ENTRIES,
    **from_timm.ENTRIES,
    **from_smp.ENTRIES,
}
