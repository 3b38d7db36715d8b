"""Site names and channel axes of the nodes of an NNCF graph.

NNCF's own node names do not lead back to modules: a module that lives in a ModuleList and is called by its parent
loses its path ('conv1/conv2d/0' for down.0.conv1 and 'conv1/conv2d/1' for down.1.conv1, NNCF 3.4). So the model runs
once more, and every operation is noted together with the module that was executing.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from nncf.common.graph.graph import NNCFGraph, NNCFNode
from nncf.torch.function_hook.hook_executor_mode import FunctionHookMode
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import GraphModelWrapper
from nncf.torch.function_hook.wrapper import ATR_HOOK_STORAGE, get_hook_storage
from torch import nn

from dqa_plugins.sites import SiteNames, default_channel_axis

INPUT, OUTPUT, CONST = "nncf_model_input", "nncf_model_output", "nncf_model_const"

# Behind these the channels are where they were before: look further up.
_ELEMENTWISE = frozenset(
    "add iadd mul imul sub isub div truediv relu relu6 gelu silu hardswish sigmoid tanh softmax dropout clamp hardtanh "
    "contiguous leaky_relu elu layer_norm".split()
)
# The operations of attention that are a matmul under another name.
_MATMULS = frozenset({"bmm", "baddbmm", "addmm", "scaled_dot_product_attention"})


class _Recorder(FunctionHookMode):
    """Notes for every operation name the path of the innermost module that was executing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, get_hook_storage(model))
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.enclosing: dict[str, str] = {}

    def get_next_op_call_name(self, fn_name: str) -> str:
        name = super().get_next_op_call_name(fn_name)
        self.enclosing[name] = self.paths.get(id(self.module_call_stack[-1]), "")
        return name


@torch.no_grad()
def enclosing_modules(wrapper: GraphModelWrapper) -> dict[str, str]:
    """Run the model on its example input: {operation name: path of the module around it, "" for the model}."""
    model, example = wrapper.model, wrapper.example_input
    modes = {module: module.training for module in model.modules()}
    args: Any = example if isinstance(example, tuple) else () if isinstance(example, dict) else (example,)
    kwargs: Any = example if isinstance(example, dict) else {}
    forward: Any = model.forward
    try:
        model.eval()
        with _Recorder(model) as recorder:
            args, kwargs = recorder.process_model_inputs(args, kwargs)
            recorder.process_model_outputs(forward.orig_forward(*args, **kwargs))
    finally:
        for module, training in modes.items():
            module.training = training
    return recorder.enclosing


def operation(node: NNCFNode) -> str:
    """Function name of a node without underscores, as site names have it."""
    return str(node.node_type).strip("_")


def _is_leaf(module: nn.Module) -> bool:
    """What torch.fx does not look into, so that names are the same in the FX adapter."""
    return type(module).__module__.startswith(("torch.nn", "torch.ao.nn")) and not isinstance(module, nn.Sequential)


def site_names(graph: NNCFGraph, model: nn.Module, enclosing: dict[str, str]) -> dict[int, str]:
    """Site name of every input and operation: {node id: site name}.

    The last operation inside one of torch's own modules is called like the module; inside MultiheadAttention the
    operations before it are `<module>.<op>.<k>`.
    """
    nodes = sorted(graph.get_all_nodes(), key=lambda node: node.node_id)  # the order of execution
    parameters = list(inspect.signature(model.forward).parameters)
    modules = dict(model.named_modules())
    last = {enclosing[n.node_name]: n.node_type for n in nodes if n.node_name in enclosing}
    names, sites, inputs = SiteNames(), {}, 0
    for node in nodes:
        path = enclosing.get(node.node_name)
        if node.node_type == INPUT:
            # FX counts all parameters of forward, NNCF only those that got a tensor
            position = parameters.index(node.node_name) if node.node_name in parameters else inputs
            sites[node.node_id] = f"input.{position}"
            inputs += 1
        elif path is None:
            continue
        elif path.startswith(ATR_HOOK_STORAGE):
            # SmoothQuant's multiplication: still the tensor of the operation it is hooked to
            before = [edge.from_node.node_id for edge in graph.get_input_edges(node)]
            sites[node.node_id] = next((sites[i] for i in before if i in sites), node.node_name)
        elif path and _is_leaf(modules[path]) and last[path] == node.node_type:
            sites[node.node_id] = names.module(path)
        else:
            sites[node.node_id] = names.operation(path, operation(node))
    return sites


def producer_axis(node: NNCFNode, graph: NNCFGraph) -> int:
    """Channel axis of the tensor a node produces: -1 behind Linear and its like, else 1.

    Elementwise operations hand on the axis of their operands (-1 if one has it), transpose and permute move it.
    """
    known: dict[int, int] = {}
    pending = [node]
    while pending:
        current = pending[-1]
        operands = [edge.from_node for edge in _operands(current, graph)]
        waiting = [n for n in operands if n.node_id not in known and n.node_id != current.node_id]
        if waiting and current.node_id not in known and _looks_up(current):
            known[current.node_id] = 1  # a cycle cannot be; this only marks the visit
            pending.extend(waiting)
            continue
        known[current.node_id] = _axis(current, [known.get(n.node_id, 1) for n in operands], graph)
        pending.pop()
    return known[node.node_id]


def _operands(node: NNCFNode, graph: NNCFGraph) -> list[Any]:
    return [edge for edge in graph.get_input_edges(node) if edge.from_node.node_type != CONST]


def _looks_up(node: NNCFNode) -> bool:
    name = operation(node)
    return default_channel_axis(name) != -1 and (name in _ELEMENTWISE or name in ("transpose", "permute"))


def _axis(node: NNCFNode, operands: list[int], graph: NNCFGraph) -> int:
    name = operation(node)
    if default_channel_axis(name) == -1 or name in _MATMULS:
        return -1
    if not operands:
        return 1
    if name in _ELEMENTWISE:
        return -1 if -1 in operands else operands[0]
    if name in ("transpose", "permute"):
        return _moved(node, operands[0], graph)
    return 1


def _moved(node: NNCFNode, axis: int, graph: NNCFGraph) -> int:
    rank = len(_operands(node, graph)[0].tensor_shape)
    attributes: Any = node.layer_attributes
    given = [*attributes.op_args[1:], *attributes.op_kwargs.values()]
    given = list(given[0]) if len(given) == 1 and isinstance(given[0], list | tuple) else given
    if not all(isinstance(d, int) for d in given):
        return 1
    order = list(range(rank))
    if operation(node) == "transpose" and len(given) == 2:
        order[given[0]], order[given[1]] = order[given[1]], order[given[0]]
    elif len(given) == rank:
        order = [d % rank for d in given]
    position = order.index(axis % rank)
    return -1 if position == rank - 1 else position
