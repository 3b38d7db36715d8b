"""transformers: a KV cache whose older tokens are packed bytes.

    settings = calibrate_cache(model, [input_ids], DQA(bits=4, granularity="channel"), target_bits=3.0)
    model.generate(prompt, past_key_values=PackedCache(settings, model.config))

Keys and values are quantized per channel with static steps and entropy coded by the coder of stored activations. The
first and the newest tokens stay float. Nothing of transformers is changed.
"""

from .cache import PackedCache
from .calibrate import calibrate_cache
from .settings import CacheSettings

__all__ = ["CacheSettings", "PackedCache", "calibrate_cache"]
