"""Networks of transformers, two layers each: text encoders and decoders, speech, vision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .entry import EncoderDecoder, Entry, Part, prepare_torchvision

WORDS = 200
SIZES: dict[str, Any] = {"vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDE: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


def first(result: Any) -> Any:
    """The first tensor of a result."""
    return result[0]


def network(
    kind: str, name: str = "input_ids", *, head: str = "Model", call: dict[str, Any] | None = None, **config: Any
) -> Callable[[], nn.Module]:
    """A function that builds `<kind><head>` of a `<kind>Config`, called with an input of this name."""

    def build() -> nn.Module:
        prepare_torchvision()
        import transformers

        model = getattr(transformers, f"{kind}{head}")(getattr(transformers, f"{kind}Config")(**config))
        part = EncoderDecoder if name == "decoder_input_ids" else Part
        return part(model, first, name, return_dict=False, **call or {})

    return build


def _text(build: Callable[[], nn.Module], inputs: int = 1) -> Entry:
    return Entry("text", "transformers", build, shape=(12,), ids=WORDS, inputs=inputs)


def _image(build: Callable[[], nn.Module], size: int = 64) -> Entry:
    return Entry("vision transformer", "transformers", build, shape=(3, size, size))


def _decoder(kind: str, head: str = "ForCausalLM", **config: Any) -> Entry:
    return _text(network(kind, head=head, call={"use_cache": False}, **SIZES, **config))


ENCODER: dict[str, Any] = {**SIZES, **WIDE}
GROUPED: dict[str, Any] = {**WIDE, "num_key_value_heads": 2}
WAVE: dict[str, Any] = {
    **ENCODER,
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
}
SPEECH: dict[str, Any] = {
    **SIZES,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "num_mel_bins": 16,
    "max_source_positions": 24,
    "decoder_start_token_id": 1,
}
T5: dict[str, Any] = {
    **SIZES,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
SEGFORMER: dict[str, Any] = {
    "hidden_sizes": [16, 32, 32, 64],
    "depths": [1, 1, 1, 1],
    "decoder_hidden_size": 32,
}


def _whisper_encoder() -> nn.Module:
    prepare_torchvision()
    import transformers

    model = transformers.WhisperModel(transformers.WhisperConfig(**SPEECH)).encoder
    return Part(model, first, "input_features", return_dict=False)


ENTRIES = {
    "bert": _text(network("Bert", **ENCODER)),
    "distilbert": _text(network("DistilBert", vocab_size=WORDS, dim=64, n_layers=2, n_heads=4, hidden_dim=128)),
    "albert": _text(network("Albert", embedding_size=32, **ENCODER)),
    "t5_encoder": _text(network("T5", head="EncoderModel", **T5)),
    "t5": _text(network("T5", "decoder_input_ids", call={"use_cache": False}, **T5), inputs=2),
    "gpt2": _decoder("GPT2", head="LMHeadModel", n_embd=64, n_layer=2, n_head=4),
    "opt": _decoder("OPT", word_embed_proj_dim=64, ffn_dim=128, **{k: v for k, v in WIDE.items() if "inter" not in k}),
    "bloom": _decoder("Bloom", hidden_size=64, n_layer=2, n_head=4),
    "llama": _decoder("Llama", **GROUPED),
    "qwen2": _decoder("Qwen2", **GROUPED),
    "gemma": _decoder("Gemma", head_dim=16, **GROUPED),
    "whisper_encoder": Entry("audio", "transformers", _whisper_encoder, shape=(16, 48)),
    "wav2vec2": Entry("audio", "transformers", network("Wav2Vec2", "input_values", **WAVE), shape=(1600,)),
    "hf_vit": _image(network("ViT", "pixel_values", image_size=64, patch_size=8, **WIDE)),
    "segformer": _image(network("Segformer", "pixel_values", head="ForSemanticSegmentation", **SEGFORMER)),
    "hf_convnext": Entry(
        "cnn",
        "transformers",
        network("ConvNext", "pixel_values", hidden_sizes=[16, 32, 64, 64], depths=[1, 1, 1, 1]),
    ),
}
