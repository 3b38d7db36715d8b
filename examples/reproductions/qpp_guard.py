"""What bounds the outliers of Dense+Sparse with static and predicted thresholds, and what that costs.

    python -m examples.reproductions.qpp_guard --quick

A threshold that is too low lets in more outliers than a kernel has room for (QPP paper, section 5.2). Two ways out,
both applied to a sample and layer whose density is above `LIMIT` times the target, on ResNet-32 and the U-Net, w8a4:

    cap      the largest values stay float, as many as the limit allows; the others are clamped to the threshold
    guard    the layer takes that sample's own thresholds (a dynamic pass, only where it is needed)

Reported: score, the largest and the mean density, the share of (sample, layer) pairs above the limit, and in how many
a guard has to act. Clean, and under the exposures of `qpp_tables`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dqa_plugins import ActivationQuantizer, iter_quantizers
from examples.reproductions import common
from examples.reproductions.qpp_tables import DENSITY, EXPOSURES, method, qparams_of, quantize
from examples.reproductions.workloads import chosen, workload

NETWORKS = ("resnet32", "unet")
SOURCES = ("static", "QPP, paper", "QPP, extended")
ACTIONS = ("none", "cap", "guard")
LIMIT = 2.0


def bounded(x: Tensor, lower: Tensor, upper: Tensor, limit: int) -> Tensor:
    """x with all but its `limit` farthest outliers clamped to the thresholds.

    Args:
        x: (N, ...) float.
        lower, upper: thresholds, broadcast to x.
        limit: outliers that a sample may keep.
    """
    beyond = (torch.maximum(x - upper, lower - x)).clamp(min=0).flatten(1)
    count = min(limit + 1, beyond.shape[1])
    smallest = beyond.topk(count, dim=1).values[:, -1:].reshape(-1, *[1] * (x.ndim - 1))
    keep = beyond.reshape(x.shape) > smallest
    return torch.where(keep, x, torch.minimum(torch.maximum(x, lower), upper))


class Bounded:
    """Forward of a Dense+Sparse quantizer that bounds its outliers, and counts what it did.

    Args:
        quantizer: frozen.
        action: one of ACTIONS.
    """

    def __init__(self, quantizer: ActivationQuantizer, action: str) -> None:
        self.quantizer, self.action = quantizer, action
        self.original = type(quantizer).forward
        self.densities: list[Tensor] = []
        self.acted = 0

    def __call__(self, x: Tensor, prediction: Tensor | None = None) -> Tensor:
        """Values as the quantizer gives them, bounded."""
        extra = () if prediction is None else (prediction,)
        found: Tensor = self.original(self.quantizer, x, *extra)
        _, lower, upper = self.quantizer.runtime_qparams(x, *extra)
        size, one = x[0].numel(), [1] * (x.ndim - 1)
        lower, upper = lower.reshape(-1, *one), upper.reshape(-1, *one)
        outside = ((x < lower) | (x > upper)).flatten(1).sum(1)
        room = int(LIMIT * DENSITY * size)
        over = outside > room
        if self.action == "none" or not over.any():
            self.densities.append(outside / size)
            return found
        self.acted += int(over.sum())
        pick = over.reshape(-1, *one)
        if self.action == "cap":
            capped = self.original(self.quantizer, bounded(x, lower, upper, room), *extra)
            outside = outside.clamp(max=room)
            self.densities.append(outside / size)
            return torch.where(pick, capped, found)
        own = dynamic_twin(self.quantizer)
        _, low, high = own.runtime_qparams(x)
        counts = ((x < low.reshape(-1, *one)) | (x > high.reshape(-1, *one))).flatten(1).sum(1)
        self.densities.append(torch.where(over, counts, outside) / size)
        return torch.where(pick, own(x), found)


def dynamic_twin(quantizer: ActivationQuantizer) -> ActivationQuantizer:
    """A quantizer of the same method and sign that takes each sample's own thresholds."""
    chosen = quantizer.method.replace(qparams="dynamic", signed=quantizer.signed)
    found = ActivationQuantizer(chosen, name=quantizer.label)
    found(torch.zeros(1, 2, 2, 2))
    found.freeze()
    return found


def measure(network: str, source: str, action: str, run: int, options: common.Options) -> dict[str, Any]:
    """One row, clean and shifted. Runs in a process of its own."""
    task = workload(network, options.data, options.weights, quick=options.quick)
    model = quantize(task, method("Dense+Sparse", 4, qparams_of(source, network)), run)
    row: dict[str, Any] = {}
    for exposure, batches in zip(EXPOSURES, (task.test, task.shifted()), strict=True):
        bounds = []
        for _, quantizer in iter_quantizers(model):
            bounds.append(Bounded(quantizer, action))
            object.__setattr__(quantizer, "forward", bounds[-1])
        found = task.scores(model, batches)
        densities = torch.cat([d for bound in bounds for d in bound.densities]).double()
        row[exposure] = {
            **found,
            "mean_density": 100 * float(densities.mean()),
            "largest_density": 100 * float(densities.max()),
            "over_limit": 100 * float((densities > LIMIT * DENSITY).double().mean()),
            "acted": 100 * sum(bound.acted for bound in bounds) / len(densities),
        }
    return row


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, print, write."""
    options = common.parse(__doc__, arguments, runs=(3, 1), networks=NETWORKS)
    common.settle()
    tasks = chosen(options, NETWORKS)
    jobs = [
        {"network": task.key, "source": source, "action": action, "run": run}
        for run in range(options.runs)
        for task in tasks
        for source in SOURCES
        if options.asks_for(method=source)
        for action in ACTIONS
    ]
    report = common.collect(measure, jobs, options, "qpp_guard", **common.merged(options, "qpp_guard", tasks))
    for task in tasks:
        rows = [r for r in report["rows"] if r["network"] == task.key]
        lines = [
            [r["source"], r["action"], *(f"{r[e][k]:.2f}" for e in EXPOSURES for k in r[e])]
            for r in sorted(rows, key=lambda r: (SOURCES.index(r["source"]), ACTIONS.index(r["action"]), r["run"]))
        ]
        columns = ("parameters", "action", *(f"{e}: {k.replace('_', ' ')}" for e in EXPOSURES for k in rows[0][e]))
        common.show(f"Outliers bounded at {LIMIT:g} times 1%: {task.title}", columns, lines, text=2)
    return report


if __name__ == "__main__":
    main()
