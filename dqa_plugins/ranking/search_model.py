"""The model that a ranking runs: a frozen copy whose quantizers do what the search tells them to.

The user's model is never run: it cannot be left in another state, whatever happens. On the copy every quantizer is
frozen with the qparams that the user's own will have once frozen, its extra bits are zero (so it is Direct at n bits),
and its `forward` is replaced by a `SearchSite`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..errors import UncalibratedQuantizer, UnsupportedCombination
from ..graph.readers import next_linear, weight_rows
from ..qpp.fit import fit
from ..quantizer import ActivationQuantizer
from ..sites import iter_quantizers
from .errors import RankingError


class SearchSite:
    """What a quantizer of the copy does with its input, called as the quantizer is.

    Attributes:
        rankable: whether the method has important channels.
        active: False: return x (float). True: quantize.
        left_out: the channel that stays float: None, one index, or a (B,) tensor with one per sample (-1: none).
        replacement: if set, called with the quantizer's arguments in place of everything else.
    """

    def __init__(self, quantizer: ActivationQuantizer, name: str) -> None:
        self.quantizer = quantizer
        self.name = name
        self.rankable = quantizer.method.has_important_channels
        self.active = False
        self.left_out: int | Tensor | None = None
        self.replacement: Callable[..., Tensor] | None = None

    @property
    def channels(self) -> int:
        """C, the number of channels; 0 where the method does not look at channels."""
        return self.quantizer.num_channels or 0

    def __call__(self, x: Tensor, *predictions: Tensor) -> Tensor:
        if self.replacement is not None:
            return self.replacement(x, *predictions)
        if self.active:
            return self.keep_float(x, self.quantize(x, *predictions), self.left_out)
        if not predictions and (self.quantizer.listener is not None or self.quantizer.predictor is not None):
            with torch.no_grad():  # QPP without edges: the quantizers behind read what this one measures
                self.quantize(x)
        return x

    @property
    def reads_session(self) -> bool:
        """Whether its qparams are predicted from other tensors of the same forward."""
        predictor = self.quantizer.predictor
        return predictor is not None and not predictor.reads_itself(self.quantizer.name)

    def quantize(self, x: Tensor, *predictions: Tensor) -> Tensor:
        """The quantizer's own forward: Direct at n bits where channels can be ranked. Not the tensor x itself."""
        forward = type(self.quantizer).forward
        if x.ndim == 1:  # the quantizer would call its own forward, which is this site
            return forward(self.quantizer, x.unsqueeze(1), *predictions).squeeze(1)
        return forward(self.quantizer, x, *predictions)

    def keep_float(self, x: Tensor, quantized: Tensor, channel: int | Tensor | None) -> Tensor:
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


class SearchModel:
    """A frozen copy of a prepared and calibrated model.

    Args:
        model: the user's; it is only copied.

    Attributes:
        model: the copy, in eval mode, on the model's device.
        sites: one per quantizer, in order of execution.

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
        fit(self.model)
        self.sites: list[SearchSite] = []
        for name, quantizer in iter_quantizers(self.model):
            if quantizer.method.has_important_channels:
                quantizer.set_extra_bits(torch.zeros(quantizer.num_channels or 0, dtype=torch.int64))
            quantizer.freeze(_next_layer_weight(quantizer, self.model))
            site = SearchSite(quantizer, name)
            object.__setattr__(quantizer, "forward", site)
            self.sites.append(site)

    def quantize_before(self, index: int) -> None:
        """Sites before `index` quantize (with what they leave out), it and those after it do not."""
        for position, site in enumerate(self.sites):
            site.active = position < index


def check_rankable(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """The quantizers of a model whose channels can be ranked, by site name, in order of execution.

    Raises:
        UncalibratedQuantizer, UnsupportedCombination, RankingError: see `SearchModel`.
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
    rankable = {name: q for name, q in quantizers if q.method.has_important_channels}
    if not rankable:
        raise UnsupportedCombination(
            f"{_label(*quantizers[0])} has no important channels, nor has any other quantizer of the model; use DQA to "
            "rank channels."
        )
    return rankable


def _label(name: str, quantizer: ActivationQuantizer) -> str:
    """As `ActivationQuantizer.label`, with the site's name also where the quantizer was placed by hand."""
    return f"{name!r} ({type(quantizer.method).__name__}, {quantizer.method.bits} bits)"


def _next_layer_weight(quantizer: ActivationQuantizer, model: nn.Module) -> Tensor | None:
    """(O, D), the next linear layer's weight, where freezing searches against it and the graph knows it."""
    if not quantizer.method.needs_next_layer or not isinstance(model, GraphModule):
        return None
    for node in model.graph.nodes:
        if node.op != "call_module":
            continue
        if any(module is quantizer for module in model.get_submodule(str(node.target)).modules()):
            layer = next_linear(node.users, model)
            return None if layer is None else weight_rows(layer, model)
    return None
