"""A converted model as a torch.export program: what every exporter starts from.

`make_program` gives one node per quantizer call and one per quantized weight (see `operators`); `expand` writes both
out as plain aten operations and float constants, so that the result runs without this package.
"""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from dqa_plugins.errors import ExportFailed, UncalibratedQuantizer, UnsupportedCombination
from dqa_plugins.host.weights import weight_sites
from dqa_plugins.operators import DEQUANTIZE, FAKE_QUANTIZE, grid_of
from dqa_plugins.sites import iter_quantizers

from .frozen import freeze_for_export


def as_inputs(example_inputs: Any) -> tuple[Any, ...]:
    """The example inputs as a tuple; a single tensor becomes a tuple of one."""
    if isinstance(example_inputs, Tensor):
        return (example_inputs,)
    if not isinstance(example_inputs, Sequence) or isinstance(example_inputs, str):
        raise ExportFailed(f"example_inputs is a tensor or a tuple of them; got {type(example_inputs).__name__}.")
    return tuple(example_inputs)


@torch.no_grad()
def exportable(model: nn.Module, example_inputs: Any) -> nn.Module:
    """A copy of a converted model that torch.export takes: our operators for weights and quantizers, eval mode.

    Raises:
        UncalibratedQuantizer: a quantizer is not frozen; the model was not converted.
        UnsupportedCombination: the model packs activations into bytes.
    """
    for path, module in model.named_modules():
        # asked by name: importing storage would compile its kernels
        if type(module).__module__.startswith("dqa_plugins.storage."):
            raise UnsupportedCombination(
                f"'{path}' packs a stored activation into bytes ({type(module).__name__}), which no export format has. "
                "Export the model without stored activations: quantize it with an adapter."
            )
    for name, quantizer in iter_quantizers(model):
        if quantizer.state != "frozen":
            raise UncalibratedQuantizer(
                f"'{name}' is in state {quantizer.state!r}: export takes converted models. Calibrate and convert the "
                "model (or freeze the quantizer) first."
            )
    ready = copy.deepcopy(model)
    for site in list(weight_sites(ready)):
        site.replace()
    # GraphModules made by torch.export refuse eval(); they are exported in the mode they are in
    if ready.training and not hasattr(ready, "_exported_training"):
        try:
            ready.eval()
        except NotImplementedError:
            ready = copy.deepcopy(ready)
    return freeze_for_export(ready, as_inputs(example_inputs))


def _dynamic_shapes(inputs: tuple[Any, ...], dynamic_batch: bool) -> tuple[Any, tuple[Any, ...]]:
    """Dynamic shapes with one batch dimension, and inputs whose batch is not specialised (at least two samples)."""
    tensors = [x for x in inputs if isinstance(x, Tensor) and x.ndim > 0]
    if not dynamic_batch or not tensors:
        return None, inputs
    size = tensors[0].shape[0]
    batch = torch.export.Dim("batch", min=1, max=65536)

    def batched(x: Any) -> bool:
        return isinstance(x, Tensor) and x.ndim > 0 and x.shape[0] == size

    shapes: tuple[Any, ...] = tuple({0: batch} if batched(x) else None for x in inputs)
    if size == 1:  # torch.export takes a dimension of size 1 for a constant
        inputs = tuple(torch.cat([x, x]) if batched(x) else x for x in inputs)
    return shapes, inputs


