"""A program without our two operators: plain aten operations and float constants, which run without this package."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from dqa_plugins.operators import DEQUANTIZE, FAKE_QUANTIZE, grid_of


def plain_fake_quantize(x: Tensor, *arguments: Any) -> Tensor:
    """What dqa_plugins::fake_quantize computes, in plain torch operations."""
    return grid_of(*arguments[:-1]).fake_quantize(x)


def expand(
    program: ExportedProgram,
    quantizer: Callable[..., Tensor] = plain_fake_quantize,
    weight: Callable[[Node], Callable[..., Tensor] | None] = lambda node: None,
) -> ExportedProgram:
    """A program without our operators, and without stack traces and local paths; the one given is not changed.

    Args:
        program: of `make_program`.
        quantizer: what each fake_quantize call becomes: a function of the operator's arguments.
        weight: gives for each dequantize call what it becomes: a function of the operator's arguments, or None: a
            float constant.
    """
    return _Expansion(program).run(quantizer, weight)


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


def integer_weights(program: ExportedProgram) -> dict[str, Tensor]:
    """The codes of each quantized weight of a program, by the name of the buffer that holds them."""
    names = program.graph_signature.inputs_to_buffers
    codes = [node.args[0] for node in calls(program, DEQUANTIZE)]
    return {names[str(c)]: found for c in codes if (found := constant_of(program, c)) is not None}


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
    def run(
        self, quantizer: Callable[..., Tensor], weight: Callable[[Node], Callable[..., Tensor] | None]
    ) -> ExportedProgram:
        weights: dict[str, Node] = {}
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node.target is DEQUANTIZE:
                key = str(node.args)
                if key in weights:
                    self._reuse(node, weights[key])
                else:
                    function = weight(node)
                    weights[key] = self._fold(node) if function is None else self._splice(node, function)
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

    def _splice(self, node: Node, function: Callable[..., Tensor]) -> Node:
        """The operations that a quantizer, or a weight, is made of, traced on the shapes of this call."""
        flat, spec = tree_flatten(node.args)
        sources = [value for value in flat if isinstance(value, Node)]

        def computed(*tensors: Tensor) -> Tensor:
            left = iter(tensors)
            return function(*tree_unflatten([next(left) if isinstance(v, Node) else v for v in flat], spec))

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
        return self._reuse(node, result)

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
