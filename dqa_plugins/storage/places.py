"""The modules that stand in the graph where a long-lived value is kept: while calibrating, and once packed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..quantizer import ActivationQuantizer
from .codebook import Codebook
from .edges import Edge
from .layer import read_codebook, write_codebook
from .packed import PackedActivation, pack
from .strips import Strips, join, samples_wanted, take_strips


class StoredSite(nn.Module):
    """Stands where a long-lived value is stored: observes while calibrating, fake-quantizes once frozen.

    Besides what the quantizer itself keeps, it keeps strips of neighbouring values for the entropy tables. In a model
    that an adapter prepared or converted, the quantizer is the one that the adapter placed: the graph calls that one,
    and this site only looks on.
    """

    def __init__(self, quantizer: ActivationQuantizer, edge: Edge) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.edge = edge
        self.strips: Strips | None = None
        self.paused = False  # True while gradients are taken: neither observe nor quantize

    def forward(self, x: Tensor, quantized: Tensor | None = None, whole: Tensor | None = None) -> Tensor:
        """Observe or fake-quantize x.

        Args:
            x: the value.
            quantized: what the adapter's quantizer made of it; returned as it is.
            whole: the tensor that x is a subsample of, where dynamic parameters are taken from it.
        """
        if self.paused:
            return x if quantized is None else quantized
        out: Tensor = self.quantizer(x) if quantized is None else quantized
        wanted = quantized is not None or self.quantizer.state == "observe"
        if wanted and (left := samples_wanted(self.strips)) and x.numel() and self.quantizer.calibrated:
            sampled = take_strips(x[:left], self.quantizer, source=None if whole is None else whole[:left])
            self.strips = join(self.strips, sampled)
        return out


class Pack(nn.Module):
    """Packs what it is given; the codebook is part of the state_dict."""

    def __init__(self, quantizer: ActivationQuantizer, codebook: Codebook, edge: Edge) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.codebook = codebook
        self.edge = edge

    def forward(self, x: Tensor, whole: Tensor | None = None) -> PackedActivation | Tensor:
        """The packed value (tensors without data, of the meta device, pass through)."""
        if x.device.type == "meta":
            return x
        return pack(x, self.quantizer, self.codebook.coding, self.codebook, source=whole)

    def get_extra_state(self) -> Tensor:
        """The codebook section, as uint8: loads with weights_only."""
        return torch.frombuffer(bytearray(write_codebook(self.codebook)), dtype=torch.uint8).clone()

    def set_extra_state(self, state: Tensor) -> None:
        """Inverse of `get_extra_state`."""
        self.codebook = read_codebook(memoryview(state.cpu().numpy().tobytes()))


class Unpack(nn.Module):
    """Unpacks right before a late reader."""

    def forward(self, packed: PackedActivation | Tensor) -> Tensor:
        """The fake-quantized value."""
        return packed if isinstance(packed, Tensor) else packed.unpack()
