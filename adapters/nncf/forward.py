"""The forward of a quantized model, as torch.compile can live with it."""

from __future__ import annotations

import torch
from nncf.torch.function_hook.wrapper import ForwardWithHooks
from torch import nn


class EagerForward(ForwardWithHooks):
    """NNCF's forward, which Dynamo leaves alone.

    Dynamo cannot enter NNCF's function mode, compiles what is called inside it, and fails there ("NameError:
    ___get_torch_function_mode_stack_at", torch 2.13 with NNCF 3.4, for models of stock nncf.quantize too). So
    `torch.compile` of a wrapped model runs it as it is. To compile it for good, compile what torch.export makes of it:
    `torch.compile(torch.export.export(model, inputs).module(), fullgraph=True)`.
    """

    __call__ = torch.compiler.disable(ForwardWithHooks.__call__)


def keep_eager(model: nn.Module) -> nn.Module:
    """Give a model that NNCF wrapped an EagerForward, in place."""
    forward = model.forward
    if isinstance(forward, ForwardWithHooks) and not isinstance(forward, EagerForward):
        del model.forward  # the constructor refuses a model that has one
        model.forward = EagerForward(model, forward.orig_forward)
    return model