def make_program(model: nn.Module, example_inputs: Any, *, dynamic_batch: bool = True) -> ExportedProgram:
    """Export a converted model with our two operators unexpanded: what formats with integers of their own start from.

    Args:
        model: converted by any room, or a single frozen ActivationQuantizer.
        example_inputs: a tensor or a tuple of them; the first dimension of the first one is the batch.
        dynamic_batch: every tensor with the batch of the first one gets a dynamic first dimension.

    Returns:
        a program whose outputs equal the model's. Quantizers are dqa_plugins::fake_quantize nodes, quantized weights
        dqa_plugins::dequantize nodes that read integer buffers. It runs where this package is imported.

    Raises:
        UncalibratedQuantizer: a quantizer is not frozen.
        UnsupportedCombination: the model packs activations into bytes.
        ExportFailed: torch.export failed.
    """
    inputs = as_inputs(example_inputs)
    shapes, inputs = _dynamic_shapes(inputs, dynamic_batch)
    ready = exportable(model, inputs)
    parameters = inspect.signature(ready.forward).parameters.values()
    named = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    if shapes is not None and any(p.kind is p.VAR_POSITIONAL for p in parameters):
        shapes = (*shapes[:named], shapes[named:])  # torch.export takes *args as one nested argument
    try:
        return _traced(ready, inputs, shapes)
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise ExportFailed(
            f"torch.export failed: {type(error).__name__}: {reason[0] if reason else ''}. If the batch size is fixed "
            "inside the model, give dynamic_batch=False."
        ) from error


def _traced(ready: nn.Module, inputs: tuple[Any, ...], shapes: Any) -> ExportedProgram:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.export.export(ready, inputs, dynamic_shapes=shapes)
        except torch._dynamo.exc.UserError as error:
            if "Constraints violated" not in str(error):
                raise
            # a model that torch.export made keeps the range of its own batch dimension: take it as it is
            open_range = torch.utils._pytree.tree_map_only(torch.export.Dim, lambda _: torch.export.Dim.DYNAMIC, shapes)
            return torch.export.export(ready, inputs, dynamic_shapes=open_range)


def to_exported_program(model: nn.Module, example_inputs: Any, *, dynamic_batch: bool = True) -> ExportedProgram:
    """Export a converted model, or a single frozen ActivationQuantizer, with torch.export.

    Args:
        model: converted by any adapter.
        example_inputs: a tensor or a tuple of them; the first dimension of the first one is the batch.
        dynamic_batch: every tensor with the batch of the first one gets a dynamic first dimension.

    Returns:
        torch.export.ExportedProgram; outputs equal the model's. Plain aten operations, weights as float constants that
        hold the dequantized numbers: a saved .pt2 opens and runs without this package.

    Raises:
        UncalibratedQuantizer, ExportFailed.
    """
    return expand(make_program(model, example_inputs, dynamic_batch=dynamic_batch))


# ---------------------------------------------------------------- expanding


def plain_fake_quantize(x: Tensor, *arguments: Any) -> Tensor:
    """What dqa_plugins::fake_quantize computes, in plain torch operations."""
    return grid_of(*arguments[:-1]).fake_quantize(x)


def expand(program: ExportedProgram, quantizer: Callable[..., Tensor] = plain_fake_quantize) -> ExportedProgram:
    """A program without our operators, and without stack traces and local paths; the one given is not changed.

    Args:
        program: of `make_program`.
        quantizer: what each fake_quantize call becomes: a function of the operator's arguments.
    """
    return _Expansion(program).run(quantizer)


def constant_of(program: ExportedProgram, value: Any) -> Tensor | None:
    """The parameter, buffer or constant that a node of a program stands for; None: it is computed, or an input."""
    if not isinstance(value, Node) or value.op != "placeholder":
        return None
    spec = next(s for s in program.graph_signature.input_specs if s.arg.name == value.name)
    found = program.state_dict.get(str(spec.target), program.constants.get(str(spec.target)))
    return found if isinstance(found, Tensor) else None


def calls(program: ExportedProgram, operator: Any) -> list[Node]:
    """The nodes of a program that call an operator, in order of execution."""
    return [node for node in program.graph.nodes if node.op == "call_function" and node.target is operator]


