"""What of torchao's PT2E mode is touched; `host.hooks` checks that it is still there.

Five functions get a wrapper, once, when this room is imported. All are looked up in their module at call time, so
it does not matter whether prepare_pt2e was imported before. Only our observers are treated differently.

- `quantize_pt2e._fuse_conv_bn_` and `_fuse_linear_bn_`: names the sites before batch norms disappear into layers; a
  Quantizer is only asked afterwards (torchao 0.18). Batch norms behind a layer that others read too stay. Those in
  training mode are remembered: they are folded as if they were in eval mode, and our Quantizer refuses that.
- `quantize_pt2e._fold_conv_bn_qat`: not called where no convolution was scaled for QAT: it exports 96 patterns, half a
  minute, as soon as any batch norm is left (torchao 0.18).
- `quantize_pt2e.prepare`: tells our observers that prepare_qat_pt2e is at work, which no Quantizer gets to know; keeps
  other Quantizers from sharing them (see `sharing`).
- `export_utils._replace_dropout`: move_exported_model_to_eval and _to_train end there. They rewrite dropout and batch
  norm and leave `.training` of observers alone; ours must stop learning in eval mode.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from dqa_plugins.errors import FrameworkMismatch
from dqa_plugins.graph.names import require_unique
from dqa_plugins.host import hooks
from dqa_plugins.host.hooks import Hook, Host
from dqa_plugins.host.sites import keep_summary, summaries
from dqa_plugins.qpp.edges import prepare_graph
from dqa_plugins.sites import iter_quantizers

from .host import ANNOTATION, TESTED, torchao
from .names import SITE, TRAINED_NORM, name_sites, readers
from .observer import PT2EObserver, PT2EWeight
from .sharing import separate

_NORMS = (torch.ops.aten.batch_norm.default, torch.ops.aten._native_batch_norm_legit_no_training.default)
_SCALED = (torch.ops.aten.div.Tensor, torch.ops.aten.add.Tensor)
HOST = Host("torchao", str(torchao.__version__), tested=TESTED, room="PT2E", otherwise="use the FX flow")


def _fuse_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    def fuse(m: GraphModule, *args: Any, **kwargs: Any) -> Any:
        name_sites(m.graph)
        activations = _activations(m)
        trained = [
            n
            for n in m.graph.nodes
            if n.target is torch.ops.aten.batch_norm.default and n.args[5] is True and n.args[0] in activations
        ]
        if trained:
            m.meta[TRAINED_NORM] = trained[0].meta.get(SITE, trained[0].name)
        with _shared_layers_kept(m):
            return original(m, *args, **kwargs)

    return fuse


def _activations(m: GraphModule) -> set[Node]:
    """What is computed from inputs: batch_norm in training mode is also how weights are standardized (NFNets)."""
    found: set[Node] = set()
    for node in m.graph.nodes:
        if node.op == "placeholder" or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


@contextlib.contextmanager
def _shared_layers_kept(m: GraphModule) -> Iterator[None]:
    """Hide layers that others read too from the batch norms behind them.

    torchao folds a batch norm into a layer whatever else reads that (0.18): y + norm(y) would become 2 norm(y).
    """
    hidden = []
    for norm in [n for n in m.graph.nodes if n.target in _NORMS]:
        layer = norm.args[0]
        if len(readers(layer)) > 1:
            with m.graph.inserting_before(norm):
                alias = m.graph.call_function(torch.ops.aten.alias.default, (layer,))
            alias.meta = dict(layer.meta)
            norm.replace_input_with(layer, alias)
            hidden.append((alias, layer))
    try:
        yield
    finally:
        for alias, layer in hidden:
            alias.replace_all_uses_with(layer)
            m.graph.erase_node(alias)
        if hidden:
            m.recompile()


def _fold_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    def fold(m: GraphModule) -> GraphModule:
        # QAT's pattern ends in batch_norm(conv / scale [+ bias]); one in training mode has a counter to be removed
        possible = any(
            n.target not in _NORMS or n.args[0].target in _SCALED or n.args[5] is True
            for n in m.graph.nodes
            if n.op == "call_function" and "batch_norm" in str(n.target)
        )
        return original(m) if possible or not any(True for _ in iter_quantizers(m)) else m

    return fold


def _prepare_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare(model: GraphModule, node_name_to_scope: Any, is_qat: bool, *args: Any, **kwargs: Any) -> GraphModule:
        separate(model)
        prepared = original(model, node_name_to_scope, is_qat, *args, **kwargs)
        if is_qat:
            for module in prepared.modules():
                if isinstance(module, PT2EObserver):
                    module.quantizer.start_qat()
                elif isinstance(module, PT2EWeight):
                    module.enable_fake_quant()
        quantizers = [quantizer for _, quantizer in iter_quantizers(prepared)]
        require_unique([quantizer.name for quantizer in quantizers], "the prepared model")
        for summary in list(summaries(prepared)):
            keep_summary(summary, prepared, quantizers)
        prepare_graph(prepared, quantizers)
        return prepared

    return prepare


def _dropout_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    def replace_dropout(m: GraphModule, train_to_eval: bool, *args: Any, **kwargs: Any) -> Any:
        for module in m.modules():
            if isinstance(module, PT2EObserver):
                module.train(not train_to_eval)
        return original(m, train_to_eval, *args, **kwargs)

    return replace_dropout


def install() -> None:
    """Install the wrappers; a second call changes nothing.

    Raises:
        FrameworkMismatch: torchao lacks a function, or its parameters changed.
    """
    quantize_pt2e = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
    export_utils = importlib.import_module("torchao.quantization.pt2e.export_utils")
    quantizer = importlib.import_module("torchao.quantization.pt2e.quantizer.quantizer")
    if getattr(quantizer, "Q_ANNOTATION_KEY", None) != ANNOTATION:
        raise FrameworkMismatch(
            f"torchao {torchao.__version__} keeps annotations elsewhere than in Node.meta[{ANNOTATION!r}]; the PT2E "
            f"adapter was tested with torchao {TESTED}."
        )
    hooks.install(
        [
            Hook(quantize_pt2e, "_fuse_conv_bn_", ("m",), _fuse_hook),
            Hook(quantize_pt2e, "_fuse_linear_bn_", ("m",), _fuse_hook),
            Hook(quantize_pt2e, "_fold_conv_bn_qat", ("m",), _fold_hook),
            Hook(quantize_pt2e, "prepare", ("model", "node_name_to_scope", "is_qat"), _prepare_hook),
            Hook(export_utils, "_replace_dropout", ("m", "train_to_eval"), _dropout_hook),
        ],
        HOST,
    )
