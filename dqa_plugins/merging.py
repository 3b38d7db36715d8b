"""Exchanges calibration records between processes and joins them in the order of ranks.

What travels: of each site the statistics of every rank, and kept values only as far as the ranks before have left room,
so that all ranks together send the kept values of one process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .calibration import KEPT_SAMPLES, CalibrationRecord
from .processes import Processes, pack_tensors, unpack_tensors
from .qpp.record import SampleRecord
from .quantizer import ActivationQuantizer

EXCHANGED = 2**26  # bytes of records that are under way at once, if a site needs no more

Records = dict[str, CalibrationRecord | SampleRecord]


def records_of(site: ActivationQuantizer) -> Records:
    """The records of a quantizer that merge, by kind."""
    rows = {} if site.predictor is None else {"rows": site.predictor.record}
    return {"calibration": site.calibration, **rows}


def record_bytes(site: ActivationQuantizer) -> int:
    """Bytes of the records of a quantizer."""
    return sum(b.numel() * b.element_size() for record in records_of(site).values() for b in record.buffers())


def portions(found: list[dict[str, Any]]) -> list[list[str]]:
    """Paths of sites, in portions whose records are under way together; the same on every rank.

    Args:
        found: {path: {"bytes", ...}} of each rank.
    """
    result: list[list[str]] = [[]]
    size = 0
    for path in found[0]:
        most = max(rank[path]["bytes"] for rank in found)
        if size + most > EXCHANGED and result[-1]:
            result.append([])
            size = 0
        result[-1].append(path)
        size += most
    return result


def merged(ranks: Processes, sites: dict[str, ActivationQuantizer], found: list[dict[str, Any]]) -> dict[str, Records]:
    """The records of all ranks, on the CPU; those of the quantizers stay as they are.

    Args:
        sites: by path.
        found: {path: {"kept", ...}} of each rank.
    """
    mine: dict[str, Tensor] = {}
    for position, (path, site) in enumerate(sites.items()):
        room = KEPT_SAMPLES - sum(rank[path]["kept"] for rank in found[: ranks.rank])
        for kind, record in records_of(site).items():
            held = dict(record.named_buffers())
            if kind == "calibration":
                held = _first_samples(held, max(room, 0))
            mine |= {f"{position} {kind} {name}": tensor for name, tensor in held.items()}
    result: dict[str, Records] = {
        path: {kind: type(record)() for kind, record in records_of(site).items()} for path, site in sites.items()
    }
    for payload in ranks.gather(pack_tensors(mine), "calibration records"):
        theirs = unpack_tensors(payload)
        for position, records in enumerate(result.values()):
            for kind, record in records.items():
                other: Any = type(record)()
                for name in dict(record.named_buffers()):
                    setattr(other, name, theirs[f"{position} {kind} {name}"])
                record.merge(other)
    return result


def merged_samples(ranks: Processes, model: nn.Module) -> dict[str, Any]:
    """What modules that keep samples beside their quantizers would have kept in one process, by path.

    Such a module has `samples`, `give_samples` and `join_samples` (see `storage.model.sites.StoredSite`).
    """
    holders: dict[str, Any] = {p: m for p, m in model.named_modules() if hasattr(m, "give_samples")}

    def counts() -> dict[str, int]:
        return {path: len(h.give_samples(KEPT_SAMPLES).get("values", ())) for path, h in holders.items()}

    before = ranks.share(counts, "kept samples")[: ranks.rank]
    result = {}
    for path, holder in holders.items():
        room = KEPT_SAMPLES - sum(rank[path] for rank in before)
        mine = holder.give_samples(room) if room > 0 else {}
        parts = ranks.gather(pack_tensors(mine), f"samples of {path}")
        result[path] = holder.join_samples([unpack_tensors(part) for part in parts])
    return result


def _first_samples(held: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The buffers of a CalibrationRecord, with the kept values of so many samples."""
    wanted = held["kept_sample"] < count
    statistic = held["kept_statistic"][:count]
    return held | {
        "kept": held["kept"][:, wanted],
        "kept_sample": held["kept_sample"][wanted],
        "kept_statistic": statistic,
        "counts": torch.stack([held["counts"][0], held["counts"].new_tensor(len(statistic))]),
    }


def take_over(site: ActivationQuantizer, told: list[dict[str, Any]], records: Records) -> None:
    """Give a quantizer the merged records, and what a rank that it saw data on has learnt beside them.

    Args:
        told: {"count", "axis", "channels", "index"} of each rank.
        records: from `merged`.
    """
    if site.state != "observe":
        return
    for kind, own in records_of(site).items():
        for name, buffer in list(own.named_buffers()):
            setattr(own, name, getattr(records[kind], name).to(buffer.device))
    site.calibration.synchronized = site.calibration.count
    learnt = next((rank for rank in told if rank["count"]), None)
    if learnt is not None:
        site.adopt(learnt["axis"], learnt["channels"], learnt["index"])
    if site.predictor is not None:
        rows = site.predictor.record
        rows.forwards, rows.added, rows.declared = 0, 0, None
        site.predictor.summary.axis = site.predictor.own.axis = site.channel_axis
