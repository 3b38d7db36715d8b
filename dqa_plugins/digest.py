"""A digest of data, functions and models: by their content, so that it says whether two are the same.

Names and weights are not enough: every lambda is called `<lambda>`, and two networks may connect the same layers in
different ways. So the digest of a model covers the code of its modules beside their tensors, and that of a metric its
code, its defaults and the values that it closes over. Code is digested as bytecode, so it must be the same version of
Python that resumes. What the standard library, torch, numpy and this package define goes by its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import sys
from collections.abc import Iterator
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from .state import StateModule

_RANKED = ("extra_bits", "_extra_state")  # what a ranking changes: a model ranked before is still the same model
_BY_NAME = (sys.stdlib_module_names - {"__main__"}) | {"torch", "numpy", "dqa_plugins"}
_SIMPLE = (type(None), bool, int, float, complex, str, bytes)
_CALLABLE = (FunctionType, BuiltinFunctionType, MethodType, partial)


def digest(value: Any) -> str:
    """SHA-256 of a value: data by its content, functions and modules by the code they run."""
    found = hashlib.sha256()
    for part in _parts(value, {}):
        found.update(b"%d:" % len(part) + part)
    return found.hexdigest()


def _parts(value: Any, seen: dict[int, Any]) -> Iterator[bytes]:
    """The content of a value. seen: functions, classes and objects met before, by id (kept, so that ids stay valid)."""
    if isinstance(value, _SIMPLE):
        yield f"{type(value).__name__} {value!r}".encode()
        return
    if isinstance(value, Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return
    yield type(value).__qualname__.encode()
    content: Any
    if isinstance(value, dict):
        content = [part for item in value.items() for part in item]
    elif isinstance(value, tuple | list):
        content = [len(value), *value]
    elif isinstance(value, set | frozenset):
        content = sorted(map(repr, value))
    elif id(value) in seen:
        return
    else:
        seen[id(value)] = value
        content = _content(value)
    for part in content:
        yield from _parts(part, seen)


def _content(value: Any) -> list[Any]:
    """What tells a function, class, module or other object from others."""
    if isinstance(value, CodeType):
        return [value.co_code, value.co_exceptiontable, value.co_names, value.co_consts]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, FunctionType | type):
        name = f"{value.__module__}.{value.__qualname__}"
        if _by_name(value):
            return [name]
        return [name, *(_function(value) if isinstance(value, FunctionType) else _class(value))]
    if isinstance(value, nn.Module):
        tensors = {key: tensor for key, tensor in value.state_dict().items() if not key.endswith(_RANKED)}
        return [tensors, *(part for name, module in value.named_modules() for part in (name, *_module(module)))]
    if _by_name(type(value)):  # dtypes, operators, iterators, ...: without addresses
        return [re.sub(r" at 0x[0-9a-f]+", "", repr(value))]
    return [type(value), getattr(value, "__dict__", {})]


def _by_name(value: Any) -> bool:
    return str(value.__module__).split(".")[0] in _BY_NAME


def _function(function: FunctionType) -> list[Any]:
    """Code, defaults, the variables it closes over, and the globals it names that are plain values or functions."""
    cells = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # a variable that has no value yet
            cells.append(cell.cell_contents)
    named = [function.__globals__.get(name) for name in function.__code__.co_names]
    used = [value for value in named if isinstance(value, (*_SIMPLE, *_CALLABLE))]
    return [function.__code__, function.__defaults__, function.__kwdefaults__, cells, used]


def _class(kind: type) -> list[Any]:
    """The functions of a class, and its bases."""
    functions = (getattr(value, "__func__", getattr(value, "fget", value)) for value in vars(kind).values())
    return [*(f for f in functions if isinstance(f, FunctionType)), *kind.__bases__]


def _module(module: nn.Module) -> list[Any]:
    """What a module computes, apart from its tensors and submodules: class, plain settings, functions, its graph."""
    if isinstance(module, StateModule):  # quantizers and their records: the layers and tensors tell
        return [type(module)]
    settings = {
        key: value
        for key, value in vars(module).items()
        if key != "training" and not key.startswith("_") and isinstance(value, (*_SIMPLE, *_CALLABLE, tuple))
    }
    if isinstance(module, GraphModule):
        return [settings, module.code, [node.target for node in module.graph.nodes]]
    return [type(module), settings]
