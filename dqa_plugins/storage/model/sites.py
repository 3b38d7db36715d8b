"""The modules of a stored value: one observes it while calibrating, two pack and unpack it once converted."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ...errors import ExportFailed, RanksDiffer
from ...quantizer import ActivationQuantizer
from ..format.codebook import Codebook
from ..format.errors import CorruptFrame
from ..format.section import read_codebook, write_codebook
from ..packed import PackedActivation
from ..packing import pack
from ..samples import CalibrationSamples, join, samples_wanted, take_samples
from . import gradients
from .edges import Edge


class StoredSite(nn.Module):
    """Stands where a long-lived value is stored: observes while calibrating, fake-quantizes once frozen.

    Besides what the quantizer itself keeps, it keeps samples of neighbouring values for the entropy tables. In a model
    that an adapter prepared or converted, the quantizer is the one that the adapter placed: the graph calls that one,
    and this site only looks on.
    """

    def __init__(self, quantizer: ActivationQuantizer, edge: Edge) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.edge = edge
        self.samples: CalibrationSamples | None = None
        self.paused = False  # True while gradients are taken: neither observe nor quantize

    def forward(self, x: Tensor, quantized: Tensor | None = None, whole: Tensor | None = None) -> Tensor:
        """Observe or fake-quantize x.

        Args:
            x: the value.
            quantized: what the adapter's quantizer made of it; returned as it is.
            whole: the tensor that dynamic parameters are taken from, where that is not x.
        """
        if self.paused:
            return x if quantized is None else quantized
        out: Tensor = self.quantizer(x) if quantized is None else quantized
        wanted = quantized is not None or self.quantizer.state == "observe"
        if wanted and (left := samples_wanted(self.samples)) and x.numel() and self.quantizer.calibrated:
            taken = take_samples(x[:left], self.quantizer, source=None if whole is None else whole[:left])
            self.samples = join(self.samples, taken)
        return out

    def give_samples(self, most: int) -> dict[str, Tensor]:
        """The first samples, for other processes (see `merging`)."""
        if self.samples is None:
            return {}
        extents = {f"extent {k}": extent[:most] for k, extent in enumerate(self.samples.extents)}
        others = torch.tensor(self.samples.others)
        return {"values": self.samples.values[:most], "others": others, **extents}

    def join_samples(self, parts: list[dict[str, Tensor]]) -> CalibrationSamples | None:
        """The samples of all processes, as one process would have kept them.

        Raises:
            RanksDiffer: inputs differ in size, in an order that cannot be told any more.
        """
        found: CalibrationSamples | None = None
        for part in parts:
            if not part:
                continue
            extents = tuple(value for name, value in part.items() if name.startswith("extent"))
            taken = CalibrationSamples(part["values"], extents, bool(part["others"]))
            if found is not None and taken.others and found.values.shape[1:] != taken.values.shape[1:]:
                raise RanksDiffer(
                    f"{self.quantizer.label}: a rank calibrated on inputs of several sizes, of which the first is not "
                    "that of rank 0. Begin with inputs of one size on every rank."
                )
            found = join(found, taken)
        return found


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
    def forward(
        self, x: Tensor, whole: Tensor | None = None, prediction: Tensor | None = None
    ) -> PackedActivation | Tensor:
        """The packed value (tensors without data, of the meta device, pass through).

        Args:
            x: the value.
            whole: the tensor that dynamic parameters are taken from, where that is not x.
            prediction: of its parameters, see `pack`.

        Raises:
            ExportFailed: the model is being exported.
        """
        _check_eager(self.quantizer.name)
        if x.device.type == "meta":
            return x
        packed = pack(x, self.quantizer, self.codebook.coding, self.codebook, source=whole, prediction=prediction)
        wanted = x.requires_grad and torch.is_grad_enabled()
        return gradients.with_gradient(packed, x, self.quantizer, whole, prediction) if wanted else packed

    def get_extra_state(self) -> Tensor:
        """The codebook section, as uint8: loads with weights_only."""
        return torch.frombuffer(bytearray(write_codebook(self.codebook)), dtype=torch.uint8).clone()

    def set_extra_state(self, state: Tensor) -> None:
        """Inverse of `get_extra_state`.

        Raises:
            CorruptFrame: the state is no codebook.
        """
        if not isinstance(state, Tensor) or state.dtype != torch.uint8:
            raise CorruptFrame(f"'{self.edge.name}': the state of a packed value is a uint8 tensor, got {state!r:.80}.")
        book = read_codebook(memoryview(state.cpu().numpy().tobytes()))
        self.codebook = replace(book, name=self.quantizer.name)


class Unpack(nn.Module):
    """Unpacks right before a late reader."""

    @torch.compiler.disable(reason="packed bytes have no fixed size: convert_stored models run in eager PyTorch")
    def forward(self, packed: PackedActivation | Tensor) -> Tensor:
        """The fake-quantized value."""
        return packed if isinstance(packed, Tensor) else gradients.unpack(packed)
