"""Networks with control flow: followed, or refused, and never one branch taken for the other."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from dqa_plugins import DQAError

from .cases_networks import FINE, near, nncf_graph
from .registry import Refused, case_class

FLOWS = (
    "value", "shape", "batch", "item", "while", "early", "flag", "none", "kind", "fixed loop", "loop over batch",
    "list", "assert", "where", "cond", "mode", "random", "grad", "default", "stateful",
)  # fmt: skip


class Flow(nn.Module):
    """Two convolutions of (B, 4, 6, 6), and what decides between them."""

    def __init__(self, kind: str, flag: bool) -> None:
        super().__init__()
        self.kind, self.flag, self.calls = kind, flag, 0
        self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Conv2d(4, 4, 1) for _ in range(2)])

    def forward(self, x: Tensor, gain: float = 1.0, extra: Tensor | None = None) -> Tensor:
        x = F.relu(self.left(x))
        if self.kind == "while":
            for _ in range(8):
                if not x.abs().max() > 1.0:
                    break
                x = self.blocks[0](x) * 0.5
            return self.right(x)
        if self.kind == "fixed loop":
            for block in self.blocks:
                x = x + block(x)
            return self.right(x)
        if self.kind == "loop over batch":
            return torch.stack([self.right(row[None])[0] for row in x])
        if self.kind == "list":
            return torch.cat(
                [block(part.repeat(1, 2, 1, 1)) for block, part in zip(self.blocks, x.chunk(2, 1), strict=True)], 1
            )
        if self.kind == "where":
            return torch.where(x.mean() > 0.4, self.right(x), self.blocks[0](x))
        if self.kind == "cond":
            return torch.cond(x.mean() > 0.4, lambda v: v.sin(), lambda v: v.cos(), (self.right(x),))
        if self.kind == "assert":
            assert x.shape[1] == 4, "four channels"
            return self.right(x)
        if self.kind == "none" and extra is not None:
            return self.right(x + extra)
        if self.kind == "default":
            return self.right(x) * gain
        if self.kind == "early" and x.max() < 0.8:
            return self.blocks[0](x)
        return self.right(x) if self._decides(x) else self.blocks[1](x) - 0.5

    def _decides(self, x: Tensor) -> Any:
        self.calls += self.kind == "stateful"
        decisions: dict[str, Callable[[], Any]] = {
            "value": lambda: x.mean() > 0.4, "item": lambda: x.mean().item() > 0.4, "shape": lambda: x.shape[1] == 4,
            "batch": lambda: x.shape[0] > 3, "flag": lambda: self.flag, "kind": lambda: isinstance(x, Tensor),
            "mode": lambda: self.training, "random": lambda: float(torch.rand(())) > 2,
            "grad": torch.is_grad_enabled, "stateful": lambda: self.calls > 2**20,
        }  # fmt: skip
        return decisions.get(self.kind, lambda: True)()


def host_follows(room: str, model: nn.Module, calibration: Tensor, x: Tensor) -> bool:
    """Whether the host's own trace computes what the network does: torch.fx takes a Proxy for no Tensor, in silence."""
    try:
        if room == "nncf":
            return bool(nncf_graph(copy.deepcopy(model), (calibration,)))
        dynamic = ({0: torch.export.Dim.AUTO},)
        exported = room == "pt2e"
        traced = torch.export.export(model, (calibration,), dynamic_shapes=dynamic).module() if exported else None
        return torch.allclose((traced or torch.fx.symbolic_trace(model))(x), model(x), atol=1e-5)
    except Exception:
        return False


class FlowCase(NamedTuple):
    """A network, the magnitude of what it is calibrated on, and magnitude and number of what it is run on."""

    kind: str
    flag: bool
    calibration: float
    x: float
    size: int
    room: str
    seed: int


magnitudes = st.sampled_from([0.3, 1.0, 3.0])
flow_cases = st.builds(
    FlowCase, st.sampled_from(FLOWS), st.booleans(), magnitudes, magnitudes, st.integers(1, 6),
    st.sampled_from(["fx", "pt2e", "brevitas", "nncf"]), st.integers(0, 999),
)  # fmt: skip


@case_class("control flow", flow_cases, names=(), needs=("torchao", "brevitas", "nncf"), slow=True)
def control_flow(case: FlowCase) -> None:
    """What the float network computes on either branch, whatever was calibrated on; or a refusal."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(case.seed)
        model = Flow(case.kind, case.flag).eval()
        calibration = torch.randn(4, 4, 6, 6) * case.calibration
        x = torch.randn(case.size, 4, 6, 6) * case.x
        expected = model(x)
        room = importlib.import_module(f"dqa_plugins.adapters.{case.room}")
        try:
            near(
                room.quantize_model(model, FINE, [calibration, calibration[:2]], weight_bits=None)(x),
                expected,
                case.room,
            )
        except Exception as error:
            if not isinstance(error, DQAError) and not host_follows(case.room, model, calibration, x):
                raise Refused(f"{type(error).__name__}: {error}") from error
            raise
