"""`rank_channels`: which channels of each layer deserve the extra bits of DQA."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..batches import ItemReader, Pick
from ..digest import digest
from ..methods import method_to_dict
from ..options import check_option
from ..processes import Processes
from ..progress import Progress
from ..quantizer import ActivationQuantizer
from .checkpoint import Checkpoint
from .errors import MetricError, RankingError
from .greedy import greedy
from .scoring import Batches, Metric, Scorer, batch_size
from .search_model import SearchModel, check_rankable
from .strategies import kept_errors, measured_errors, random_scores, taylor_scores
from .table import LayerRanks, RankTable

Strategy = Literal["greedy", "taylor", "error", "random"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)


def rank_channels(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    strategy: Strategy = "greedy",
    metric: Metric | None = None,
    progress: bool = True,
    seed: int = 0,
    strict: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    memory: int = 2**30,
    inputs: Pick = None,
    targets: Pick = None,
) -> RankTable:
    """Rank the channels of every DQA quantizer, and give the best their extra bits.

    The search runs on a copy: apart from the extra bits, which are set at the very end, nothing of `model` changes.
    Quantizers of methods without important channels quantize as they are while later layers are searched.

    Where torch.distributed is initialised, every rank calls this with the same model and the same batches (it shares
    the candidates, not the data), and all get the table of one process.

    Args:
        model: prepared by any adapter (or with ActivationQuantizers placed by hand) and calibrated.
        batches: (inputs, targets) as a DataLoader yields them (see `batches`), read once and kept. Not needed by
            "random", nor by "error" unless quantizers are frozen.
        strategy: "greedy", algorithm 3 of the DQA paper; "taylor", squared first-order change of the loss, one
            backward pass per batch; "error", quantization error on the calibration values, what an unranked model
            uses; "random". Greedy gives the order and scores of one full forward pass per channel, whichever way it
            takes on a graph; there cross-entropies may differ in the last digits.
        metric: metric(outputs, targets) -> (B,) one score per sample, higher is better. None: accuracy (taylor:
            cross-entropy; a given metric must be differentiable). Ties go to the lower cross-entropy, where outputs
            and targets define one, then to the lower index.
        progress: show a progress bar (needs tqdm; log messages without it).
        seed: of "random", and of random operations in the model.
        strict: ties go to the lower index, the first best, as in the paper.
        checkpoint: file that greedy writes after every layer and resumes from. A finished one gives its table at once.
            Of several ranks the first reads and writes it.
        memory: bytes for cached activations and stacked passes (greedy on graphs).
        inputs, targets: functions of a batch, for batches that are no such pairs.

    Returns:
        the table, already applied with each method's own ratio.

    Raises:
        UnsupportedCombination: no quantizer has important channels; or a quantizer is in the qat state.
        UncalibratedQuantizer: a quantizer saw no data.
        RankingError: an argument cannot be used. UnsupportedInput: a batch cannot.
        MetricError: the metric is not one finite score per sample.
        CheckpointMismatch: the checkpoint belongs to another model, other data or other settings.
        RanksDiffer: ranks were given different models, data or settings. RankLost: a rank died, raised, or did not call
            within the group's timeout.
    """
    ranks = Processes()
    check_option("rank_channels", "strategy", strategy, STRATEGIES)
    if isinstance(memory, bool) or not isinstance(memory, int) or memory < 1:
        raise RankingError(f"memory={memory!r}: a positive number of bytes.")
    if checkpoint is not None and strategy != "greedy":
        raise RankingError(f"checkpoint is for strategy='greedy'; {strategy!r} has nothing to resume.")
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)  # the CPU's only: fork_rng gives it back
        settings = {"strategy": strategy, "metric": metric, "strict": strict, "seed": seed}
        reader = ItemReader(model, "rank_channels", "needed", inputs, targets)
        rankable, listed, belongs = _agreed(model, reader, batches, settings, memory, ranks, checkpoint is not None)
        scorer = Scorer(metric)
        total = sum(q.num_channels or 0 for q in rankable.values())
        progress = progress and ranks.rank == 0
        if strategy == "greedy":
            store = Checkpoint(checkpoint, belongs, ranks)
            done = sum(layer.channels for layer in store.done.values())
            with Progress(total, progress, done, what="ranking channels", unit="channel") as bar:
                if done < total:
                    greedy(SearchModel(model), listed, scorer, store, bar, ranks, strict=strict, memory=memory)
            layers = [store.done[name] for name in rankable]
        else:
            with Progress(total, progress, what="ranking channels", unit="channel") as bar:
                layers = _without_search(model, rankable, listed, strategy, metric, seed, bar, ranks)
    table = RankTable(tuple(layers), strategy, scorer.name if strategy == "greedy" else "", seed, strict)
    table.apply(model)
    return table


def _agreed(
    model: nn.Module,
    reader: ItemReader,
    batches: Any,
    settings: dict[str, Any],
    memory: int,
    ranks: Processes,
    resumed: bool,
) -> tuple[dict[str, ActivationQuantizer], Batches, dict[str, Any]]:
    """The quantizers to rank, the batches, and what a checkpoint of this ranking belongs to; the same on all ranks."""
    rankable: dict[str, ActivationQuantizer] = {}
    listed: Batches = []
    belongs: dict[str, Any] = {}

    def read() -> dict[str, Any]:
        rankable.update(check_rankable(model))
        strategy = settings["strategy"]
        frozen = any(q.state == "frozen" for q in rankable.values())
        needed = strategy in ("greedy", "taylor") or (strategy == "error" and frozen)
        listed.extend(_list(reader, batches, strategy) if needed else [])
        if resumed or ranks.size > 1:
            layers = [[name, q.num_channels, method_to_dict(q.method)] for name, q in rankable.items()]
            digests = {"metric": digest(settings["metric"]), "model": digest(model), "batches": digest(listed)}
            belongs.update({**settings, "layers": layers, **digests})
        return {**belongs, "memory": memory, "checkpoint": resumed}

    hint = "Give every rank the same batches and settings, and a model whose calibration is merged (synchronize)."
    ranks.agree(read, "rank_channels", hint)
    return rankable, listed, belongs


def _without_search(
    model: nn.Module,
    rankable: dict[str, ActivationQuantizer],
    batches: Batches,
    strategy: str,
    metric: Metric | None,
    seed: int,
    progress: Progress,
    ranks: Processes,
) -> list[LayerRanks]:
    found: dict[str, Tensor]
    if strategy == "taylor":
        found = taylor_scores(SearchModel(model), batches, metric, progress, ranks)
    else:
        if strategy == "random":
            found = {name: random_scores(name, q.num_channels or 0, seed) for name, q in rankable.items()}
        elif any(q.state == "frozen" for q in rankable.values()):
            found = measured_errors(SearchModel(model), batches, ranks)
        else:
            found = kept_errors(rankable, ranks)
        progress.advance(sum(map(len, found.values())))
    layers = []
    for name in rankable:
        scores = found[name]
        if not torch.isfinite(scores).all():
            raise MetricError(f"{name!r}: the {strategy} scores are NaN or Inf; check the batches and the float model.")
        order = scores.argsort(descending=True, stable=True).tolist()
        layers.append(LayerRanks(name, tuple(order), tuple(scores.tolist())))
    return layers


def _list(reader: ItemReader, batches: Any, strategy: str) -> Batches:
    found: Batches = []
    for number, call in enumerate(() if batches is None else reader.items(batches)):
        inputs, targets = _normal(call.inputs), _normal(call.targets)
        if 0 in (batch_size(*(inputs.values() if isinstance(inputs, dict) else inputs)), batch_size(targets)):
            raise RankingError(f"batch {number} holds no samples; leave empty batches out.")
        found.append((inputs, targets))
    if not found:
        raise RankingError(
            f"strategy={strategy!r} needs batches of (inputs, targets) here, and got none"
            + (" (a frozen quantizer has forgotten its calibration values)." if strategy == "error" else ".")
        )
    return found


def _normal(value: Any) -> Any:
    """Inference tensors as normal ones, which a backward pass may use."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        return {key: _normal(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_normal(item) for item in value)
    return value
