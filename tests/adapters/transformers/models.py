"""Small random decoders, settings for them, and a cache that does in float what a packed one does in bytes."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer

from dqa_plugins import DQA
from dqa_plugins.adapters.transformers import CacheSettings, calibrate_cache
from dqa_plugins.adapters.transformers.settings import TensorSettings

VOCABULARY = 61
SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0}
SMALL |= {"bos_token_id": 1, "eos_token_id": None}
MODELS = ("llama", "mistral", "gpt2")


@functools.cache
def model(name: str) -> PreTrainedModel:
    """Grouped queries, a sliding window of 24 tokens too, or neither; attention is sharp enough for keys to matter."""
    torch.manual_seed(0)
    made: PreTrainedModel
    if name == "llama":
        made = LlamaForCausalLM(LlamaConfig(**SMALL, initializer_range=0.2))
    elif name == "mistral":
        made = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=24, initializer_range=0.2))
    else:
        sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 512}
        tokens = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
        made = GPT2LMHeadModel(GPT2Config(**sizes, **tokens, initializer_range=0.2))
    for layer in made.model.layers if name != "gpt2" else ():
        layer.self_attn.k_proj.bias = torch.nn.Parameter(torch.randn(16))  # a mean for positions to rotate
    return made.eval()


def text(tokens: int, batch: int = 1, seed: int = 0) -> Tensor:
    """(batch, tokens) ids, none of them padding."""
    return torch.randint(2, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@functools.cache
def settings(name: str, **fields: Any) -> CacheSettings:
    """For a model above: a short window and short blocks, so that most tokens are packed."""
    fields = {"method": DQA(bits=4, granularity="channel"), "window": 6, "block": 8, **fields}
    return calibrate_cache(model(name), [text(200, 2)], **fields)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(..., T, D) with components d and d + n turned by angles (T, n)."""
    x, n = x.clone(), cos.shape[1]
    a, b = x[..., :n].clone(), x[..., n : 2 * n].clone()
    x[..., :n], x[..., n : 2 * n] = a * cos - b * sin, a * sin + b * cos
    return x


def rounded(x: Tensor, tensor: TensorSettings) -> Tensor:
    """(B, H, T, D) on the grid: what errors of later components ask for is added before an earlier one is rounded."""
    if not tensor.feedback.numel():
        rows = x.transpose(2, 3).flatten(1, 2)
        return tensor.quantizer.fake_quantize(rows).unflatten(1, (tensor.heads, -1)).transpose(2, 3)
    grid = tensor.quantizer.static_grid
    steps, high = grid.step.view(tensor.heads, -1), torch.as_tensor(grid.high).expand(grid.step.shape)
    out, wanted, high = x.clone(), torch.zeros_like(x), high.reshape(tensor.heads, -1)
    for j in reversed(range(x.shape[3])):
        ratio = (x[..., j] + wanted[..., j]) / steps[:, None, j]
        code = torch.where(ratio < 0, -1.0, 1.0) * torch.floor(ratio.abs() + 0.45)
        out[..., j] = torch.clamp(code, -high[:, None, j] - 1, high[:, None, j]) * steps[:, None, j]
        wanted += tensor.feedback[:, None, j] * (x[..., j] - out[..., j])[..., None]
    return out


class _RoundedLayer(DynamicLayer):
    """Keeps all tokens, and rounds in place those that a packed layer would have packed by now."""

    def __init__(self, owner: RoundedCache, index: int) -> None:
        super().__init__()
        self.owner, self.index, self.packed, self.seen = owner, index, 0, 0

    @property
    def _sliding(self) -> int | None:
        return self.owner.settings.sliding[self.index]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        past = min(self.seen, self._sliding - 1) if self._sliding else self.seen
        return past + query_length, self.seen - past

    def get_seq_length(self) -> int:
        return self.seen

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        s, past = self.owner.settings, self.get_mask_sizes(0)[0]
        keys, values = super().update(key_states, value_states)
        self.seen += key_states.shape[2]
        seen = keys[:, :, -past - key_states.shape[2] :].clone(), values[:, :, -past - key_states.shape[2] :].clone()
        head = 0 if self._sliding else s.first
        if self._sliding and key_states.shape[2] >= self._sliding - 1:
            self.packed = self.seen - self._sliding + 1  # all older ones are out of sight
        start = max(self.packed, head)
        while self.seen - start >= s.window + s.block:
            for tensor, x in zip(s.layers[self.index], (self.keys, self.values), strict=True):
                part = slice(start, start + s.block)
                angle = torch.arange(start, start + s.block).double()[:, None] * torch.tensor(tensor.turns).double()
                cos, sin = angle.cos().float(), angle.sin().float()
                plain = turned(x[:, :, part].float(), cos, -sin) - tensor.center.view(tensor.heads, 1, -1)
                plain = rounded(plain, tensor) + tensor.center.view(tensor.heads, 1, -1)
                x[:, :, part] = turned(plain, cos, sin).to(x.dtype)
            start = self.packed = start + s.block
        return seen


class RoundedCache(DynamicCache):
    """What a `PackedCache` computes with, without packing."""

    def __init__(self, made: CacheSettings) -> None:
        super().__init__()
        self.settings = made
        self.layer_class_to_replicate = None
        self.layers = [_RoundedLayer(self, i) for i in range(len(made.layers))]

    @property
    def is_sliding(self) -> list[bool]:
        return [s is not None for s in self.settings.sliding]
