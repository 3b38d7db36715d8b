"""Networks of timm, small or shortened: transformers, mixers, norm-free ones, other convolutional designs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .entry import Entry, prepare_torchvision


def named(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A function that builds a timm network with ten classes and random weights."""

    def build() -> nn.Module:
        prepare_torchvision()
        import timm

        network: nn.Module = timm.create_model(name, pretrained=False, num_classes=10, **options)
        return network

    return build


def made(path: str, **options: Any) -> Callable[[], nn.Module]:
    """A function that builds a network of ten classes by its class: create_model takes not all of its sizes."""

    def build() -> nn.Module:
        prepare_torchvision()
        import importlib

        module, _, kind = path.partition(".")
        models = importlib.import_module(f"timm.models.{module}")
        # blocks and layers are given by the names that the file has for them
        sizes = {key: getattr(models, value) if isinstance(value, str) else value for key, value in options.items()}
        network: nn.Module = getattr(models, kind)(num_classes=10, **sizes)
        return network

    return build


def _made(family: str, path: str, **options: Any) -> Entry:
    return Entry(family, "timm", made(path, **options))


def _entry(family: str, name: str, *, shape: tuple[int, ...] = (3, 64, 64), batch: int = 4, **options: Any) -> Entry:
    return Entry(family, "timm", named(name, **options), shape=shape, batch=batch)


VIT, MIXER, FREE = "vision transformer", "mixer", "norm-free"
SMALL: dict[str, Any] = {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 4}

TOKENS: dict[str, Any] = {"img_size": 64, "patch_size": 8, "num_blocks": 2, "embed_dim": 64}

ENTRIES = {
    "vit": _entry(VIT, "vit_tiny_patch16_224", patch_size=8, **SMALL),
    "deit_distilled": _entry(VIT, "deit_tiny_distilled_patch16_224", patch_size=8, **SMALL),
    "beit": _entry(VIT, "beit_base_patch16_224", patch_size=8, **SMALL),
    "cait": _entry(VIT, "cait_xxs24_224", patch_size=8, **SMALL),
    "xcit": _entry(VIT, "xcit_nano_12_p16_224", **SMALL),
    "levit": _entry(VIT, "levit_128s", img_size=64),
    "pvt_v2": _entry(VIT, "pvt_v2_b0"),
    "mobilevit": _entry(VIT, "mobilevit_xxs"),
    "edgenext": _entry(VIT, "edgenext_xx_small"),
    "efficientvit": _entry(VIT, "efficientvit_b0"),
    "focalnet": _made(VIT, "focalnet.FocalNet", embed_dim=32, depths=(1, 1, 1, 1)),
    "mixer": _made(MIXER, "mlp_mixer.MlpMixer", **TOKENS),
    "resmlp": _made(MIXER, "mlp_mixer.MlpMixer", block_layer="ResBlock", norm_layer="Affine", mlp_ratio=4, **TOKENS),
    "gmlp": _made(
        MIXER, "mlp_mixer.MlpMixer", block_layer="SpatialGatingBlock", mlp_layer="GatedMlp", mlp_ratio=4, **TOKENS
    ),
    "convmixer": _made(MIXER, "convmixer.ConvMixer", dim=64, depth=3),
    "poolformer": _made(MIXER, "metaformer.MetaFormer", depths=(1, 1, 1, 1), dims=(16, 32, 64, 64)),
    "sequencer": _entry(MIXER, "sequencer2d_s", img_size=64, layers=(1, 1, 1, 1), embed_dims=(32, 64, 64, 64)),
    "nf_resnet": _entry(FREE, "nf_resnet26", width_factor=0.25),
    "nf_regnet": _entry(FREE, "nf_regnet_b0"),
    "res2net": _entry("cnn", "res2net50_26w_4s", layers=(1, 1, 1, 1)),
    "resnest": _entry("cnn", "resnest14d"),
    "repvgg": _entry("cnn", "repvgg_a0"),
    "mobilenet_v4": _entry("cnn", "mobilenetv4_conv_small_050"),
    "botnet": _entry("cnn", "botnet26t_256", img_size=64),
}
