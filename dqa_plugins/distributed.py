"""Calibration on several processes of torch.distributed, merged exactly.

    torch.distributed.init_process_group("gloo")      # under torchrun; "nccl" on GPUs
    prepared = prepare_fx(model, mapping, example)    # the same on every rank
    sample_offset(prepared, samples=len(my_images))   # with QPP only, before calibration
    for x in my_images.split(32):
        prepared(x)
    synchronize(prepared)
    quantized = convert_fx(prepared)                  # the same on every rank

Afterwards every rank holds, bit for bit, the model of one process that sees the batches of rank 0, then those of
rank 1, and so on: maxima and exact sums do not depend on the order, kept values and regression rows are joined in the
order of ranks. `rank_channels` and `allocate_bits` share their work among ranks by themselves.

Memory beside the model: one more copy of its calibration records, and 64 MiB. See docs/distributed.md for the costs.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .errors import ChannelMismatch, RanksDiffer, UncalibratedQuantizer, UnsupportedCombination
from .merging import Records, merged, merged_samples, portions, record_bytes, records_of, take_over
from .methods import method_to_dict
from .processes import Processes
from .progress import busy
from .qpp.session import forwards_of
from .quantizer import ActivationQuantizer

_CALIBRATE_FIRST = (
    "Call synchronize(prepared) after calibration and before convert (inside calibration_mode with Brevitas; NNCF "
    "calibrates and freezes in one call, which leaves nothing to merge)."
)


@busy("merging calibration")
def synchronize(prepared: nn.Module, *, uneven: bool = False, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Merge the calibration records of all ranks, in place; every rank calls it, after calibration.

    A second call without calibration in between changes nothing. In one process nothing happens.

    Args:
        prepared: by any adapter whose prepare and convert are two calls; the same model, with the same weights, on
            every rank. It may be wrapped in DistributedDataParallel(broadcast_buffers=False), or sharded by
            fully_shard.
        uneven: allow ranks that saw different numbers of samples.
        group: whose ranks merge; None: the default group.

    Returns:
        prepared.

    Raises:
        RanksDiffer: ranks hold different models, or saw different numbers of samples, or numbered them wrongly.
        RankLost: a rank died, raised, or did not call within the group's timeout.
        UncalibratedQuantizer: no rank saw data.
        UnsupportedCombination: frozen or training quantizers, a wrapper that overwrites records, or calibration went on
            after an earlier merge. The records are then as they were.
    """
    ranks = _processes(group)
    if ranks.size == 1:
        return prepared
    found: list[dict[str, Any]] = ranks.share(lambda: _describe(prepared), "synchronize")
    if _merged_before(found):
        return prepared
    model = _inner(prepared)
    hint = "Prepare the same model, in eval mode and with the same weights, on every rank."
    ranks.agree(lambda: _fixed(model), "synchronize", hint)
    sites = _quantizers(model)
    _check_counts(found, uneven)
    _check_numbers(found)
    told = [rank["sites"] for rank in found]
    records: dict[str, Records] = {}
    for paths in portions(told):
        records |= merged(ranks, {path: sites[path] for path in paths}, told)
    samples = merged_samples(ranks, model)
    for path, site in sites.items():
        take_over(site, [rank[path] for rank in told], records[path])
    for path, held in samples.items():
        model.get_submodule(path).samples = held
    total = sum(rank["samples"] for rank in found)
    for forwards in forwards_of(model):
        forwards.next_sample = total
    return prepared


def sample_offset(prepared: nn.Module, samples: int, *, group: dist.ProcessGroup | None = None) -> int:
    """Number the samples of this rank: QPP draws its augmentation by the number of a sample. Every rank calls it.

    Only models with predicted quantizers need it, before calibration; `synchronize` refuses them without, and where a
    rank calibrated on another number of samples than it said.

    Args:
        prepared: as for `synchronize`.
        samples: that this rank will calibrate on.
        group: as for `synchronize`.

    Returns:
        the number of this rank's first sample: how many the ranks before it have.

    Raises:
        UnsupportedCombination: samples is no number, or this rank has calibrated on other samples already.
        RankLost: a rank died, raised, or did not call within the group's timeout.
    """
    ranks = _processes(group)

    def checked() -> int:
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 0:
            raise UnsupportedCombination(f"sample_offset(samples={samples!r}): a number of samples, from 0.")
        return samples

    first = sum(ranks.share(checked, "sample_offset")[: ranks.rank])

    def declare() -> None:
        model = _inner(prepared)
        predicted = [site for site in _quantizers(model).values() if site.predictor is not None]
        for site in predicted:
            seen = site.predictor.record.samples
            if len(seen) and not first <= int(seen.min()) <= int(seen.max()) < first + samples:
                raise UnsupportedCombination(
                    f"{site.label} has calibrated on samples {int(seen.min())} to {int(seen.max())}, which are not "
                    f"those of rank {ranks.rank} ({first} to {first + samples - 1}). Call sample_offset before the "
                    "first calibration batch."
                )
        for site in predicted:
            site.predictor.record.declared = (first, samples)

    ranks.share(declare, "sample_offset")
    return first


def _processes(group: dist.ProcessGroup | None) -> Processes:
    initialised = dist.is_available() and dist.is_initialized()
    if not initialised and os.environ.get("TORCHELASTIC_RUN_ID") and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UnsupportedCombination(
            f"torchrun started {os.environ['WORLD_SIZE']} processes, but they form no group: call "
            "torch.distributed.init_process_group('gloo') (or 'nccl') first."
        )
    return Processes(group)


