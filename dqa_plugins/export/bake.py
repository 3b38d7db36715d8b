"""Weights as the exporters want them: plain modules that hold the quantized weight.

Frameworks leave reference modules (float weight, fake-quantized in every forward), which fail torch.compile and
torch.export. Replacing them by plain modules which hold the fake-quantized weight changes no bit of the output.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

_PLAIN: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
    nn.Embedding,
    nn.EmbeddingBag,
)


def _is_reference(module: nn.Module) -> bool:
    return callable(getattr(module, "get_weight", None)) and ".quantized.reference" in type(module).__module__


@torch.no_grad()
def _plain(module: Any) -> nn.Module:
    kind: Any = next(base for base in type(module).__mro__ if base in _PLAIN)
    plain: Any = kind.__new__(kind)
    nn.Module.__init__(plain)
    for name, value in module.__dict__.items():
        if name not in plain.__dict__ and not name.startswith("weight_"):
            plain.__dict__[name] = value
    plain.training = module.training
    plain.weight = nn.Parameter(module.get_weight().detach().clone(), requires_grad=False)
    if hasattr(module, "bias"):
        plain.bias = None if module.bias is None else nn.Parameter(module.bias.detach().clone(), requires_grad=False)
    return plain


def bake(model: nn.Module) -> nn.Module:
    """A copy of a converted model whose reference modules are plain ones. Outputs are the same bit for bit.

    Args:
        model: converted by any adapter; models without reference modules are only copied.
    """
    model = copy.deepcopy(model)
    for path, module in list(model.named_modules()):
        if _is_reference(module):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, _plain(module))
    return model
