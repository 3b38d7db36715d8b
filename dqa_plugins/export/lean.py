"""Quantizers as the exporters want them: the same numerics with every constant precomputed.

An ActivationQuantizer resolves zero scales, lays parameters out and checks channels in each forward. In an exported
graph that would be fifty nodes per quantizer, most of them constants to fold. Here they are buffers, one set per rank
of the input; what is left is the arithmetic of `functional`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from dqa_plugins import functional as F
from dqa_plugins.methods import DQA, DenseSparse, NoisyQuant
from dqa_plugins.qparams import QParams, lay_out
from dqa_plugins.qpp.predictor import Predictor
from dqa_plugins.quantizer import ActivationQuantizer


class LeanPredictor(nn.Module):
    """A fitted predictor without its calibration record."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        for name in ("weight", "bias", "logarithmic", "low", "high", "rate", "centres", "bumps"):
            self.register_buffer(name, getattr(predictor, name))
        self.mode, self.groups, self.note = predictor.mode, predictor.groups, predictor.note
        self.own = predictor.own

    def forward(self, features: Tensor, *notes: Tensor) -> Tensor:
        """As `Predictor.forward`."""
        return Predictor.forward(self, features, *notes)  # type: ignore[arg-type]


class LeanQuantizer(nn.Module):
    """A frozen quantizer for tensors of known ranks. Outputs are those of the quantizer, bit for bit.

    Args:
        quantizer: frozen.
        ranks: the number of dimensions of each tensor it will see.
    """

    def __init__(self, quantizer: ActivationQuantizer, ranks: Iterable[int]) -> None:
        super().__init__()
        # not a submodule: its buffers would become hundreds of unused inputs of the exported graph
        self._quantizer = (quantizer,)
        self.ranks = tuple(sorted(set(ranks)))
        for rank in self.ranks:
            for name, value in _constants(quantizer, rank).items():
                self.register_buffer(f"{name}_{rank}", value)
        self.predictor = None if quantizer.predictor is None else LeanPredictor(quantizer.predictor)

    @property
    def original(self) -> ActivationQuantizer:
        """The quantizer it stands for."""
        return self._quantizer[0]

    def forward(self, x: Tensor, prediction: Tensor | None = None) -> Tensor:
        """Fake-quantize x, (B, ...), of one of the ranks."""
        original = self.original
        if prediction is None:
            if original.tap is not None and original.tap[1]:
                original.tap[0].tap(original.name, original.tap[1], x)
            if original.predictor is not None:
                prediction = original.predictor.predict(original, x, self.predictor)
        if x.ndim not in self.ranks:
            return original.fake_quantize(x, prediction)
        constants = {
            name.removesuffix(f"_{x.ndim}"): value
            for name, value in self.named_buffers(recurse=False)
            if name.endswith(f"_{x.ndim}")
        }
        return _apply(original, x, prediction, constants)


def _constants(quantizer: ActivationQuantizer, rank: int) -> dict[str, Tensor]:
    """Everything of `functional`'s arguments that does not depend on x."""
    method, axis = quantizer.method, quantizer.channel_axis
    like = torch.empty([1] * rank, device=quantizer.scale.device)
    found: dict[str, Tensor] = {}

    def laid(vector: Tensor) -> Tensor:
        return lay_out(vector.reshape(-1), like, axis, per_sample=False)

    if isinstance(method, DQA):
        found["step"] = laid(quantizer.grid_step)
        found["low"], found["high"] = laid(quantizer.grid_low), laid(quantizer.grid_high)
    if isinstance(method, NoisyQuant):
        found["noise"] = laid(quantizer.noise)
    if method.qparams != "static":
        return found
    if quantizer.scale.numel():
        scale = laid(quantizer.scale) * found.pop("step") if isinstance(method, DQA) else laid(quantizer.scale)
        found["scale"], found["divisor"] = scale, F.nonzero(scale)
        if isinstance(method, NoisyQuant):
            found["bias"] = found.pop("noise") * scale
        return found
    found["lower"], found["upper"] = laid(quantizer.lower), laid(quantizer.upper)
    scale, zero_point = F.affine_qparams(found["lower"], found["upper"], method.bits)
    if bool((scale > 0).all()):
        found["scale"], found["zero_point"] = scale, zero_point
    return found


def _apply(
    quantizer: ActivationQuantizer, x: Tensor, prediction: Tensor | None, constants: dict[str, Tensor]
) -> Tensor:
    method = quantizer.method
    low: Tensor | int
    high: Tensor | int
    low, high = F.code_range(method.bits, quantizer.signed)
    if isinstance(method, DQA):
        low, high = constants["low"], constants["high"]
    if method.qparams == "static" and "divisor" in constants:
        return F.grid_fake_quantize(
            x, constants["scale"], low, high, bias=constants.get("bias"), divisor=constants["divisor"]
        )
    if method.qparams == "static":
        qparams = QParams(None, constants["lower"], constants["upper"])
    else:
        qparams = quantizer.runtime_qparams(x, prediction)
    if qparams.scale is not None:
        scale = qparams.scale * constants["step"] if "step" in constants else qparams.scale
        bias = constants["noise"] * qparams.scale if "noise" in constants else None
        return F.grid_fake_quantize(x, scale, low, high, bias=bias)
    grid = (constants["scale"], constants["zero_point"]) if "zero_point" in constants else None
    function = F.dense_sparse_fake_quantize if isinstance(method, DenseSparse) else F.affine_fake_quantize
    return function(x, qparams.lower, qparams.upper, method.bits, grid=grid)  # type: ignore[arg-type]


@torch.no_grad()
def lean(model: nn.Module, inputs: Sequence[object]) -> nn.Module:
    """Replace the quantizers of a model by lean ones, in place.

    Args:
        model: every quantizer frozen; a single ActivationQuantizer is replaced too.
        inputs: example inputs; the model is run once to see the rank of each quantizer's tensors.

    Returns:
        the model (or the LeanQuantizer that stands for it).
    """
    ranks: dict[ActivationQuantizer, list[int]] = {m: [] for m in model.modules() if isinstance(m, ActivationQuantizer)}

    def note(quantizer: nn.Module, args: tuple[Tensor, ...]) -> None:
        ranks[quantizer].append(args[0].ndim)  # type: ignore[index]

    hooks = [quantizer.register_forward_pre_hook(note) for quantizer in ranks]
    try:
        model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    lean_ones = {quantizer: LeanQuantizer(quantizer, seen) for quantizer, seen in ranks.items()}
    if isinstance(model, ActivationQuantizer):
        return lean_ones[model]
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, ActivationQuantizer) and module in lean_ones:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, lean_ones[module])
    return model
