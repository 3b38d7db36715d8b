"""calibrate_cache: steps, centres and entropy tables of keys and values, from text that the model reads once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dqa_plugins.batches import Call, ItemReader
from dqa_plugins.errors import InvalidMethod, NonFiniteInput, UncalibratedQuantizer, UnsupportedCombination
from dqa_plugins.method import Method
from dqa_plugins.methods import DQA, check_method
from dqa_plugins.progress import counted
from dqa_plugins.quantizer import ActivationQuantizer
from dqa_plugins.storage.format.codebook import check_coding
from dqa_plugins.storage.tables import build_codebook, calibrate_tables

from .allocate import allocate_steps
from .host import DynamicCache, PreTrainedModel, identity, rotary_width, sliding_windows
from .settings import CacheSettings, TensorSettings
from .tables import shared_codebooks

KEPT = 4096  # tokens whose keys and values are kept, in runs of neighbours
_RUN = 128


@dataclass
class Record:
    """What calibration keeps of the keys, or the values, of one layer.

    Args:
        name: of its quantizer.
        heads, width: H and D.
        values: (H * D, tokens) float32 each.
        rotary: components of each head that a position rotates, d together with d + rotary / 2.
        squares: (H * D,) float64, sum of squared gradients.
        tokens: summed there.
    """

    name: str
    heads: int
    width: int
    rotary: int = 0
    values: list[Tensor] = field(default_factory=list)
    squares: Tensor | None = None
    tokens: int = 0

    @property
    def rows(self) -> Tensor:
        """(H * D, tokens)."""
        return torch.cat(self.values, 1)

    @property
    def sensitivity(self) -> Tensor:
        """(H * D,) mean squared gradient; one for two components that turn into each other from token to token."""
        if self.squares is None:
            raise UncalibratedQuantizer(f"'{self.name}' has no gradients.")
        heads = (self.squares / max(self.tokens, 1)).view(self.heads, self.width).clone()
        turning = heads[:, : self.rotary].unflatten(1, (2, -1))
        turning[:] = turning.mean(1, keepdim=True)
        return heads.flatten()


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
    coding: str = "joint",
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
        target_bits: bits for each packed value, without tables. Steps are then inversely proportional to the root of
            the mean squared gradient of the model's loss on this text, and `bits` only bounds the codes.
        coding: "joint": codes entropy coded; "none": fixed width; "shift_error": the DQA paper's.
        window, block, first: see `CacheSettings`.
        inputs: a function from a batch to the inputs, as everywhere.

    Raises:
        NotAMethod, InvalidMethod, UnknownCoding: an argument is out of range.
        UnsupportedCombination: a layer, or a method, that is not packed.
        UncalibratedQuantizer: no tokens. NonFiniteInput: NaN or Inf in keys, values or gradients.
    """
    method = check_method(method or DQA(bits=4, granularity="channel"), "calibrate_cache")
    _check(method, target_bits, check_coding(coding))
    calls = ItemReader(model, "calibrate_cache", inputs=inputs).items(batches)
    layers = decide(observe(model, calls, target_bits is not None, first), method, target_bits, coding, block)
    sliding = tuple(sliding_windows(model.config))
    return CacheSettings(identity(model.config), layers, sliding, window, block, first)


def decide(
    records: Sequence[Sequence[Record]], method: Method, target_bits: float | None, coding: str, block: int
) -> tuple[tuple[TensorSettings, TensorSettings], ...]:
    """The (keys, values) of each layer, from what `observe` kept of them."""
    flat = [record for pair in records for record in pair]
    rows = [record.rows for record in flat]
    tensors = [_tensor(record, method) for record in flat]
    if target_bits is not None:
        tensors = allocate_steps(tensors, rows, [r.sensitivity for r in flat], float(target_bits), block)
    elif coding == "joint" and all(t.has_steps for t in tensors):
        tensors = shared_codebooks(tensors, rows, block)
    elif coding != "none":
        seen = [as_seen(r - t.center[:, None], t.heads, t.by_channel) for t, r in zip(tensors, rows, strict=True)]
        books = [calibrate_tables(t.quantizer, x, coding) for t, x in zip(tensors, seen, strict=True)]
        tensors = [replace(t, book=book) for t, book in zip(tensors, books, strict=True)]
    return tuple(zip(tensors[::2], tensors[1::2], strict=True))


