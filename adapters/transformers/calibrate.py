"""calibrate_cache: steps, centres and entropy tables of keys and values, from text that the model reads once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dqa_plugins.batches import Call, ItemReader
from dqa_plugins.errors import InvalidArgument, NonFiniteInput, UncalibratedQuantizer, UnsupportedCombination
from dqa_plugins.method import Method
from dqa_plugins.methods import DQA, check_method
from dqa_plugins.options import Coding, check_option
from dqa_plugins.progress import counted
from dqa_plugins.quantizer import ActivationQuantizer
from dqa_plugins.storage.format.layout import CODINGS
from dqa_plugins.storage.tables import build_codebook, calibrate_tables

from .allocate import allocate_steps
from .host import DynamicCache, PreTrainedModel, frequencies, identity, sliding_windows
from .rotary import rotated, turn
from .settings import CacheSettings, TensorSettings
from .tables import shared_codebooks

KEPT = 4096  # tokens whose keys and values are kept, in runs of neighbours
_RUN = 64
_SHRINK = 0.05  # of the mean sensitivity, added to each: few thousand gradients say little of the smallest ones


@dataclass
class Record:
    """What calibration keeps of the keys, or the values, of one layer.

    Args:
        name: of its quantizer.
        heads, width: H and D.
        turns: rotation that is undone, see `TensorSettings`.
        values: (H * D, tokens) float32 each, runs of neighbours.
        every: of so many runs one is kept.
        squares: (H, D, D) float64, sum of the outer products of each head's gradients.
        tokens: seen.
    """

    name: str
    heads: int
    width: int
    turns: tuple[float, ...] = ()
    values: list[Tensor] = field(default_factory=list)
    every: int = 1
    squares: Tensor | None = None
    tokens: int = 0

    @property
    def rows(self) -> Tensor:
        """(H * D, tokens)."""
        return torch.cat(self.values, 1)

    @property
    def factor(self) -> Tensor:
        """(H, D, D) float64, upper triangular R: an error e of a head costs the loss about |R e|^2 / 2."""
        if self.squares is None:
            raise UncalibratedQuantizer(f"'{self.name}' has no gradients.")
        fisher = self.squares / max(self.tokens, 1)
        mean = fisher.diagonal(dim1=1, dim2=2).mean(1)
        floor = _SHRINK * mean + 1e-6 * mean.mean() + 1e-30  # a head that the text never moved has no gradient
        return torch.linalg.cholesky(fisher + floor[:, None, None] * torch.eye(self.width)).mT

    def add(self, rows: Tensor, gradients: Tensor | None) -> None:
        """Values, and gradients, of (H * D, T) tokens."""
        runs = rows.split(_RUN, 1)
        seen = -(-self.tokens // _RUN)
        self.values += [run.clone() for k, run in enumerate(runs) if (seen + k) % self.every == 0]
        while sum(run.shape[1] for run in self.values) > KEPT:
            self.values, self.every = self.values[::2], 2 * self.every
        self.tokens += rows.shape[1]
        if gradients is not None:
            g = gradients.double().unflatten(0, (self.heads, self.width))
            self.squares = g @ g.mT + (0 if self.squares is None else self.squares)


class _Recording(DynamicCache):
    """Remembers what every layer was given; with `leaves`, its gradients too."""

    def __init__(self, leaves: bool) -> None:
        super().__init__()
        self.leaves, self.seen = leaves, {}  # type: ignore[var-annotated]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        pair = [x if x.requires_grad else x.detach().requires_grad_(self.leaves) for x in (key_states, value_states)]
        for x in pair:
            if self.leaves:
                x.retain_grad()
        self.seen[layer_idx] = pair
        return super().update(pair[0], pair[1], layer_idx, *args, **kwargs)


def calibrate_cache(
    model: PreTrainedModel,
    batches: Iterable[Any],
    method: Method | None = None,
    target_bits: float | None = None,
    *,
    coding: Coding = "joint",
    window: int = 128,
    block: int = 64,
    first: int = 4,
    inputs: Any = None,
) -> CacheSettings:
    """Decide how keys and values of a decoder are packed.

    Args:
        model: a decoder of transformers; not changed.
        batches: input ids (B, T), or keyword inputs (padding is left out by `attention_mask`); a few thousand tokens.
        method: static: a step for each component of each head; DQA and Direct. Dynamic: each head of each token has its
            own scale. None: DQA(bits=4, granularity="channel").
        target_bits: bits for each packed value, without tables. Steps then follow the gradients of the model's loss on
            this text, errors are fed back (see `allocate`), and `bits` only bounds the codes.
        coding: "joint": codes entropy coded; "none": fixed width; "shift_error": the DQA paper's.
        window, block, first: see `CacheSettings`.
        inputs: a function from a batch to the inputs, as everywhere.

    Raises:
        NotAMethod, InvalidArgument: an argument is out of range.
        UnsupportedCombination: a layer, or a method, that is not packed.
        UncalibratedQuantizer: no tokens. NonFiniteInput: NaN or Inf in keys, values or gradients.
    """
    method = check_method(method or DQA(bits=4, granularity="channel"), "calibrate_cache")
    check_option("calibrate_cache", "coding", coding, CODINGS)
    _check(method, target_bits, coding)
    calls = ItemReader(model, "calibrate_cache", inputs=inputs).items(batches)
    records = observe(model, calls, target_bits is not None, first, method.source == "static")
    layers = decide(records, method, target_bits, coding, block)
    sliding = tuple(sliding_windows(model.config))
    return CacheSettings(identity(model.config), layers, sliding, window, block, first)


def decide(
    records: Sequence[Sequence[Record]], method: Method, target_bits: float | None, coding: Coding, block: int
) -> tuple[tuple[TensorSettings, TensorSettings], ...]:
    """The (keys, values) of each layer, from what `observe` kept of them."""
    flat = [record for pair in records for record in pair]
    rows = [record.rows for record in flat]
    tensors = [_tensor(record, method) for record in flat]
    if target_bits is not None:
        tensors = allocate_steps(tensors, rows, [r.factor for r in flat], float(target_bits), block)
    elif coding == "joint" and all(t.has_steps for t in tensors):
        tensors = shared_codebooks(tensors, rows, block)
    elif coding != "none":
        seen = [as_seen(r - t.center[:, None], t.heads, t.by_channel) for t, r in zip(tensors, rows, strict=True)]
        books = [calibrate_tables(t.quantizer, x, coding) for t, x in zip(tensors, seen, strict=True)]
        tensors = [replace(t, book=book) for t, book in zip(tensors, books, strict=True)]
    return tuple(zip(tensors[::2], tensors[1::2], strict=True))


def _check(method: Method, target_bits: float | None, coding: Coding) -> None:
    if method.source == "predicted" or method.target_density or coding == "auto":
        raise UnsupportedCombination(
            f"a packed cache takes static or dynamic methods without values kept in float, and a coding that is not "
            f"'auto'; got {method!r}, coding={coding!r}."
        )
    if target_bits is None:
        return
    if isinstance(target_bits, bool) or not isinstance(target_bits, int | float) or not 0.5 <= target_bits <= 8:
        raise InvalidArgument(f"target_bits={target_bits!r}: a number of bits per value from 0.5 to 8.")
    if method.source != "static" or method.granularity != "channel" or method.uses_range or coding != "joint":
        raise UnsupportedCombination(
            "target_bits sets a step for each channel: it takes a static method with granularity='channel' and a "
            f"scale, under joint coding; got {method!r}, coding={coding!r}."
        )


def observe(
    model: PreTrainedModel, calls: Iterable[Call], gradients: bool, first: int, turns: bool = True
) -> list[list[Record]]:
    """Run a decoder on calibration text; (keys, values) of each layer.

    Args:
        gradients: of the loss, too.
        first: tokens of each sequence that are left out: their keys and values are unlike all others.
        turns: undo the rotation of keys where that makes them steadier.

    Raises:
        UnsupportedCombination: a layer has no keys and values of its own, or there is no text.
    """
    layers = len(sliding_windows(model.config))
    records: list[list[Record]] = []
    known = frequencies(model) if turns else []
    training, trained = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for p in trained:
        p.requires_grad_(False)
    try:
        for call in counted(calls, what="calibrating the cache", unit="batch"):
            cache = _Recording(gradients)
            with torch.set_grad_enabled(gradients):
                outputs = model(*call.positional, **{**call.keywords, "past_key_values": cache, "use_cache": True})
            ids = call.keywords.get("input_ids", call.positional[0] if call.positional else None)
            mask = call.keywords.get("attention_mask")
            mask = torch.ones(outputs.logits.shape[:2], dtype=torch.bool) if mask is None else mask.bool().cpu()
            if gradients:
                _backward(outputs.logits, ids, mask)
            positions = call.keywords.get("position_ids")
            positions = torch.arange(mask.shape[1]).expand(mask.shape) if positions is None else positions.cpu()
            used = mask & (mask.cumsum(1) > first)
            del outputs
            if len(cache.seen) != layers:
                raise UnsupportedCombination(f"{len(cache.seen)} of {layers} layers used the cache; all have to.")
            for i, pair in sorted(cache.seen.items()):
                if i == len(records):
                    chosen = (_steadiest(pair[0], used, positions, known), ())
                    named = zip(("keys", "values"), pair, chosen, strict=True)
                    records.append([Record(f"{i}.{name}", x.shape[1], x.shape[3], t) for name, x, t in named])
                for record, x in zip(records[i], pair, strict=True):
                    _keep(record, x, used, positions)
    finally:
        model.train(training)
        for p in trained:
            p.requires_grad_()
    return records


def _backward(logits: Tensor, ids: Tensor | None, mask: Tensor) -> None:
    """Gradients of the sum of the tokens' cross entropies."""
    if ids is None:
        raise UnsupportedCombination("target_bits needs input_ids, the text whose loss is differentiated.")
    mask = mask.to(logits.device)
    wanted = (mask[:, 1:] & mask[:, :-1]).flatten()
    scores = logits[:, :-1].flatten(0, 1)[wanted].float()
    cross_entropy(scores, ids[:, 1:].flatten()[wanted], reduction="sum").backward()