class _Expansion:
    """Rewrites a copy of a program's graph, with the signature and the constants that belong to it."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.module = copy.copy(program.graph_module)
        self.module.graph = self.graph = copy.deepcopy(program.graph)
        for node, original in zip(self.graph.nodes, program.graph.nodes, strict=True):
            node.name = original.name  # a copy does not take names of builtins, such as `input`
        self.state: dict[str, Any] = dict(program.state_dict)
        self.renamed: dict[str, str] = {}
        self.specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}

    @torch.no_grad()
    def run(self, quantizer: Callable[..., Tensor]) -> ExportedProgram:
        weights: dict[str, Node] = {}
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node.target is DEQUANTIZE:
                key = str(node.args)
                weights[key] = self._fold(node) if key not in weights else self._reuse(node, weights[key])
            elif node.op == "call_function" and node.target is FAKE_QUANTIZE:
                self._splice(node, quantizer)
        self._drop_unused()
        return self._rebuilt()

    def _reuse(self, node: Node, value: Node) -> Node:
        node.replace_all_uses_with(value)
        self.graph.erase_node(node)
        self.renamed[node.name] = value.name
        return value

    def _fold(self, node: Node) -> Node:
        """A float constant, under the name of the parameter, for a dequantize of constants."""
        codes: Any = node.args[0]
        name = parameter_name(str(self.specs[codes.name].target))
        with self.graph.inserting_before(codes):
            weight = self.graph.placeholder(f"b_{name.replace('.', '_')}")
        weight.meta = {key: value for key, value in node.meta.items() if key in ("val", "tensor_meta")}
        self.state[name] = DEQUANTIZE(*(constant_of(self.program, a) for a in node.args[:3]), *node.args[3:])
        self.specs[weight.name] = InputSpec(InputKind.BUFFER, TensorArgument(weight.name), name, True)
        return self._reuse(node, weight)

    def _splice(self, node: Node, quantizer: Callable[..., Tensor]) -> None:
        """The operations that a quantizer is made of, traced on the shapes of this call."""
        flat, spec = tree_flatten(node.args)
        sources = [value for value in flat if isinstance(value, Node)]

        def computed(*tensors: Tensor) -> Tensor:
            left = iter(tensors)
            return quantizer(*tree_unflatten([next(left) if isinstance(v, Node) else v for v in flat], spec))

        values = [source.meta["val"] for source in sources]
        with values[0].fake_mode:
            traced = make_fx(computed)(*values).graph
        inner = [n for n in traced.nodes if n.op == "placeholder"]
        copies: dict[Node, Node] = dict(zip(inner, sources, strict=True))
        with self.graph.inserting_before(node):
            result: Any = self.graph.graph_copy(traced, copies)
        for original, copied in copies.items():
            if original.op == "call_function" and "nn_module_stack" in node.meta:
                copied.meta["nn_module_stack"] = node.meta["nn_module_stack"]
        self._reuse(node, result)

    def _drop_unused(self) -> None:
        """Drop parameters, buffers and constants that nothing reads; and where nodes came from: paths, code."""
        mutated = set(self.program.graph_signature.buffers_to_mutate.values())
        for node in list(self.graph.nodes):
            for entry in ("stack_trace", "from_node"):
                node.meta.pop(entry, None)
            if node.op == "placeholder" and not node.users:
                spec = self.specs[node.name]
                if spec.kind is not InputKind.USER_INPUT and spec.target not in mutated:
                    self.graph.erase_node(node)

    def _rebuilt(self) -> ExportedProgram:
        self.module.recompile()
        program = self.program
        inputs = [self.specs[node.name] for node in self.graph.nodes if node.op == "placeholder"]
        outputs = [
            replace(spec, arg=TensorArgument(self.renamed[spec.arg.name])) if spec.arg.name in self.renamed else spec
            for spec in program.graph_signature.output_specs
        ]
        read = {spec.target for spec in inputs}
        return ExportedProgram(
            root=self.module,
            graph=self.graph,
            graph_signature=replace(program.graph_signature, input_specs=inputs, output_specs=outputs),
            state_dict={name: value for name, value in self.state.items() if name in read},
            range_constraints=program.range_constraints,
            module_call_graph=program.module_call_graph,
            example_inputs=program.example_inputs,
            constants={name: value for name, value in program.constants.items() if name in read},
            verifiers=program.verifiers,
        )


def parameter_name(target: str) -> str:
    """The name of a weight from that of its codes in the exportable model."""
    return re.sub(r"parametrizations\.(\w+)\.original0$", r"\1", target).removesuffix("_codes")
