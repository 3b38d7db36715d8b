"""What of torch.ao.quantization's FX mode is touched.

Functions get a wrapper, once, when this room is imported; `host.hooks` checks that they are still there:

- `fx.convert._replace_observer_with_quantize_dequantize_node`: plain convert_fx ignores an observer's `.convert` and
  puts a stock int8 quantizer in its place, in silence (torch 2.13); its decomposed sibling calls it. The wrapper makes
  both do so. Only our observers are treated differently.
- `fx.convert._replace_observer_or_dequant_stub_with_dequantize_node`: likewise for the observer behind a user's custom
  module, which it takes for one of int8.
- `quantize_fx._fuse_fx`: remembers the names of the modules that fusion is about to replace.
- `quantize_fx.prepare`: resolves `skip`, then places our observers (see `place`).
- `reference.modules.utils._quantize_weight` and `_quantize_and_dequantize_weight`, and what `rnn` imported of them: the
  weights of converted layers. They take float32 only (torch 2.13); the wrappers let models of other dtypes through.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.ao.quantization import QConfigMapping
from torch.fx import GraphModule

from dqa_plugins.graph.fx import name_sites
from dqa_plugins.host import hooks
from dqa_plugins.host.hooks import Hook, Host

from .config import skipped
from .names import CALLED, Seen, fused_into, mark_sites
from .observer import FXObserver
from .place import layers_to_skip, place

HOST = Host("torch", str(torch.__version__), tested="2.13.0", room="FX", otherwise="use the PT2E flow")


def _convert_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    convert = importlib.import_module("torch.ao.quantization.fx.convert")

    def replace_observer(model: GraphModule, node: Any, modules: Any, *args: Any, **kwargs: Any) -> Any:
        observer = modules[node.target]
        if not isinstance(observer, FXObserver):
            return original(model, node, modules, *args, **kwargs)
        qconfigs = args[1] if len(args) > 1 else kwargs["node_name_to_qconfig"]
        neighbours = [*node.args, *node.users]
        if not observer.by_name and all(convert._has_none_qconfig(n, qconfigs) for n in neighbours):
            # the qconfig_mapping given to convert_fx turned this one off: FX's own rule
            node.replace_all_uses_with(node.args[0])
            model.graph.erase_node(node)
            return None
        return observer.convert(model, node)

    return replace_observer


def _custom_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    def replace_with_dequantize(node: Any, graph: Any) -> Any:
        observer = graph.owning_module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(observer, FXObserver):
            return observer.convert(graph.owning_module, node)
        return original(node, graph)

    return replace_with_dequantize


def _fuse_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    def fuse(model: GraphModule, *args: Any, **kwargs: Any) -> GraphModule:
        sites = {node.name: site for node, site in name_sites(model.graph, model).items()}
        traced = GraphModule(model, copy.deepcopy(model.graph))
        fused = original(model, *args, **kwargs)
        fused.meta[CALLED] = (
            {type(module) for module in model.modules()} | {node.target for node in traced.graph.nodes},
            {name for name, _ in model.named_modules()},
        )
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
        if isinstance(qconfig_mapping, dict):
            qconfig_mapping = QConfigMapping.from_dict(qconfig_mapping)
        skip = skipped(qconfig_mapping)
        if skip:
            qconfig_mapping = copy.deepcopy(qconfig_mapping)
            for name in layers_to_skip(model, skip):
                qconfig_mapping.set_module_name(name, None)
        called = model.meta.pop(CALLED, (set(), set()))
        prepared = original(model, qconfig_mapping, is_qat, node_name_to_scope, example_inputs, *args, **kwargs)
        types, paths = called
        scopes = node_name_to_scope.values()
        seen = Seen(types | {scope[1] for scope in scopes}, paths | {scope[0] for scope in scopes})
        place(prepared, qconfig_mapping, example_inputs, seen, qat=is_qat)
        return prepared

    return prepare


def _weight_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    def quantize_weight(weight: Tensor, weight_qscheme: Any, weight_dtype: torch.dtype, *args: Any) -> Tensor:
        if weight.dtype == torch.float32 or weight_dtype == torch.float16:
            return original(weight, weight_qscheme, weight_dtype, *args)
        scale, *rest = args
        found = original(weight.float(), weight_qscheme, weight_dtype, scale.float(), *rest)
        return found if found.is_quantized else found.to(weight.dtype)

    return quantize_weight


def install() -> None:
    """Install the wrappers; a second call changes nothing.

    Raises:
        FrameworkMismatch: torch.ao lacks a function, or its parameters changed.
    """
    # the package attribute `fx.convert` is the function of that name: import_module gives the module
    convert = importlib.import_module("torch.ao.quantization.fx.convert")
    quantize_fx = importlib.import_module("torch.ao.quantization.quantize_fx")
    references = [
        importlib.import_module(f"torch.ao.nn.quantized.reference.modules.{name}") for name in ("utils", "rnn")
    ]
    hooks.require(convert, "_has_none_qconfig", HOST, ("node", "node_name_to_qconfig"))
    replace = "_replace_observer_with_quantize_dequantize_node"
    dequantize = "_replace_observer_or_dequant_stub_with_dequantize_node"
    prepare = ("model", "qconfig_mapping", "is_qat", "node_name_to_scope", "example_inputs")
    hooks.install(
        [
            Hook(convert, replace, ("model", "node", "modules", *prepare[3:4], "node_name_to_qconfig"), _convert_hook),
            Hook(convert, dequantize, ("node", "graph"), _custom_hook),
            Hook(quantize_fx, "_fuse_fx", ("model", "is_qat"), _fuse_hook),
            Hook(quantize_fx, "prepare", prepare, _prepare_hook),
            *(
                Hook(module, name, ("weight", "weight_qscheme", "weight_dtype", "weight_scale"), _weight_hook)
                for module in references
                for name in ("_quantize_weight", "_quantize_and_dequantize_weight")
            ),
        ],
        HOST,
    )
