"""What lowering knows of a program: constants, what goes into quantizers, and which of those depend on the sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from dqa_plugins.export.expand import parameter_name
from dqa_plugins.export.frozen import FrozenQuantizer
from dqa_plugins.grid import Grid
from dqa_plugins.operators import DEQUANTIZE, FAKE_QUANTIZE, MODULE, grid_of
from dqa_plugins.quantizer import ActivationQuantizer


class _Values(Interpreter):
    """Keeps what goes into quantizers, and their grids."""

    def __init__(self, model: GraphModule, modules: Mapping[str, Callable[..., Tensor]]) -> None:
        super().__init__(model)
        self.modules = modules
        self.seen: dict[Node, tuple[Tensor, Grid]] = {}

    def run_node(self, n: Node) -> Any:
        if n.target not in (FAKE_QUANTIZE, MODULE):
            return super().run_node(n)
        arguments = self.fetch_args_kwargs_from_env(n)[0]
        if n.target is FAKE_QUANTIZE:
            self.seen[n] = (arguments[0].detach(), grid_of(*arguments[1:-1]))
            return super().run_node(n)
        module = self.modules[arguments[1]]
        if isinstance(module, FrozenQuantizer):
            self.seen[n] = (arguments[0][0].detach(), module.original.grid(*arguments[0]))
        return module(*arguments[0])


class Facts:
    """Of an unlifted program, run once.

    Args:
        model: the program.
        modules: of its module nodes: what depends on the sample.
        inputs: example inputs.

    Attributes:
        seen: quantizer nodes, and what went in: the tensor and its grid.
    """

    def __init__(
        self, model: GraphModule, modules: Mapping[str, Callable[..., Tensor]], inputs: tuple[Any, ...]
    ) -> None:
        self.model, self.graph, self.modules = model, model.graph, modules
        values = _Values(model, modules)
        values.run(*inputs)
        self.seen = values.seen

    def constant(self, value: Any) -> Tensor | None:
        """The tensor behind a get_attr node."""
        if not isinstance(value, Node) or value.op != "get_attr":
            return None
        found: Any = self.model
        for part in str(value.target).split("."):
            found = getattr(found, part)
        return found if isinstance(found, Tensor) else None

    def varies(self, quantizer: Any) -> ActivationQuantizer | None:
        """The quantizer of a node whose qparams depend on the sample."""
        module = self.modules[quantizer.args[1]] if quantizer.target is MODULE else None
        return module.original if isinstance(module, FrozenQuantizer) else None

    def site(self, quantizer: Any) -> str:
        varying = self.varies(quantizer)
        return str(quantizer.args[-1]) if varying is None else varying.name

    def name(self, node: Any) -> str:
        weight: Any = node.args[1]
        if isinstance(weight, Node) and weight.target is DEQUANTIZE:
            weight = weight.args[0]
        return parameter_name(str(getattr(weight, "target", ""))).removesuffix(".weight") or node.name


def tensors(grid: Grid) -> list[Tensor]:
    """The tensors of a grid."""
    found: list[Tensor] = []
    grid.map(lambda p: found.append(p) or p)  # type: ignore[func-returns-value]
    return found


def writes(user: Node, x: Node) -> bool:
    """Whether an operation changes x in place."""
    schema = getattr(user.target, "_schema", None)
    if schema is None:
        return False
    written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    given = dict(zip([a.name for a in schema.arguments], user.args, strict=False), **user.kwargs)
    return any(given.get(name) is x for name in written)
