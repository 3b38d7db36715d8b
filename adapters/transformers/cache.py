"""PackedCache: a KV cache of transformers whose older tokens are packed bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dqa_plugins.errors import StateMismatch

from .blocks import BlockStore
from .host import Cache, PreTrainedConfig
from .layer import PackedLayer
from .saving import read_states, write_states
from .settings import CacheSettings
from .workspace import Workspace


class PackedCache(Cache):
    """Goes into any decoder's `forward(past_key_values=...)` and `generate(past_key_values=...)`.

    All layers unpack into one workspace: what `update` returns is valid until the next layer's update. A forward either
    reaches every layer or changes nothing.

    Args:
        settings: from `calibrate_cache`.
        config: of the model that it is used with, to be checked against the settings; None: shapes alone are.

    Raises:
        StateMismatch: the settings are another model's.
    """

    layers: list[PackedLayer]  # type: ignore[assignment]

    def __init__(self, settings: CacheSettings, config: PreTrainedConfig | None = None) -> None:
        if config is not None:
            settings.require(config)
        self.settings, self.workspace = settings, Workspace()
        self._complete = False  # whether a forward has reached every layer
        self._failed = False  # whether an update of the last one raised
        layers = []
        for pair, sliding in zip(settings.layers, settings.sliding, strict=True):
            keys, values = (BlockStore(t, settings.block, settings.coders.get(t.quantizer.name)) for t in pair)
            layers.append(PackedLayer((keys, values), settings.window, settings.first, sliding, self.workspace))
        super().__init__(layers=layers)  # type: ignore[arg-type]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of the past and the new tokens of a layer, (B, H, T, D) each.

        Raises:
            StateMismatch: there is no such layer, or the first forward has left layers out.
            ChannelMismatch, NonFiniteInput: see `PackedLayer.update`; the cache is as it was.
        """
        if not 0 <= layer_idx < len(self.layers):
            raise StateMismatch(f"layer {layer_idx}: {self._whose} have layers 0 to {len(self.layers) - 1}.")
        if self.layers[layer_idx].pending is not None:  # a forward that did not reach every layer
            self._give_up()
        try:
            found = self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)
        except BaseException:
            self._failed = True
            raise
        if all(layer.pending is not None for layer in self.layers):
            for layer in self.layers:
                layer.commit()
            self._complete, self._failed = True, False
        return found

    @property
    def _whose(self) -> str:
        return f"these settings, of {self.settings.model.get('model_type')},"

    def _give_up(self) -> None:
        """Forget what a forward has left unfinished.

        Raises:
            StateMismatch: no forward has ever reached every layer, so that the settings may have too many.
        """
        missing = [i for i, layer in enumerate(self.layers) if layer.pending is None]
        for layer in self.layers:
            layer.pending = None
        if missing and not (self._complete or self._failed):
            raise StateMismatch(
                f"the last forward did not reach layers {missing}: {self._whose} belong to a model with "
                f"{len(self.layers)} layers, or that forward failed. If it did, call it again: nothing was kept of it."
            )
        self._failed = False

    # ------------------------------------------------------------ what it holds

    def memory(self) -> dict[str, int]:
        """Bytes held: "packed" (blocks), "float" (first and newest tokens), "workspace", "settings" (shared)."""
        blocks = {id(b): b.nbytes for s in self._states for row in s.rows for part in row for b in part}
        floats = {id(x): x.nbytes for s in self._states for pair in (s.head, s.tail) for x in pair}
        found = {"packed": sum(blocks.values()), "float": sum(floats.values())}
        return found | {"workspace": self.workspace.nbytes, "settings": self.settings.nbytes}

    @property
    def bits_per_value(self) -> float:
        """Bits held for each key and value of the tokens held, first and newest tokens included."""
        held = self.memory()
        return 8 * (held["packed"] + held["float"]) / max(1, self._values())

    def _values(self) -> int:
        total = 0
        for layer in self.layers:
            if layer.state is not None:
                tokens = layer.state.head[0].shape[2] + layer.state.tail[0].shape[2]
                tokens += layer.state.blocks * self.settings.block
                total += len(layer.state.rows) * tokens * sum(s.heads * s.width for s in layer.stores)
        return total

    @property
    def _states(self) -> list[Any]:
        return [layer.state for layer in self.layers if layer.state is not None]

    @property
    def batch_size(self) -> int:
        """Sequences; -1 while empty."""
        return len(self._states[0].rows) if self._states else -1

    # ------------------------------------------------------------ copies and bytes

    def reset(self) -> None:
        """Forget everything, the workspace's memory included."""
        super().reset()
        self.workspace.clear()
        self._failed = False

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedCache:
        """A cache of its own, which shares blocks and settings: neither is ever changed."""
        twin = type(self)(self.settings)
        for mine, layer in zip(self.layers, twin.layers, strict=True):
            layer.state, layer.is_initialized = mine.state, mine.is_initialized
            layer.record_past = mine.record_past
        twin._complete = self._complete
        return twin

    def to_bytes(self) -> bytes:
        """Everything that is held, but not the settings."""
        return write_states(self.settings, self.layers)

    @classmethod
    def from_bytes(cls, data: bytes, settings: CacheSettings, device: torch.device | str = "cpu") -> PackedCache:
        """Inverse of `to_bytes`.

        Raises:
            CorruptFrame: damaged or contradictory bytes. StateMismatch: written with other settings.
        """
        cache = cls(settings)
        for layer, state in zip(
            cache.layers, read_states(data, settings, cache.layers, torch.device(device)), strict=True
        ):
            layer.state, layer.is_initialized = state, state is not None
        cache._complete = any(layer.is_initialized for layer in cache.layers)
        return cache
