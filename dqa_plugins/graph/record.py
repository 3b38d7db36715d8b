"""Run a model once, and leave no trace in it: no statistic of an observer or batch norm, no random number."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from .fx import TensorFacts, is_tensors


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put back everything that a forward pass changes in a model: buffers, training flags, torch's random state.

    Inside, the model is in eval mode. Observers keep their statistics in buffers, which change shape: they are set
    again, not copied into.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        for module in modes:  # not eval(), which models of torch.export refuse
            module.training = False
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for module, name, buffer, before in buffers:
            if buffer.shape != before.shape:
                module._buffers[name] = before
                continue
            module._buffers[name] = buffer
            if not torch.equal(buffer, before):  # an expanded buffer could not be written
                buffer.detach().copy_(before)


class _Recorder(Interpreter):
    def __init__(self, model: GraphModule) -> None:
        super().__init__(model)
        self.seen: dict[Node, TensorFacts] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.seen[n] = TensorFacts(tuple(value.shape), value.dtype)
        elif is_tensors(value):
            self.seen[n] = TensorFacts(None, None)
        return value


def record_shapes(model: GraphModule, inputs: Any) -> dict[Node, TensorFacts]:
    """Shape and dtype of what each node of a graph gives; numbers and sizes are left out.

    Args:
        model: runs once on copies of the inputs, in eval mode, without gradients.
        inputs: a tuple or list of positional inputs, or a mapping of keyword inputs.
    """
    recorder = _Recorder(model)
    if isinstance(inputs, Mapping):
        names = [str(node.target) for node in model.graph.nodes if node.op == "placeholder"]
        inputs = tuple(inputs[name] for name in names if name in inputs)
    given = inputs if isinstance(inputs, tuple | list) else (inputs,)
    with untouched(model), torch.no_grad():
        recorder.run(*torch.utils._pytree.tree_map_only(Tensor, torch.clone, tuple(given)))
    return recorder.seen
