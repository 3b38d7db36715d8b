"""The stage of a ranking: a copy of the model whose quantizers do what the search tells them to.

The user's model is never run: it cannot be left in another state, whatever happens. On the copy every quantizer is
frozen with the qparams that the user's own will have once frozen, its extra bits are zero (so it is Direct at n bits),
and its `forward` is replaced by a `Seam`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..consumers import find_consumer
from ..errors import UncalibratedQuantizer, UnsupportedCombination
from ..methods import DQA, NoisyQuant
from ..quantizer import ActivationQuantizer
from ..sites import iter_quantizers
from .errors import RankingError


class Seam:
    """What a quantizer of the copy does with its input.

    Attributes:
        active: False: return x (float). True: quantize.
        left_out: the channel that stays float: None, one index, or a (B,) tensor with one per sample (-1: none).
        tap: if set, called with (x, self.direct) in place of everything else; its result is returned.
        calls: if not None, the (input, output) of each call is appended.
    """

    def __init__(self, quantizer: ActivationQuantizer, name: str) -> None:
        self.quantizer = quantizer
        self.name = name
        self.rankable = isinstance(quantizer.method, DQA)
        self.active = False
        self.left_out: int | Tensor | None = None
        self.tap: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor] | None = None
        self.calls: list[tuple[Tensor, Tensor]] | None = None

    def __call__(self, x: Tensor, *predictions: Tensor) -> Tensor:
        if self.tap is not None:
            return self.tap(x, self.direct)
        y = x if not self.active else self.without(x, self.direct(x, *predictions), self.left_out)
        if self.calls is not None:
            self.calls.append((x, y))
        return y

    def direct(self, x: Tensor, *predictions: Tensor) -> Tensor:
        """The quantizer's own forward: Direct at n bits where channels can be ranked. Not the tensor x itself."""
        forward = type(self.quantizer).forward
        if x.ndim == 1:  # the quantizer would call its own forward, which is this seam
            return forward(self.quantizer, x.unsqueeze(1), *predictions).squeeze(1)
        return forward(self.quantizer, x, *predictions)

    def without(self, x: Tensor, quantized: Tensor, channel: int | Tensor | None) -> Tensor:
        """`quantized` (B, C, ...) with the left-out channel taken from x, in place."""
        if channel is None or quantized is x:
            return quantized
        into, source = self.channels_first(quantized), self.channels_first(x)
        if isinstance(channel, int):
            into[:, channel] = source[:, channel]
        else:
            rows = (channel >= 0).nonzero().squeeze(1)
            into[rows, channel[rows]] = source[rows, channel[rows]]
        return quantized

    def changes(self, x: Tensor, quantized: Tensor) -> Tensor:
        """(B, C) bool: whether leaving the channel out changes anything in the sample."""
        return self.channels_first(x != quantized).flatten(2).any(2)

    def channels_first(self, x: Tensor) -> Tensor:
        """A view of x, (B, ...), with its channels on axis 1 and at least one position: (B, C, L, ...)."""
        x = x.unsqueeze(1) if x.ndim == 1 else x.movedim(self.quantizer.channel_axis, 1)
        return x.unsqueeze(2) if x.ndim == 2 else x


class Stage:
    """A frozen copy of a prepared and calibrated model.

    Args:
        model: the user's; it is only copied.

    Attributes:
        model: the copy, in eval mode, on the model's device.
        seams: one per quantizer, in order of execution.

    Raises:
        UncalibratedQuantizer: a quantizer saw no data.
        UnsupportedCombination: no quantizer has important channels, or one is in the qat state.
        RankingError: two quantizers have one name.
    """

    def __init__(self, model: nn.Module) -> None:
        check_rankable(model)
        self.model = copy.deepcopy(model).requires_grad_(False)
        for module in self.model.modules():
            module.training = False  # .eval() raises on the graphs of torch.export
        self.seams: list[Seam] = []
        for name, quantizer in iter_quantizers(self.model):
            if isinstance(quantizer.method, DQA):
                quantizer.set_extra_bits(torch.zeros(quantizer.num_channels or 0, dtype=torch.int64))
            quantizer.freeze(_consumer_weight(quantizer, self.model))
            self.seams.append(Seam(quantizer, name))
        self._install()

    def _install(self) -> None:
        for seam in self.seams:
            object.__setattr__(seam.quantizer, "forward", seam)

    def copy(self) -> Stage:
        """An independent stage in the same state, in channels-last memory format."""
        twin = copy.copy(self)
        twin.model, twin.seams = copy.deepcopy((self.model, self.seams))
        twin._install()
        twin.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return twin

    def follow(self, other: Stage) -> None:
        """Take over what the seams of a stage of the same model do."""
        for seam, leader in zip(self.seams, other.seams, strict=True):
            seam.active, seam.left_out = leader.active, leader.left_out

    def float_from(self, index: int) -> None:
        """Quantizers before `index` quantize (with what they leave out), it and those after it do not."""
        for position, seam in enumerate(self.seams):
            seam.active = position < index


def check_rankable(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """The quantizers of a model whose channels can be ranked, by site name, in order of execution.

    Raises:
        UncalibratedQuantizer, UnsupportedCombination, RankingError: see `Stage`.
    """
    quantizers = list(iter_quantizers(model))
    if not quantizers:
        raise RankingError(
            f"{type(model).__name__} has no ActivationQuantizer. Prepare it with one of the adapters and calibrate it "
            "before its channels are ranked."
        )
    names: set[str] = set()
    for name, quantizer in quantizers:
        if name in names:
            raise RankingError(f"two quantizers are called {name!r}; a rank table needs a name of its own for each.")
        names.add(name)
        label = _label(name, quantizer)
        if not quantizer.calibrated:
            raise UncalibratedQuantizer(
                f"{label} was ranked without having seen data. Run the prepared model on calibration "
                "batches first, or leave the layer out of quantization."
            )
        if quantizer.state == "qat":
            raise UnsupportedCombination(
                f"{label} is in the qat state, whose qparams still move. Rank the channels before training "
                "(prepare without QAT, rank, and apply the table to the QAT model)."
            )
    rankable = {name: q for name, q in quantizers if isinstance(q.method, DQA)}
    if not rankable:
        raise UnsupportedCombination(
            f"{_label(*quantizers[0])} has no important channels, nor has any other quantizer of the model; use DQA to "
            "rank channels."
        )
    return rankable


def _label(name: str, quantizer: ActivationQuantizer) -> str:
    """As `ActivationQuantizer.label`, with the site's name also where the quantizer was placed by hand."""
    return f"{name!r} ({type(quantizer.method).__name__}, {quantizer.method.bits} bits)"


def _consumer_weight(quantizer: ActivationQuantizer, model: nn.Module) -> Tensor | None:
    """The next linear layer's weight, (O, D), where NoisyQuant's search asks for it and the graph knows it."""
    method = quantizer.method
    if not isinstance(method, NoisyQuant) or method.objective != "output" or not isinstance(model, GraphModule):
        return None
    for node in model.graph.nodes:
        if node.op != "call_module":
            continue
        if any(module is quantizer for module in model.get_submodule(str(node.target)).modules()):
            layer: Any = find_consumer(node, model)
            return None if layer is None else layer.weight.detach().flatten(1)
    return None
