"""PackedLayer: the keys and values of one attention layer, oldest to newest

    first tokens, float | blocks, packed | newest tokens, float

Its state is a value that is replaced, never changed: what a forward makes is `pending` until the cache takes it, copies
share what they have in common, and a forward that fails has changed nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dqa_plugins.errors import ChannelMismatch, NonFiniteInput, UnsupportedCombination

from .blocks import Blocks, BlockStore, run
from .host import CacheLayerMixin
from .rotary import Turn
from .workspace import Workspace

Pair = tuple[Tensor, Tensor]


class State(NamedTuple):
    """What a layer holds.

    Attributes:
        head: keys and values of the first tokens, (B, H, n, D) each.
        rows: (keys, values) of each sequence: its packed blocks.
        tail: keys and values of the newest tokens.
        blocks: of each sequence.
        length: tokens seen, those that a sliding window has left behind included.
    """

    head: Pair
    rows: tuple[tuple[Blocks, Blocks], ...]
    tail: Pair
    blocks: int
    length: int


class PackedLayer(CacheLayerMixin):
    """One layer of a `PackedCache`.

    Args:
        stores: what packs and unpacks keys and values.
        window, first: tokens that stay float, the newest and the first ones.
        sliding: tokens that the layer attends to, None for all.
        workspace: shared by all layers of a cache: what `update` returns is valid until the next layer's.
    """

    is_croppable = True

    def __init__(
        self, stores: tuple[BlockStore, BlockStore], window: int, first: int, sliding: int | None, workspace: Workspace
    ) -> None:
        super().__init__()
        self.stores, self.window, self.workspace = stores, window, workspace
        self.first = 0 if sliding else first
        self.sliding_window, self.is_sliding = sliding, sliding is not None
        self.record_past = False
        self.state: State | None = None
        self.pending: State | None = None

    # ------------------------------------------------------------ what the host asks

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The empty state of these shapes, dtype and device."""
        self.state, self.is_initialized = _empty(key_states, value_states), True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Pair:
        """Keys and values of the past and the new tokens; what the layer then holds is `pending`.

        Args:
            key_states, value_states: (B, H, T, D), the new tokens'.

        Raises:
            ChannelMismatch: other heads, head sizes or sequences than before, or than calibrated.
            NonFiniteInput: NaN or Inf; the message names the layer and the token.
        """
        state, new = self.state or _empty(key_states, value_states), (key_states, value_states)
        self._check(state, new)
        seen, kept = self._read(state, new), self._pack(state, new)
        self.pending = kept
        return seen

    def commit(self) -> None:
        """What is pending is what the layer holds."""
        self.state, self.pending, self.is_initialized = self.pending, None, True

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.state.length if self.state is not None else 0

    def get_max_length(self) -> int:
        """The sliding window, -1 for none."""
        return self.sliding_window or -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens that `update` will return, position of the first)."""
        past = min(self.get_seq_length(), self._reach)
        return past + query_length, self.get_seq_length() - past

    def activate_past_recording(self) -> None:
        """Keep what leaves the sliding window until the next `crop`."""
        self.record_past = True

    def reset(self) -> None:
        """Forget everything."""
        self.state = self.pending = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens.

        Args:
            tokens_to_remove: their number, negative.

        Raises:
            UnsupportedCombination: a positive number, or tokens that a sliding window has left behind are needed.
        """
        if tokens_to_remove > 0:
            raise UnsupportedCombination(f"crop({tokens_to_remove}): give minus the number of tokens to remove.")
        state = self.state
        if state is None or (tokens_to_remove == 0 and not self.record_past):
            return
        if self.is_sliding and not self.record_past and state.length >= self._reach + 1:
            raise UnsupportedCombination(
                f"{self.stores[0].name}: the sliding window has left tokens behind; call activate_past_recording() "
                "before the forward that is to be cropped."
            )
        self.state = self._trimmed(self._cropped(state, -tokens_to_remove), self._reach)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequences in another order; one may come twice, or not at all."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences: a tensor of indices, or of a bool for each. Blocks are shared, not copied."""
        if self.state is None:
            return
        head, rows, tail, *rest = self.state
        indices = torch.arange(len(rows), device=head[0].device)[indices.to(head[0].device)]
        chosen = tuple(rows[i] for i in indices.tolist())
        self.state = State(_each(head, lambda x: x[indices]), chosen, _each(tail, lambda x: x[indices]), *rest)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times."""
        if self.state is not None:
            self.batch_select_indices(torch.arange(len(self.state.rows)).repeat_interleave(repeats))

    # ------------------------------------------------------------ how it does that

    @property
    def _reach(self) -> int:
        """Past tokens that a query attends to."""
        return self.sliding_window - 1 if self.sliding_window else 2**62

    def _check(self, state: State, new: Pair) -> None:
        rows = len(state.rows)
        for store, x in zip(self.stores, new, strict=True):
            wanted = (rows, store.heads, x.shape[2], store.width)
            if tuple(x.shape) != wanted:
                raise ChannelMismatch(
                    f"'{store.name}' holds {rows} sequences with {store.heads} heads of {store.width}; got a tensor of "
                    f"shape {tuple(x.shape)}. These are another model's settings, or another batch's cache."
                )
            if not bool(torch.isfinite(x.detach()).all()):
                bad = ~torch.isfinite(x.detach()).all(-1)
                row, head, token = bad.nonzero()[0].tolist()
                raise NonFiniteInput(
                    f"'{store.name}': NaN or Inf in {int(bad.sum())} of {bad.numel()} new vectors, the first at token "
                    f"{state.length + token} of sequence {row}, head {head}. The cache is as it was."
                )

    def _read(self, state: State, new: Pair) -> Pair:
        """Past and new tokens, as attention reads them."""
        held = _tokens(state, self.stores[0].block)
        skipped = max(0, held - self._reach)
        if not held:
            return new
        if not state.blocks:
            full = [torch.cat(parts, 2) for parts in zip(state.head, state.tail, new, strict=True)]
            return full[0][:, :, skipped:], full[1][:, :, skipped:]
        # autograd, and nobody else, would read them after the next layer has written
        fresh = torch.is_grad_enabled() and (new[0].requires_grad or new[1].requires_grad)
        block = self.stores[0].block
        first = min(max(0, skipped - state.head[0].shape[2]) // block, state.blocks)
        dropped = first * block
        start = state.head[0].shape[2]
        found = []
        for part, x in enumerate(new):
            shape = (x.shape[0], x.shape[1], held - dropped + x.shape[2], x.shape[3])
            out = x.new_empty(shape) if fresh else self.workspace.get(part, shape, x)
            out[:, :, :start] = state.head[part]
            out[:, :, -x.shape[2] - state.tail[part].shape[2] : -x.shape[2]] = state.tail[part]
            out[:, :, -x.shape[2] :] = x
            found.append(out)
        run(self._reads(state, first, found, start))
        return found[0][:, :, skipped - dropped :], found[1][:, :, skipped - dropped :]

    def _reads(self, state: State, first: int, out: list[Tensor], at: int) -> list[Any]:
        """What writes the blocks from `first` on into keys and values, from token `at`."""
        found = []
        for part, store in enumerate(self.stores):
            turn = self._turn(state, part, state.blocks)
            found += store.reads([row[part] for row in state.rows], first, out[part].detach(), at, turn)
        return found

    def _turn(self, state: State, part: int, blocks: int) -> Turn:
        """Angles of the tokens of a state's blocks, and of those behind them that become the next ones."""
        block = self.stores[0].block
        first = state.length - state.tail[0].shape[2] - state.blocks * block
        return self.workspace.turn(self.stores[part].settings.turns, first, blocks * block)

    def _pack(self, state: State, new: Pair) -> State:
        """The state with the new tokens."""
        block, before = self.stores[0].block, state.tail[0].shape[2]
        room = max(0, self.first - state.head[0].shape[2])
        with torch.no_grad():
            # a long prompt is not copied: blocks are packed from where it lies
            tail = _each(state.tail, lambda x, y: torch.cat([x, y], 2) if before else y, new)
            head = _each(state.head, lambda x, y: torch.cat([x, y[:, :, :room]], 2), tail) if room else state.head
            tail = _each(tail, lambda x: x[:, :, room:].detach())
            state = State(head, state.rows, tail, state.blocks, state.length + new[0].shape[2])
            if not self.record_past:
                state = self._trimmed(state, self._reach)
            count = max(0, (state.tail[0].shape[2] - self.window) // block)
            rows = state.rows
            if count:
                turns = [self._turn(state, part, state.blocks + count).behind(state.blocks * block) for part in (0, 1)]
                each = zip(self.stores, state.tail, turns, strict=True)
                packed = [s.pack(x[:, :, : count * block], turn) for s, x, turn in each]
                rows = tuple(
                    (self.stores[0].append(row[0], packed[0][i]), self.stores[1].append(row[1], packed[1][i]))
                    for i, row in enumerate(rows)
                )
            if count or room or not before:  # the newest tokens alone, not what they are a part of
                state = state._replace(tail=_each(state.tail, lambda x: x[:, :, count * block :].clone()))
            return state._replace(rows=rows, blocks=state.blocks + count)

    def _trimmed(self, state: State, reach: int) -> State:
        """Without the tokens that no later query attends to; whole blocks, or the oldest of the newest tokens."""
        tail, block = state.tail[0].shape[2], self.stores[0].block
        if tail >= reach:
            rest = _each(state.tail, lambda x: x[:, :, tail - reach :].clone())
            return state._replace(rows=(((), ()),) * len(state.rows), tail=rest, blocks=0)
        spare = (tail + state.blocks * block - reach) // block
        if spare <= 0:
            return state
        rows = tuple(
            (self.stores[0].part(k, spare, state.blocks), self.stores[1].part(v, spare, state.blocks))
            for k, v in state.rows
        )
        return state._replace(rows=rows, blocks=state.blocks - spare)

    def _cropped(self, state: State, count: int) -> State:
        """Without the newest `count` tokens; what is left of a cut block becomes float again, its values kept."""
        head, rows, tail, blocks, length = state
        block, width = self.stores[0].block, tail[0].shape[2]
        length = max(0, length - count)
        if count <= width:
            return State(head, rows, _each(tail, lambda x: x[:, :, : width - count].clone()), blocks, length)
        count -= width
        kept = max(0, blocks - -(-count // block))
        if count > blocks * block:
            most = max(0, head[0].shape[2] - (count - blocks * block))
            head = _each(head, lambda x: x[:, :, :most].clone())
        left = max(0, blocks * block - count - kept * block)
        tokens = (blocks - kept) * block
        whole = [x.new_empty((len(rows), s.heads, tokens, s.width)) for x, s in zip(tail, self.stores, strict=True)]
        run(self._reads(state, kept, whole, 0))
        rest = [x[:, :, :left].clone() for x in whole]
        short = tuple((self.stores[0].part(k, 0, kept), self.stores[1].part(v, 0, kept)) for k, v in rows)
        return State(head, short, (rest[0], rest[1]), kept, length)


def _empty(keys: Tensor, values: Tensor) -> State:
    """Of the shapes, dtype and device of (B, H, T, D) keys and values; no view of them, which would keep them alive."""
    nothing: tuple[tuple[Blocks, Blocks], ...] = (((), ()),) * keys.shape[0]
    pair = (torch.empty_like(keys[:, :, :0]), torch.empty_like(values[:, :, :0]))
    return State(pair, nothing, pair, 0, 0)


def _each(pair: Pair, change: Any, *others: Pair) -> Pair:
    """Of keys and of values."""
    found = [change(*parts) for parts in zip(pair, *others, strict=True)]
    return found[0], found[1]


def _tokens(state: State, block: int) -> int:
    """Tokens that a state holds."""
    return state.head[0].shape[2] + state.blocks * block + state.tail[0].shape[2]