def _inner(model: nn.Module) -> nn.Module:
    """The model without a wrapper.

    Raises:
        UnsupportedCombination: the wrapper overwrites or drops calibration records.
    """
    if isinstance(model, DataParallel):
        raise UnsupportedCombination(
            "torch.nn.DataParallel calibrates copies and throws their records away: use one process per device."
        )
    if not isinstance(model, DistributedDataParallel):
        return model
    if model.broadcast_buffers:
        raise UnsupportedCombination(
            "DistributedDataParallel overwrote the calibration records of every rank with those of rank 0, forward by "
            "forward. Wrap the prepared model with broadcast_buffers=False, or calibrate it without the wrapper."
        )
    inner: nn.Module = model.module
    return inner


def _quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """By path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, ActivationQuantizer)}


def _describe(prepared: nn.Module) -> dict[str, Any]:
    """What this rank tells of its calibration."""
    model = _inner(prepared)
    sites: dict[str, dict[str, Any]] = {}
    for path, site in _quantizers(model).items():
        if site.state == "qat":
            raise UnsupportedCombination(
                f"{site.label} is being trained: its moving averages depend on the order of batches, and do not merge. "
                "Train with DistributedDataParallel, which copies rank 0's, and convert without synchronize."
            )
        calibration = site.calibration
        if 0 < calibration.synchronized < calibration.count:
            raise UnsupportedCombination(
                f"{site.label} saw {calibration.count - calibration.synchronized} samples after an earlier "
                "synchronize, whose samples would count once per rank. Calibrate on everything first, then "
                "synchronize once; or prepare the model again."
            )
        sites[path] = {
            "label": site.label,
            "state": site.state,
            "count": calibration.count,
            "kept": int(calibration.counts[1]),
            "synchronized": calibration.synchronized,
            "bytes": record_bytes(site),
            "axis": site.channel_axis if calibration.count else None,
            "channels": site.num_channels,
            "index": site.index,
            "predicted": site.predictor is not None,
            "declared": None if site.predictor is None else site.predictor.record.declared,
        }
    if not any(site["state"] == "observe" for site in sites.values()):
        kind = type(model).__name__
        what = f"the quantizers of this {kind} are frozen, their records forgotten"
        raise UnsupportedCombination(f"{what if sites else f'this {kind} has no quantizers'}. {_CALIBRATE_FIRST}")
    seen = [f.next_sample for f in forwards_of(model)]
    firsts = [site["declared"][0] for site in sites.values() if site["declared"]]
    most = max(site["count"] for site in sites.values())
    return {"sites": sites, "samples": max(seen) - max(firsts, default=0) if seen else most}


def _merged_before(found: list[dict[str, Any]]) -> bool:
    counts = [(site["count"], site["synchronized"]) for rank in found for site in rank["sites"].values()]
    return all(count == merged for count, merged in counts) and any(count for count, _ in counts)


def _fixed(model: nn.Module) -> dict[str, Any]:
    """What must be equal on all ranks: methods and states, and every tensor that is no calibration record.

    Parameters that fully_shard has split are left out: each rank holds its own part.
    """
    fixed: dict[str, Any] = {}
    apart: set[int] = set()
    for path, site in _quantizers(model).items():
        fixed[site.name or path] = [path, method_to_dict(site.method), site.state, site.ranked]
        apart.update(id(buffer) for record in records_of(site).values() for buffer in record.buffers())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) not in apart and not hasattr(tensor, "full_tensor"):
            content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            fixed[name] = [str(tensor.dtype), list(tensor.shape), hashlib.sha256(content).hexdigest()[:32]]
    return fixed


def _check_counts(found: list[dict[str, Any]], uneven: bool) -> None:
    for path, site in found[0]["sites"].items():
        counts = [rank["sites"][path]["count"] for rank in found]
        if len(set(counts)) > 1 and not uneven:
            raise RanksDiffer(
                f"{site['label']}: ranks 0 to {len(found) - 1} saw {', '.join(map(str, counts))} samples. Give every "
                "rank as many, or say synchronize(prepared, uneven=True)."
            )
        for key in ("channels", "axis"):
            values = {rank["sites"][path][key] for rank in found} - {None}
            if len(values) > 1:
                raise ChannelMismatch(
                    f"{site['label']}: ranks saw tensors of {key} {', '.join(map(str, sorted(values)))}. Calibrate "
                    "with inputs of the same kind on every rank."
                )
    if not any(site["count"] for rank in found for site in rank["sites"].values()):
        raise UncalibratedQuantizer(
            "synchronize: no rank has run the prepared model on calibration data. " + _CALIBRATE_FIRST
        )


def _check_numbers(found: list[dict[str, Any]]) -> None:
    """Predicted quantizers: every rank has numbered its samples behind those of the ranks before."""
    for path, site in found[0]["sites"].items():
        if not site["predicted"] or site["state"] != "observe":
            continue
        for rank, other in enumerate(found):
            declared, seen = other["sites"][path]["declared"], other["samples"]
            if declared is None:
                raise RanksDiffer(
                    f"{site['label']} learns from augmented samples, which are drawn by the number of a sample, and "
                    f"rank {rank} does not know its numbers: call sample_offset(prepared, samples=...) on every rank "
                    "before calibration."
                )
            if declared[1] != seen:
                raise RanksDiffer(
                    f"{site['label']}: rank {rank} said sample_offset(prepared, samples={declared[1]}) and calibrated "
                    f"on {seen}, so the samples of the ranks behind it have wrong numbers. Prepare again, and give "
                    "the number that calibration runs."
                )
