"""Quantizers for torch.export: the same numerics with every constant precomputed, and one operator at the end.

An ActivationQuantizer lays its parameters out and checks channels in each forward. In an exported graph that would be
fifty nodes per quantizer, most of them constants to fold. Here the grid is a set of buffers, one for each rank and
dtype of the input; what is left is its arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields

import torch
from torch import Tensor, nn

from dqa_plugins.grid import Grid
from dqa_plugins.operators import as_node, fake_quantize
from dqa_plugins.qpp.predictor import Predictor
from dqa_plugins.quantizer import ActivationQuantizer
from dqa_plugins.rounding import compute_dtype

Kind = tuple[int, torch.dtype]  # rank and compute dtype of a tensor


class FrozenPredictor(nn.Module):
    """A fitted predictor without its calibration record."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        for name in ("weight", "bias", "logarithmic", "low", "high", "rate", "centres", "bumps"):
            self.register_buffer(name, getattr(predictor, name))
        self.mode, self.groups = predictor.mode, predictor.groups
        self.sides = predictor.low.numel() // max(1, predictor.groups)
        self.own, self.summary = predictor.own, predictor.summary  # graphs call them by these names

    def forward(self, features: Tensor, *summaries: Tensor) -> Tensor:
        """As `Predictor.forward`."""
        found = as_node(self, (features, *summaries), (self.sides, self.groups), torch.float32)
        return found if found is not None else Predictor.forward(self, features, *summaries)  # type: ignore[arg-type]


class FrozenQuantizer(nn.Module):
    """A frozen quantizer for tensors of known ranks, ending in our fake_quantize operator.

    Outputs are those of the quantizer, bit for bit.

    Args:
        quantizer: frozen.
        kinds: rank and compute dtype of each tensor it will see.
        site: names the operator's calls; unique in a program. None: the quantizer's name.
    """

    def __init__(self, quantizer: ActivationQuantizer, kinds: Iterable[Kind], site: str | None = None) -> None:
        super().__init__()
        self.site = quantizer.name if site is None else site
        # not a submodule: its buffers would become hundreds of unused inputs of the exported graph
        self._quantizer = (quantizer,)
        self.kinds = tuple(sorted(set(kinds), key=str))
        self._codes: dict[Kind, dict[str, int]] = {}
        for kind in self.kinds:
            grid = _constant_grid(quantizer, *kind)
            if grid is not None:
                self._keep(kind, grid)
        self.predictor = None if quantizer.predictor is None else FrozenPredictor(quantizer.predictor)

    def _keep(self, kind: Kind, grid: Grid) -> None:
        self._codes[kind] = {}
        for field in fields(grid):
            value = getattr(grid, field.name)
            if isinstance(value, int):
                self._codes[kind][field.name] = value
            for part, tensor in enumerate(value if isinstance(value, tuple) else (value,)):
                if isinstance(tensor, Tensor) and field.name != "exact_zero":
                    self.register_buffer(_buffer(kind, field.name, part), tensor)

    def constant_grid(self, x: Tensor) -> Grid | None:
        """What is known of the grid for tensors like x: all of it for static qparams, that of scale 1 for others."""
        kind = (x.ndim, compute_dtype(x.dtype))
        if kind not in self._codes:
            return None
        found: dict[str, object] = dict(self._codes[kind])
        for field in fields(Grid):
            parts = [self._buffers.get(_buffer(kind, field.name, part)) for part in (0, 1)]
            if parts[0] is not None:
                found[field.name] = tuple(parts) if field.name == "keep" else parts[0]
        return Grid(**found)  # type: ignore[arg-type]

    @property
    def original(self) -> ActivationQuantizer:
        """The quantizer it stands for."""
        return self._quantizer[0]

    def forward(self, x: Tensor, prediction: Tensor | None = None) -> Tensor:
        """Fake-quantize x, (B, ...), of one of the ranks."""
        original = self.original
        if prediction is None:
            if original.listener is not None:
                original.listener(original.name, x)
            if original.predictor is not None:
                prediction = original.predictor.predict(original, x, self.predictor)
        if original.method.qparams != "static":
            found = as_node(self, (x,) if prediction is None else (x, prediction), x.shape[1:], x.dtype)
            if found is not None:
                return found
        grid = self.constant_grid(x)
        if grid is None:
            grid = original.grid(x, prediction)
        elif original.method.qparams != "static":
            scale = original.source.qparams(original, x, prediction).scale
            if scale is None:
                raise TypeError("the grid of a range is no constant")
            grid = grid.scaled(scale)
        return fake_quantize(x, grid, self.site)


def unique(name: str, taken: set[str], numbered: str = "{}#{}") -> str:
    """The name, with a number behind it where it is taken; adds it to those."""
    found, number = name, 1
    while found in taken:
        number += 1
        found = numbered.format(name, number)
    taken.add(found)
    return found


def sites(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """The quantizers of a model by the names that they have in its program."""
    taken: set[str] = set()
    return {unique(m.name or "quantizer", taken): m for m in model.modules() if isinstance(m, ActivationQuantizer)}


def _buffer(kind: Kind, field: str, part: int) -> str:
    return f"{field}_{part}_{kind[0]}_{str(kind[1]).removeprefix('torch.')}"


def _constant_grid(quantizer: ActivationQuantizer, rank: int, dtype: torch.dtype) -> Grid | None:
    """What of the grid does not depend on x; None: nothing (a range of each sample's own)."""
    like = torch.empty([1] * rank, dtype=dtype, device=quantizer.scale.device)
    if quantizer.method.qparams == "static":
        return quantizer.grid(like).constants()
    return None if quantizer.method.uses_range else quantizer.unit_grid_for(like)


@torch.no_grad()
def freeze_for_export(model: nn.Module, inputs: Sequence[object]) -> nn.Module:
    """Replace the quantizers of a model by FrozenQuantizers, in place.

    Args:
        model: every quantizer frozen; a single ActivationQuantizer is replaced too.
        inputs: example inputs; the model is run once to see the rank of each quantizer's tensors.

    Returns:
        the model (or the FrozenQuantizer that stands for it).
    """
    kinds: dict[nn.Module, list[Kind]] = {m: [] for m in model.modules() if isinstance(m, ActivationQuantizer)}

    def record(quantizer: nn.Module, args: tuple[Tensor, ...]) -> None:
        kinds[quantizer].append((args[0].ndim, compute_dtype(args[0].dtype)))

    hooks = [quantizer.register_forward_pre_hook(record) for quantizer in kinds]
    try:
        model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    frozen: dict[nn.Module, nn.Module] = {q: FrozenQuantizer(q, kinds[q], site) for site, q in sites(model).items()}
    if isinstance(model, ActivationQuantizer):
        return frozen[model]
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module in frozen:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, frozen[module])
    return model