def _check(method: Method, target_bits: float | None, coding: str) -> None:
    if method.source == "predicted" or method.target_density or coding == "auto":
        raise UnsupportedCombination(
            f"a packed cache takes static or dynamic methods without values kept in float, and a coding that is not "
            f"'auto'; got {method!r}, coding={coding!r}."
        )
    if target_bits is None:
        return
    if isinstance(target_bits, bool) or not isinstance(target_bits, int | float) or not 0.5 <= target_bits <= 8:
        raise InvalidMethod(f"target_bits={target_bits!r}: a number of bits per value from 0.5 to 8.")
    if method.source != "static" or method.granularity != "channel" or method.uses_range or coding != "joint":
        raise UnsupportedCombination(
            "target_bits sets a step for each channel: it takes a static method with granularity='channel' and a "
            f"scale, under joint coding; got {method!r}, coding={coding!r}."
        )


def observe(model: PreTrainedModel, calls: Iterable[Call], gradients: bool, first: int) -> list[list[Record]]:
    """Run a decoder on calibration text; (keys, values) of each layer.

    Args:
        gradients: of the loss, too.
        first: tokens of each sequence that are left out: their keys and values are unlike all others.

    Raises:
        UnsupportedCombination: a layer has no keys and values of its own, or there is no text.
    """
    layers = len(sliding_windows(model.config))
    records: list[list[Record]] = []
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
            del outputs
            if len(cache.seen) != layers:
                raise UnsupportedCombination(f"{len(cache.seen)} of {layers} layers used the cache; all have to.")
            for i, pair in sorted(cache.seen.items()):
                if i == len(records):
                    names = [f"{i}.{name}" for name in ("keys", "values")]
                    turned = (rotary_width(model.config, pair[0].shape[3]), 0)
                    parts = zip(names, pair, turned, strict=True)
                    records.append([Record(n, x.shape[1], x.shape[3], r) for n, x, r in parts])
                for record, x in zip(records[i], pair, strict=True):
                    _keep(record, x, mask, first)
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
def _keep(record: Record, x: Tensor, mask: Tensor, first: int) -> None:
    """Add (B, H, T, D) keys or values to a record, without padding and the first tokens."""
    used = (mask & (mask.cumsum(1) > first)).to(x.device)
    rows = x.detach().transpose(1, 2)[used].flatten(1).float().cpu()  # (tokens, H * D)
    squares = None if x.grad is None else x.grad.transpose(1, 2)[used].flatten(1).double().square().cpu()
    for what, values in (("values", rows), ("squared gradients", squares)):
        if values is not None and not bool(torch.isfinite(values).all()):
            token = int((~torch.isfinite(values)).any(1).nonzero()[0]) + first
            raise NonFiniteInput(f"'{record.name}': NaN or Inf in the {what} of calibration token {token}.")
    kept = sum(v.shape[1] for v in record.values)
    record.values.append(rows[: max(0, KEPT - kept)].T.contiguous())
    if squares is not None:
        record.squares = squares.sum(0) if record.squares is None else record.squares + squares.sum(0)
        record.tokens += len(squares)


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
    return TensorSettings(quantizer, center, build_codebook(quantizer, "none", None), record.heads, record.width)


def as_seen(rows: Tensor, heads: int, static: bool) -> Tensor:
    """(H * D, T) values as a quantizer takes them."""
    return rows.unsqueeze(0) if static else rows.unflatten(0, (heads, -1)).permute(2, 0, 1).flatten(0, 1)
