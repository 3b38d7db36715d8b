"""What of torch.ao.quantization's FX mode is touched, and the check that it is still there.

Three functions get a wrapper, once, when this room is imported:

- `fx.convert._replace_observer_with_quantize_dequantize_node`: plain convert_fx ignores an observer's `.convert` and
  puts a stock int8 quantizer in its place, in silence (torch 2.13); its decomposed sibling calls it. The wrapper makes
  both do so. Only our observers are treated differently.
- `quantize_fx._fuse_fx`: remembers the names of the modules that fusion is about to replace.
- `quantize_fx.prepare`: resolves `skip`, then names and corrects our observers (see `place`).
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.fx import GraphModule

from dqa_plugins.errors import FrameworkMismatch

from .config import PluginQConfigMapping
from .naming import fused_into, mark_sites, name_sites
from .observer import FXObserver
from .place import place, resolve_skip

MARK = "__dqa_plugins_hook__"


def _require(module: ModuleType, name: str, parameters: tuple[str, ...]) -> Callable[..., Any]:
    function = getattr(module, name, None)
    if not callable(function):
        raise FrameworkMismatch(
            f"{module.__name__}.{name} is gone in torch {torch.__version__}; the FX adapter stands on it. It was "
            "tested with torch 2.13.0: install that version, or use the PT2E flow."
        )
    found = tuple(inspect.signature(function).parameters)
    if found[: len(parameters)] != parameters:
        raise FrameworkMismatch(
            f"{module.__name__}.{name} takes {found} in torch {torch.__version__}, not {parameters}; the FX adapter "
            "was tested with torch 2.13.0."
        )
    return function


def _hook(module: ModuleType, name: str, parameters: tuple[str, ...], wrap: Callable[..., Any]) -> None:
    current = getattr(module, name, None)
    if getattr(current, MARK, False):
        return
    original = _require(module, name, parameters)
    wrapper = functools.wraps(original)(wrap(original))
    setattr(wrapper, MARK, True)
    setattr(module, name, wrapper)


def _convert_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    convert = importlib.import_module("torch.ao.quantization.fx.convert")

    def replace_observer(model: GraphModule, node: Any, modules: Any, *args: Any, **kwargs: Any) -> Any:
        observer = modules[node.target]
        if not isinstance(observer, FXObserver):
            return original(model, node, modules, *args, **kwargs)
        qconfigs = args[1] if len(args) > 1 else kwargs["node_name_to_qconfig"]
        neighbours = [*node.args, *node.users]
        if all(convert._has_none_qconfig(n, qconfigs) for n in neighbours):
            # the qconfig_mapping given to convert_fx turned this one off: FX's own rule
            node.replace_all_uses_with(node.args[0])
            model.graph.erase_node(node)
            return None
        return observer.convert(model, node)

    return replace_observer


def _fuse_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    def fuse(model: GraphModule, *args: Any, **kwargs: Any) -> GraphModule:
        sites = name_sites(model)
        traced = GraphModule(model, copy.deepcopy(model.graph))
        fused = original(model, *args, **kwargs)
        mark_sites(fused, sites, fused_into(traced, {node.name for node in fused.graph.nodes}))
        return fused

    return fuse


def _prepare_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare(
        model: GraphModule,
        qconfig_mapping: Any,
        is_qat: bool,
        node_name_to_scope: Any,
        example_inputs: Any,
        *args: Any,
        **kwargs: Any,
    ) -> GraphModule:
        if isinstance(qconfig_mapping, PluginQConfigMapping) and qconfig_mapping.skip:
            qconfig_mapping = copy.deepcopy(qconfig_mapping)
            for name in resolve_skip(model, qconfig_mapping.skip):
                qconfig_mapping.set_module_name(name, None)
        prepared = original(model, qconfig_mapping, is_qat, node_name_to_scope, example_inputs, *args, **kwargs)
        place(prepared, qconfig_mapping, example_inputs, qat=is_qat)
        return prepared

    return prepare


def install() -> None:
    """Install the wrappers; a second call changes nothing.

    Raises:
        FrameworkMismatch: torch.ao lacks a function, or its parameters changed.
    """
    # the package attribute `fx.convert` is the function of that name: import_module gives the module
    convert = importlib.import_module("torch.ao.quantization.fx.convert")
    quantize_fx = importlib.import_module("torch.ao.quantization.quantize_fx")
    _require(convert, "_has_none_qconfig", ("node", "node_name_to_qconfig"))
    _hook(
        convert,
        "_replace_observer_with_quantize_dequantize_node",
        ("model", "node", "modules", "node_name_to_scope", "node_name_to_qconfig"),
        _convert_hook,
    )
    _hook(quantize_fx, "_fuse_fx", ("model", "is_qat"), _fuse_hook)
    _hook(
        quantize_fx,
        "prepare",
        ("model", "qconfig_mapping", "is_qat", "node_name_to_scope", "example_inputs"),
        _prepare_hook,
    )
