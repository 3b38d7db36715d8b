"""A model with a packed cache computes what it computes with the same numbers in float."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from dqa_plugins import DQA, Direct
from dqa_plugins.adapters.transformers import PackedCache

from .models import MODELS, RoundedCache, model, settings, text

models = pytest.mark.parametrize("name", MODELS)
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "target": {"do_sample": False},
}


def generate(name: str, cache: Any, prompt: torch.Tensor, **fields: Any) -> torch.Tensor:
    torch.manual_seed(1)
    mask = prompt.ne(0).long()
    fields = {"max_new_tokens": 40, "attention_mask": mask, **fields}
    return model(name).generate(prompt, past_key_values=cache, **fields)


@models
@pytest.mark.parametrize("way", WAYS)
def test_generation_is_that_of_the_rounded_cache(name: str, way: str) -> None:
    made = settings(name, **({"target_bits": 2.5} if way == "target" else {}))
    prompt = text(37, 2, seed=3)
    packed = PackedCache(made, model(name).config)
    found = generate(name, packed, prompt, **WAYS[way])
    assert packed.layers[0].state.blocks > 0  # there was something to unpack
    assert torch.equal(found, generate(name, RoundedCache(made), prompt, **WAYS[way]))


def test_rounding_matters() -> None:
    """Else the test above could not fail."""
    prompt = text(37, 2, seed=3)
    assert not torch.equal(
        generate("llama", RoundedCache(settings("llama")), prompt), generate("llama", DynamicCache(), prompt)
    )


@models
def test_padded_batches(name: str) -> None:
    prompt = text(37, 2, seed=4)
    prompt[0, :11] = 0
    made = settings(name)
    assert torch.equal(generate(name, PackedCache(made), prompt), generate(name, RoundedCache(made), prompt))


@models
def test_nothing_packed_is_exact(name: str) -> None:
    made = settings(name).replace(window=400)
    prompt = text(37, 2, seed=5)
    expected = generate(name, DynamicCache(config=model(name).config), prompt)
    assert torch.equal(generate(name, PackedCache(made), prompt), expected)


@models
@torch.no_grad()
def test_a_text_in_pieces(name: str) -> None:
    """Pieces shorter and longer than windows and blocks, one token included."""
    made, ids = settings(name), text(150, 2, seed=6)
    packed, rounded = PackedCache(made), RoundedCache(made)
    for piece in ids.split([5, 1, 1, 9, 30, 1, 40, 2, 50, 11], 1):
        a = model(name)(piece, past_key_values=packed).logits
        b = model(name)(piece, past_key_values=rounded).logits
        assert torch.equal(a, b), (a - b).abs().max()
    assert packed.get_seq_length() == 150


@pytest.mark.parametrize(
    ("method", "coding"),
    [
        (Direct(bits=4, granularity="channel"), "none"),
        (DQA(bits=3, granularity="channel"), "joint"),
        (DQA(bits=3), "shift_error"),
        (Direct(bits=6), "joint"),  # one step for all channels
        (Direct(bits=5, granularity="channel", symmetric=False), "joint"),
    ],
)
def test_methods_without_a_target(method: Any, coding: str) -> None:
    made = settings("llama", method=method, coding=coding)
    prompt = text(37, 2, seed=7)
    assert torch.equal(generate("llama", PackedCache(made), prompt), generate("llama", RoundedCache(made), prompt))


def test_a_scale_for_each_token() -> None:
    """The baseline: each head of each token is divided by its own largest value."""
    made = settings("llama", method=Direct(bits=4, qparams="dynamic"), coding="none")
    cache, ids = PackedCache(made), text(80, 2, seed=8)
    with torch.no_grad():
        model("llama")(ids, past_key_values=cache)
        keys = cache.layers[1].update(*(torch.zeros(2, 2, 1, 8),) * 2)[0]
        exact = DynamicCache()
        model("llama")(ids, past_key_values=exact)
    x = exact.layers[1].keys[:, :, 4 : 4 + 8 * cache.layers[1].state.blocks]
    step = x.abs().amax(-1, keepdim=True) / 8
    expected = (x / step).round().clamp(-8, 7) * step
    assert cache.layers[1].state.blocks == 8
    torch.testing.assert_close(keys[:, :, 4 : 4 + x.shape[2]], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    made, half = settings("llama"), copy.deepcopy(model("llama")).to(dtype)
    ids = text(90, seed=9)
    packed, rounded = PackedCache(made), RoundedCache(made)
    with torch.no_grad():
        for piece in ids.split(30, 1):
            a, b = (half(piece, past_key_values=cache).logits for cache in (packed, rounded))
    assert a.dtype == dtype
    assert torch.equal(a, b)


def test_generations_in_threads_do_not_mix() -> None:
    made = settings("llama")
    prompts = [text(30 + 7 * i, 2, seed=i) for i in range(4)]
    alone = [generate("llama", PackedCache(made), p) for p in prompts]
    found: dict[int, torch.Tensor] = {}

    def work(i: int) -> None:
        mask = torch.ones_like(prompts[i])
        found[i] = model("llama").generate(
            prompts[i], past_key_values=PackedCache(made), attention_mask=mask, max_new_tokens=40, do_sample=False
        )

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], alone[i]) for i in range(4))


@torch.no_grad()
def test_generations_in_turns_do_not_mix() -> None:
    made, pieces = settings("llama"), text(90, seed=2).split(1, 1)
    a, b, alone = PackedCache(made), PackedCache(made), PackedCache(made)
    for piece in pieces:
        found = model("llama")(piece, past_key_values=a).logits
        model("llama")(61 - piece, past_key_values=b)
        expected = model("llama")(piece, past_key_values=alone).logits
        assert torch.equal(found, expected)


def test_gradients_do_not_read_overwritten_memory() -> None:
    """Layers share a workspace; autograd reads all layers' keys at the end."""
    made, ids = settings("llama"), text(90, seed=2)
    found = []
    for cache in (PackedCache(made), RoundedCache(made)):
        twin = copy.deepcopy(model("llama"))
        with torch.no_grad():
            twin(ids[:, :60], past_key_values=cache)
        twin(ids[:, 60:], past_key_values=cache).logits.square().mean().backward()
        found.append(twin.model.layers[0].self_attn.q_proj.weight.grad)
    assert torch.equal(*found)
