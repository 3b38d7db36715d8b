"""PackedCache as an object: what it refuses, what a failure leaves behind, copies, cropping, bytes."""

from __future__ import annotations

import copy
import importlib
import json
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save, save_file
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from dqa_plugins import DQA, Direct
from dqa_plugins.adapters.transformers import CacheSettings, PackedCache, calibrate_cache
from dqa_plugins.adapters.transformers.calibrate import Record
from dqa_plugins.errors import (
    ChannelMismatch,
    DQAError,
    InvalidArgument,
    MissingDependency,
    NonFiniteInput,
    StateMismatch,
    UncalibratedQuantizer,
    UnsupportedCombination,
)
from dqa_plugins.storage import CorruptFrame, UnsupportedFrame

from .models import MODELS, SMALL, RoundedCache, model, settings, text

models = pytest.mark.parametrize("name", MODELS)
PIECES = (40, 3, 1, 60)


@torch.no_grad()
def filled(name: str = "llama", batch: int = 2, **fields: Any) -> PackedCache:
    """A cache that has seen 104 tokens."""
    cache = PackedCache(settings(name, **fields))
    for piece in text(sum(PIECES), batch, seed=11).split(PIECES, 1):
        model(name)(piece, past_key_values=cache)
    return cache


@torch.no_grad()
def answer(cache: PackedCache, name: str = "llama", batch: int = 2) -> torch.Tensor:
    """Logits of five more tokens; the cache itself is left as it is."""
    return model(name)(text(5, batch, seed=12), past_key_values=copy.deepcopy(cache)).logits


# ------------------------------------------------------------ memory


def test_every_byte_is_counted() -> None:
    cache = filled()
    packed = floats = 0
    for layer in cache.layers:
        packed += sum(
            part.nbytes for row in layer.state.rows for blocks in row for segment in blocks for part in segment
        )
        floats += sum(x.nbytes for x in (*layer.state.head, *layer.state.tail))
    memory = cache.memory()
    assert (memory["packed"], memory["float"]) == (packed, floats)
    assert cache.bits_per_value == 8 * (packed + floats) / (2 * 104 * 3 * 2 * 16)
    blocks = cache.layers[0].state.blocks
    assert blocks == (104 - 4 - 6) // 8
    assert packed < 2 * blocks * 8 * 3 * 2 * 16  # under a byte a value, in small blocks too


def test_layers_share_one_workspace_and_one_set_of_tables() -> None:
    cache = filled()
    assert cache.memory()["workspace"] <= 2 * 4 * 2 * 16 * (104 + 256)
    plans = [coder.plan for coder in cache.settings.coders.values()]
    assert all(plan.decoders is plans[0].decoders for plan in plans)
    for plan in plans:  # two clusters may have got the same table
        assert sorted(plan.channels.tolist()) == list(range(16))


def test_sequences_of_a_beam_share_their_blocks() -> None:
    cache = filled()
    before = cache.memory()["packed"]
    cache.batch_repeat_interleave(4)
    assert cache.batch_size == 8
    assert cache.memory()["packed"] == before


# ------------------------------------------------------------ select, crop, copy


