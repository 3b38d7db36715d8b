"""Which call of which module makes each node of an NNCF graph.

NNCF's own node names do not lead back to modules: a module that lives in a ModuleList and is called by its parent
loses its path ('conv1/conv2d/0' for down.0.conv1 and 'conv1/conv2d/1' for down.1.conv1, NNCF 3.4). So the model runs
once more, and every operation is recorded together with the modules that are executing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from nncf.torch.function_hook.hook_executor_mode import FunctionHookMode
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import GraphModelWrapper
from nncf.torch.function_hook.wrapper import ATR_HOOK_STORAGE, get_hook_storage
from torch import nn

from dqa_plugins.graph.record import untouched


@dataclass
class Calls:
    """The modules that were executing, by name of NNCF's operation.

    Args:
        enclosing: path of the innermost module, "" for the model; hooks of NNCF are modules too.
        leaves: (path, number of the call) of the outermost of torch's own modules; absent outside of these.
    """

    enclosing: dict[str, str] = field(default_factory=dict)
    leaves: dict[str, tuple[str, int]] = field(default_factory=dict)


def is_hook(path: str) -> bool:
    """True for the path of a module that NNCF hooked in, such as SmoothQuant's multiplication."""
    return path.startswith(ATR_HOOK_STORAGE)


def is_leaf(module: nn.Module) -> bool:
    """What torch.fx does not look into, so that names are the same in the FX adapter."""
    return type(module).__module__.startswith(("torch.nn", "torch.ao.nn")) and not isinstance(module, nn.Sequential)


class _Recorder(FunctionHookMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, get_hook_storage(model))
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.calls = Calls()
        self.stack: list[int] = []  # number of each call in module_call_stack
        self.count = 0

    def push_module_call_stack(self, module: nn.Module) -> None:
        super().push_module_call_stack(module)
        self.stack.append(self.count)
        self.count += 1

    def pop_module_call_stack(self) -> None:
        super().pop_module_call_stack()
        self.stack.pop()

    def get_next_op_call_name(self, fn_name: str) -> str:
        name = super().get_next_op_call_name(fn_name)
        self.calls.enclosing[name] = self.paths.get(id(self.module_call_stack[-1]), "")
        for module, number in zip(self.module_call_stack[1:], self.stack[1:], strict=True):
            if is_leaf(module):
                self.calls.leaves[name] = (self.paths.get(id(module), ""), number)
                break
        return name


@torch.no_grad()
def record_calls(wrapper: GraphModelWrapper) -> Calls:
    """Run the model on its example input and record the modules around each operation."""
    model, example = wrapper.model, wrapper.example_input
    args: Any = example if isinstance(example, tuple) else () if isinstance(example, dict) else (example,)
    kwargs: Any = example if isinstance(example, dict) else {}
    forward: Any = model.forward
    with untouched(model), _Recorder(model) as recorder:
        args, kwargs = recorder.process_model_inputs(args, kwargs)
        recorder.process_model_outputs(forward.orig_forward(*args, **kwargs))
    return recorder.calls