@torch.no_grad()
def _keep(record: Record, x: Tensor, used: Tensor, positions: Tensor) -> None:
    """Add (B, H, T, D) keys or values to a record, without padding and the first tokens: `used`, (B, T)."""
    for b, mask in enumerate(used):
        found = []
        for what, values in (("values", x), ("gradients", x.grad)):
            rows = None if values is None else _unturned(values[b], mask, positions[b], record.turns)
            if rows is not None and not bool(torch.isfinite(rows).all()):
                token = int(mask.nonzero()[(~torch.isfinite(rows)).any(0)][0])
                raise NonFiniteInput(f"'{record.name}': NaN or Inf in the {what} of calibration token {token}.")
            found.append(rows)
        record.add(*found)  # type: ignore[arg-type]


def _unturned(x: Tensor, mask: Tensor, positions: Tensor, turns: tuple[float, ...]) -> Tensor:
    """(H * D, t) float32: the tokens of (H, T, D) in the mask, their rotation undone."""
    rows = rotated(x.detach().float().cpu().mT, turn(turns, positions), back=True)
    return rows[..., mask].flatten(0, 1)


def _steadiest(keys: Tensor, used: Tensor, positions: Tensor, known: list[tuple[float, ...]]) -> tuple[float, ...]:
    """The rotation, or none, without which components spread least: what a model does to its keys is not asked for."""

    def spread(turns: tuple[float, ...]) -> float:
        rows = _unturned(keys[0], used[0], positions[0], turns)
        return float(rows.var(1, correction=0).clamp(min=1e-30).log().mean())

    fitting = [t for t in known if 2 * len(t) <= keys.shape[3] and bool(used[0].any())]
    return min([(), *fitting], key=spread) if fitting else ()


def _tensor(record: Record, method: Method) -> TensorSettings:
    """A frozen quantizer and its centre, without tables."""
    rows = record.rows
    if not rows.numel():
        raise UncalibratedQuantizer(f"'{record.name}' saw no tokens behind the first ones, which stay float.")
    static = method.source == "static"
    center = rows.mean(1) if static else torch.zeros(len(rows))
    axis = 1 if method.uses_channels else None
    quantizer = ActivationQuantizer(replace(method, channel_axis=axis), name=record.name)
    quantizer(as_seen(rows - center[:, None], record.heads, static))
    quantizer.freeze()
    book = build_codebook(quantizer, "none", None)
    return TensorSettings(quantizer, center, book, record.heads, record.width, record.turns)


def as_seen(rows: Tensor, heads: int, static: bool) -> Tensor:
    """(H * D, T) values as a quantizer takes them."""
    return rows.unsqueeze(0) if static else rows.unflatten(0, (heads, -1)).permute(2, 0, 1).flatten(0, 1)
