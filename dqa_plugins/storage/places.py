"""The modules that stand in the graph where a long-lived value is kept: while calibrating, and once packed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import ExportFailed
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


def _check_eager(name: str) -> None:
    """Packed bytes have no fixed size, so no exported graph can hold them.

    Raises:
        ExportFailed: the model is being exported or traced.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        raise ExportFailed(
            f"'{name}' packs its tensor, which an exported graph cannot express. Export the model that was given to "
            "convert_stored: it computes the same values."
        )


class Pack(nn.Module):
    """Packs what it is given; the codebook is part of the state_dict. torch.compile leaves it out of its graphs."""

    def __init__(self, quantizer: ActivationQuantizer, codebook: Codebook, edge: Edge) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.codebook = codebook
        self.edge = edge

    @torch.compiler.disable(reason="packed bytes have no fixed size: convert_stored models run in eager PyTorch")
    def forward(self, x: Tensor, whole: Tensor | None = None) -> PackedActivation | Tensor:
        """The packed value (tensors without data, of the meta device, pass through).

        Raises:
            ExportFailed: the model is being exported.
        """
        _check_eager(self.quantizer.name)
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

    @torch.compiler.disable(reason="packed bytes have no fixed size: convert_stored models run in eager PyTorch")
    def forward(self, packed: PackedActivation | Tensor) -> Tensor:
        """The fake-quantized value."""
        return packed if isinstance(packed, Tensor) else packed.unpack()
