"""What the zoo knows of a network, and how its random weights become plausible."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CHANGED = 1e-2  # a layer scale below it is an initial value that training leaves at once


@dataclass(frozen=True)
class Entry:
    """One network.

    Attributes:
        family: "cnn", "detection", "segmentation", "video", "vision transformer", "text", "audio", "mixer", ...
        source: the package it comes from.
        build: makes it with random weights; imports its package inside.
        shape: of one sample: of an image, or (length,) with `ids`.
        ids: inputs are token ids below this number; 0: they are normally distributed.
        batch: samples in a batch.
        inputs: tensors that the network takes, all of `shape`.
    """

    family: str
    source: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (3, 64, 64)
    ids: int = 0
    batch: int = 4
    inputs: int = 1

    def model(self) -> nn.Module:
        """The network with seeded weights and settled batch norms, in eval mode."""
        torch.manual_seed(0)
        return settle(self.build(), [self.batch_of(seed) for seed in (101, 102, 103)])

    def batch_of(self, seed: int) -> tuple[Tensor, ...]:
        """Positional inputs."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch, *self.shape)
        if self.ids:
            return tuple(torch.randint(1, self.ids, shape, generator=generator) for _ in range(self.inputs))
        return tuple(torch.randn(shape, generator=generator) for _ in range(self.inputs))


class Part(nn.Module):
    """A network of whose result some tensors are the output.

    Args:
        network: any module.
        pick: result -> tensor or tuple of tensors.
        name: of its input, where it has to be given by name.
        options: further keyword arguments.
    """

    def __init__(self, network: nn.Module, pick: Callable[[Any], Any], name: str | None = None, **options: Any) -> None:
        super().__init__()
        self.network, self.pick, self.name, self.options = network, pick, name, options

    def forward(self, x: Tensor) -> Any:
        if self.name is None:
            return self.pick(self.network(x, **self.options))
        return self.pick(self.network(**{self.name: x}, **self.options))


class EncoderDecoder(Part):
    """The same of a network that takes the decoder's token ids too."""

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.pick(self.network(input_ids=x, decoder_input_ids=y, **self.options))


@torch.no_grad()
def settle(model: nn.Module, batches: list[tuple[Tensor, ...]]) -> nn.Module:
    """Weights that stand for trained ones: no branch is switched off, batch norms know their inputs. In place.

    Norm weights spread around one; parameters that start at zero, or nearly so (positions, layer scales), do not.
    Class tokens are as large as the patches beside them: one that is near zero is lost in their range at any width.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # a plain average
            if module.affine:
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.1)
    for name, parameter in model.named_parameters():
        flat = parameter.flatten()
        if "bias" in name.rpartition(".")[2] and parameter.ndim == 1:
            parameter.normal_(std=0.02)
        elif re.search(r"(class|cls|dist)_token", name):
            parameter.normal_(std=0.5)
        elif flat.numel() and flat.abs().max() < CHANGED and bool((flat == flat[0]).all()):
            parameter.uniform_(0.1, 0.5) if parameter.ndim == 1 else parameter.normal_(std=0.02)
    modules = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if modules:
        model.eval()
        for module in modules:
            module.train()
        for batch in batches:
            model(*batch)
    return model.eval().requires_grad_(False)


def prepare_torchvision() -> None:
    """Import torchvision where it is installed, even beside another build of torch (CPU) than it was made for.

    Its compiled part does not load there, and its Python part, which timm and transformers import, fails at operators
    that are not declared.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for module in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[module]
        importlib.import_module("torchvision")