@models
def test_sequences_are_selected_and_reordered(name: str) -> None:
    cache, alone = filled(name), answer(filled(name), name)
    cache.reorder_cache(torch.tensor([1, 0]))
    flipped = model(name)(text(5, 2, seed=12).flip(0), past_key_values=cache).logits
    torch.testing.assert_close(flipped.flip(0), alone, atol=1e-5, rtol=1e-5)
    one = filled(name)
    one.batch_select_indices(torch.tensor([False, True]))
    torch.testing.assert_close(answer(one, name, 1)[0], filled_answer(name)[1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def filled_answer(name: str) -> torch.Tensor:
    """Five tokens more, the same for both sequences."""
    return model(name)(text(5, 1, seed=12).expand(2, -1), past_key_values=filled(name)).logits


@models
@pytest.mark.parametrize("count", [1, 9, 33, 102])
@torch.no_grad()
def test_cropped_tokens_were_never_there(name: str, count: int) -> None:
    """Up to rounding: what is left of a block that is cut keeps its packed values."""
    whole, cache = filled(name), PackedCache(settings(name))
    for piece in text(104, 2, seed=11).split(PIECES, 1):
        cache.activate_past_recording()
        model(name)(piece, past_key_values=cache)
    cache.crop(-count)
    assert cache.get_seq_length() == 104 - count
    reads = []
    for c in (whole, cache):
        zero = [torch.zeros(2, s.heads, 1, s.width) for s in c.layers[1].stores]
        reads.append([x[:, :, :-1].clone() for x in c.layers[1].update(*zero)])
    for a, b in zip(*reads, strict=True):
        past = min(a.shape[2] - count if name != "mistral" else 23, b.shape[2])
        if name != "mistral":
            torch.testing.assert_close(b, a[:, :, :past], atol=1e-6, rtol=0)
        assert b.shape[2] == min(104 - count, past)


def test_a_sliding_window_is_cropped_only_with_its_past() -> None:
    with pytest.raises(UnsupportedCombination, match="activate_past_recording"):
        filled("mistral").crop(-1)
    with pytest.raises(UnsupportedCombination, match="minus the number"):
        filled().crop(3)


@torch.no_grad()
def test_recording_the_past_of_a_sliding_window() -> None:
    """A guess that is taken back leaves what would have been there without it."""
    ids = text(70, seed=3)
    for made in (settings("mistral"), settings("mistral").replace(window=400)):
        straight, guessing = PackedCache(made), PackedCache(made)
        guessing.activate_past_recording()
        for piece in ids.split(10, 1):
            expected = model("mistral")(piece, past_key_values=straight).logits
            model("mistral")(text(7, seed=5), past_key_values=guessing)
            guessing.crop(-7)
            found = model("mistral")(piece, past_key_values=guessing).logits
            guessing.crop(0)
            assert torch.equal(found, expected) or made.window < 400  # a guess may have packed a block too early
            held = [c.layers[0].get_mask_sizes(1) for c in (guessing, straight)]
            assert held[0] == held[1]
            assert guessing.layers[0].state.blocks <= 4


@models
def test_a_copy_lives_by_itself(name: str) -> None:
    cache = filled(name)
    before, twin = answer(cache, name), copy.deepcopy(cache)
    model(name)(text(50, 2, seed=13), past_key_values=twin)
    assert twin.get_seq_length() == 154
    assert cache.get_seq_length() == 104
    assert torch.equal(answer(cache, name), before)


def test_reset() -> None:
    cache = filled()
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.memory() | {"settings": 0} == {"packed": 0, "float": 0, "workspace": 0, "settings": 0}
    assert torch.equal(answer(cache), answer(PackedCache(settings("llama"))))


# ------------------------------------------------------------ bytes


@models
def test_bytes_and_back(name: str) -> None:
    cache = filled(name)
    back = PackedCache.from_bytes(cache.to_bytes(), settings(name))
    assert torch.equal(answer(back, name), answer(cache, name))
    assert back.to_bytes() == cache.to_bytes()


def test_bytes_of_frames_and_of_an_empty_cache() -> None:
    fields = {"method": Direct(bits=4, qparams="dynamic"), "coding": "none"}
    cache = filled(**fields)
    back = PackedCache.from_bytes(cache.to_bytes(), settings("llama", **fields))
    assert torch.equal(answer(back), answer(cache))
    empty = PackedCache(settings("llama"))
    assert PackedCache.from_bytes(empty.to_bytes(), settings("llama")).get_seq_length() == 0


def resigned(body: bytes) -> bytes:
    return struct.pack("<4sB3xI", b"DQAC", 1, zlib.crc32(body)) + body


def test_hostile_bytes_are_refused() -> None:
    """Whatever is changed, with or without a checksum that fits: a typed error, or a cache that can be read."""
    good = filled(batch=1).to_bytes()
    made, generator = settings("llama"), torch.Generator().manual_seed(0)
    for bad in (b"", good[:11], good[:-1], good + b"x", b"XXXX" + good[4:], "text", good[:12]):
        with pytest.raises(CorruptFrame):
            PackedCache.from_bytes(bad, made)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedFrame):
        PackedCache.from_bytes(good[:4] + b"\x02" + good[5:], made)
    refused = 0
    for _ in range(60):
        at = int(torch.randint(12, len(good), (), generator=generator))
        value = int(torch.randint(256, (), generator=generator))
        changed = good[:at] + bytes([value]) + good[at + 1 :]
        if value != good[at]:
            with pytest.raises(CorruptFrame):
                PackedCache.from_bytes(changed, made)
        try:
            cache = PackedCache.from_bytes(resigned(changed[12:]), made)
            assert answer(cache, batch=1).shape == (1, 5, 61)
        except DQAError:
            refused += 1
    assert refused > 3


def test_a_forged_header_is_refused() -> None:
    tensors = load(filled(batch=1).to_bytes()[12:])
    header = json.loads(tensors["header"].numpy().tobytes())
    layer = {"length": 104, "past": False}
    for change in (
        {"layers": []},
        {"layers": [{**layer, "length": 10**9}] * 3},
        {"layers": [{**layer, "length": "104"}] * 3},
        {"layers": [{**layer, "length": 103}] * 3},
        {"settings": None},
        "[" * 100_000,
        None,
    ):
        raw = change.encode() if isinstance(change, str) else json.dumps(change and {**header, **change}).encode()
        forged = {**tensors, "header": torch.frombuffer(bytearray(raw), dtype=torch.uint8)}
        with pytest.raises((CorruptFrame, StateMismatch)):
            PackedCache.from_bytes(resigned(save(forged)), settings("llama"))
    for name, wrong in (
        ("1.values.tail", None),
        ("1.values.head", tensors["1.values.head"][..., :3].contiguous()),
        ("1.values.tail", tensors["1.values.tail"] * float("nan")),
        ("1.keys.0.sizes", -tensors["1.keys.0.sizes"]),
        ("1.keys.0.data", tensors["1.keys.0.data"][1:]),
        ("1.keys.0.data", tensors["1.keys.0.data"].float()),
    ):
        forged = {k: v for k, v in {**tensors, name: wrong}.items() if v is not None}
        with pytest.raises(CorruptFrame):
            PackedCache.from_bytes(resigned(save(forged)), settings("llama"))


def test_bytes_need_the_settings_they_were_written_with() -> None:
    with pytest.raises(StateMismatch, match="other cache settings"):
        PackedCache.from_bytes(filled().to_bytes(), settings("llama").replace(window=7))


# ------------------------------------------------------------ what is refused


def test_another_models_settings_are_refused_by_name() -> None:
    with pytest.raises(StateMismatch, match=r"another model \(llama\): model_type llama, not gpt2"):
        PackedCache(settings("llama"), model("gpt2").config)
    with pytest.raises(ChannelMismatch, match=r"'0.keys' holds .* 2 heads of 8; .*another model's settings"):
        model("gpt2")(text(5), past_key_values=PackedCache(settings("llama")))


@torch.no_grad()
def test_models_with_fewer_or_more_layers_are_refused() -> None:
    short = LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_hidden_layers": 2})).eval()
    cache = PackedCache(settings("llama"))
    short(text(5), past_key_values=cache)
    with pytest.raises(StateMismatch, match=r"did not reach layers \[2\]"):
        short(text(5), past_key_values=cache)
    deep = LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_hidden_layers": 4})).eval()
    with pytest.raises(StateMismatch, match="layer 3: these settings, of llama, have layers 0 to 2"):
        deep(text(5), past_key_values=PackedCache(settings("llama")))


@torch.no_grad()
def test_nan_names_layer_and_token_and_changes_nothing() -> None:
    cache = filled()
    before = answer(cache)

    def spoil(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[1, 3] = float("nan")
        return out

    handle = model("llama").model.layers[1].self_attn.v_proj.register_forward_hook(spoil)
    try:
        with pytest.raises(NonFiniteInput, match=r"'1.values': NaN or Inf .* first at token 107 of sequence 1, head 0"):
            model("llama")(text(9, 2), past_key_values=cache)
    finally:
        handle.remove()
    assert cache.get_seq_length() == 104
    assert torch.equal(answer(cache), before)
    model("llama")(text(9, 2), past_key_values=cache)  # and it goes on
    assert cache.get_seq_length() == 113


@pytest.mark.parametrize("earlier", [True, False])
@torch.no_grad()
def test_a_forward_that_fails_changes_nothing(earlier: bool) -> None:
    cache = filled() if earlier else PackedCache(settings("llama"))
    before, length = answer(cache), cache.get_seq_length()

    def fail(module: Any, args: Any) -> None:
        raise KeyboardInterrupt

    handle = model("llama").model.layers[1].mlp.register_forward_pre_hook(fail)
    try:
        with pytest.raises(KeyboardInterrupt):
            model("llama")(text(30, 2), past_key_values=cache)
    finally:
        handle.remove()
    assert cache.get_seq_length() == length
    assert torch.equal(answer(cache), before)
    if not earlier:  # nothing tells a failure from settings with too many layers, but that a second try goes well
        with pytest.raises(StateMismatch, match="call it again"):
            model("llama")(text(30, 2), past_key_values=cache)
    model("llama")(text(30, 2), past_key_values=cache)
    assert cache.get_seq_length() == length + 30


@torch.no_grad()
def test_a_first_forward_that_is_refused_leaves_no_shape_behind() -> None:
    cache = PackedCache(settings("llama"))
    with pytest.raises(ChannelMismatch):
        model("gpt2")(text(5, 3), past_key_values=cache)
    model("llama")(text(5, 2), past_key_values=cache)
    assert (cache.batch_size, cache.get_seq_length()) == (2, 5)


def test_another_batch_is_refused() -> None:
    with pytest.raises(ChannelMismatch, match="holds 2 sequences"):
        model("llama")(text(5, 3), past_key_values=filled())


# ------------------------------------------------------------ calibration and settings


def test_settings_in_files(tmp_path: Path) -> None:
    made = settings("llama")
    made.save(tmp_path)
    back = CacheSettings.load(tmp_path)
    assert back.fingerprint == made.fingerprint
    ids = text(100, 2, seed=1)
    with torch.no_grad():
        a, b = (
            [model("llama")(p, past_key_values=c).logits for p in ids.split(50, 1)][1]
            for c in (PackedCache(made), PackedCache(back))
        )
    assert torch.equal(a, b)


@pytest.mark.parametrize("change", ["schema", "layers", "method", "sliding", "cut", "nan", "book"])
def test_damaged_settings_are_refused(tmp_path: Path, change: str) -> None:
    settings("llama").save(tmp_path)
    described, tensors = json.loads((tmp_path / "cache.json").read_text()), load_file(tmp_path / "cache.safetensors")
    if change == "schema":
        described["schema"] = "another"
    elif change == "layers":
        described["layers"] = 7
    elif change == "method":
        described["layers"][1]["method"]["bits"] = 99
    elif change == "sliding":
        described["sliding"] = [None]
    elif change == "nan":
        tensors["1.keys.center"][3] = float("nan")
    elif change == "book":
        tensors["1.keys.book"][:20] = 255
    (tmp_path / "cache.json").write_text(json.dumps(described))
    save_file(tensors, tmp_path / "cache.safetensors")
    if change == "cut":
        (tmp_path / "cache.safetensors").write_bytes(b"\x08")
    with pytest.raises(DQAError):
        CacheSettings.load(tmp_path)


@pytest.mark.parametrize("target", [1.5, 3.0])
def test_target_bits_are_met_by_what_is_packed(target: float) -> None:
    made = settings("gpt2", target_bits=target, block=32)
    cache = PackedCache(made)
    with torch.no_grad():
        model("gpt2")(text(400, 2), past_key_values=cache)
    packed = 8 * cache.memory()["packed"] / (2 * cache.layers[0].state.blocks * 32 * 3 * 2 * 32)
    assert abs(packed / target - 1) < 0.12  # another text than that of calibration, and short


def test_steps_follow_sensitivity() -> None:
    """A channel that the loss depends on more gets a finer step."""
    twin = copy.deepcopy(model("gpt2"))
    with torch.no_grad():  # values that the output ignores, but for the first head
        for block in twin.transformer.h:
            block.attn.c_proj.weight[8:] *= 0.01
    made = calibrate_cache(twin, [text(200, 2)], target_bits=2.5, window=6, block=8)
    for _, values in made.layers:
        steps = values.quantizer.static_grid.step
        assert steps[:8].max() < 0.2 * steps[8:].min()


def test_padding_does_not_count() -> None:
    ids = text(120, 1)
    padded = torch.cat([torch.zeros(1, 30, dtype=torch.int64), ids], 1)
    mask = padded.ne(0).long()
    position = (mask.cumsum(1) - 1).clamp(min=0)
    batch = {"input_ids": padded, "attention_mask": mask, "position_ids": position}
    plain = calibrate_cache(model("llama"), [ids], target_bits=3.0, block=8)
    found = calibrate_cache(model("llama"), [batch], target_bits=3.0, block=8)
    for a, b in zip(plain.layers, found.layers, strict=True):
        for s, t in zip(a, b, strict=True):
            torch.testing.assert_close(s.center, t.center, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(s.quantizer.scale, t.quantizer.scale, atol=1e-4, rtol=0.02)


def test_calibration_leaves_the_model_alone() -> None:
    twin = copy.deepcopy(model("llama")).train()
    before = copy.deepcopy(twin.state_dict())
    calibrate_cache(twin, [text(200)], target_bits=3.0, block=16)
    assert twin.training
    assert all(p.requires_grad and p.grad is None for p in twin.parameters())
    assert all(torch.equal(v, before[k]) for k, v in twin.state_dict().items())


def test_what_calibration_refuses() -> None:
    llama = model("llama")
    with pytest.raises(InvalidArgument, match=r"target_bits=0\.1"):
        calibrate_cache(llama, [text(60)], target_bits=0.1)
    with pytest.raises(InvalidArgument, match=r"window=-1:"):
        calibrate_cache(llama, [text(60)], window=-1)
    with pytest.raises(UnsupportedCombination, match=r"granularity='channel'"):
        calibrate_cache(llama, [text(60)], DQA(bits=4), target_bits=3.0)
    with pytest.raises(UncalibratedQuantizer, match="no batches"):
        calibrate_cache(llama, [])
    with pytest.raises(UncalibratedQuantizer, match="saw no tokens"):
        calibrate_cache(llama, [text(4)])
    mixed = LlamaForCausalLM(LlamaConfig(**SMALL, layer_types=["full_attention", "linear_attention", "full_attention"]))
    with pytest.raises(UnsupportedCombination, match=r"1 \(linear_attention\)"):
        calibrate_cache(mixed, [text(60)])


def test_identity_is_that_of_the_decoder() -> None:
    with pytest.raises(StateMismatch, match="num_hidden_layers 3, not 4"):
        settings("gpt2").require(GPT2Config(vocab_size=61, n_embd=32, n_layer=4, n_head=4))
    settings("gpt2").require(model("gpt2").config)


def test_rounded_cache_is_no_packed_one() -> None:
    """The reference of test_generate shares no code with what it is held against."""
    assert not isinstance(RoundedCache(settings("llama")), PackedCache)


def test_rotation_is_undone_where_it_steadies_keys() -> None:
    """Keys of a decoder with rotary embeddings, but not values, nor keys of one without."""
    found = {name: {t.turns for t, _ in settings(name).layers} for name in MODELS}
    inverse = tuple(model("llama").model.rotary_emb.inv_freq.double().tolist())
    assert found == {"llama": {inverse}, "mistral": {inverse}, "gpt2": {()}}
    assert all(t.turns == () for name in MODELS for _, t in settings(name).layers)


def test_the_factor_is_that_of_the_mean_outer_product() -> None:
    """Shrunk towards the mean of its diagonal; heads by themselves."""
    g = torch.randn(6, 500, generator=torch.Generator().manual_seed(0))
    record = Record("0.keys", 2, 3)
    for part in g.split(100, 1):
        record.add(part, part)
    for h, r in enumerate(record.factor):
        own = g[3 * h : 3 * h + 3].double()
        expected = own @ own.T / 500
        assert torch.equal(r, r.triu())
        floor = 0.05 * expected.trace() / 3 * torch.eye(3)
        torch.testing.assert_close(r.T @ r, expected + floor, rtol=1e-4, atol=1e-6)


def test_what_is_kept_comes_from_all_over_the_text() -> None:
    record = Record("0.keys", 1, 1)
    for piece in torch.arange(20_000.0).split(2_000):
        record.add(piece[None], None)
    found = record.rows[0]
    assert found.numel() <= 4096
    assert (found.min(), found.max() > 19_000, float(found.diff().max()) < 1_000) == (0, True, True)


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "dqa_plugins.adapters.transformers.host")
    with pytest.raises(MissingDependency, match=r"\[transformers\]"):
        importlib.import_module("dqa_plugins.adapters.transformers.host")
