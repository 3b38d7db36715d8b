"""Everything this room takes from transformers, in one place, with the error for a missing or a changed one."""

from __future__ import annotations

from dqa_plugins.errors import FrameworkMismatch, UnsupportedCombination, missing
from dqa_plugins.host.hooks import Host, check_version

try:
    import transformers
except ImportError as error:
    raise missing("transformers", "transformers", "dqa_plugins.adapters.transformers") from error

HOST = Host("transformers", transformers.__version__, "5.23.0", "transformers")

try:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, get_layer_types_and_kwargs
except ImportError as error:
    raise FrameworkMismatch(
        f"transformers {transformers.__version__} lacks what its adapter stands on ({error}); {HOST.way_out}."
    ) from error

check_version(HOST)

_SHAPE = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
# from a cache's point of view chunked attention is sliding attention: only the mask differs
_PLAIN = ("full_attention", "sliding_attention", "chunked_attention")


def identity(config: PreTrainedConfig) -> dict[str, str]:
    """What tells the decoder of one architecture from that of another."""
    decoder = config.get_text_config(decoder=True)
    return {name: str(getattr(decoder, name, None)) for name in (*_SHAPE, "vocab_size")}


def sliding_windows(config: PreTrainedConfig) -> list[int | None]:
    """Tokens that each layer of a decoder attends to; None: all.

    Raises:
        UnsupportedCombination: a layer keeps something other than keys and values, or reads those of another layer.
    """
    types, keywords = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    other = {f"{i} ({name})" for i, name in enumerate(types) if name not in _PLAIN}
    if other:
        raise UnsupportedCombination(
            f"layers {', '.join(sorted(other))} of {config.model_type}: only full, sliding and chunked attention with "
            "keys and values of its own is packed. Use transformers' DynamicCache for this model."
        )
    return [settings.get("sliding_window") for settings in keywords]


def frequencies(model: PreTrainedModel) -> list[tuple[float, ...]]:
    """Those of a model's rotary embeddings, radians per token: one tuple for each kind that there is."""
    buffers = (b for name, b in model.named_buffers() if name.endswith("inv_freq") and b.ndim == 1)
    return sorted({tuple(b.double().tolist()) for b in buffers})


__all__ = [
    "HOST",
    "Cache",
    "CacheLayerMixin",
    "DynamicCache",
    "PreTrainedConfig",
    "PreTrainedModel",
    "frequencies",
    "identity",
    "sliding_windows",
]
